"Resumed runs end with the same bits, whatever takes part in the fit."
from functools import partial
import numpy as np, pytest, torch, torch.nn as nn
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper, SGD, ranger
from torch.utils.data import DataLoader, TensorDataset
from medseg_nb.core import seeded
from medseg_nb.training.callbacks import AuxOutputs, CheckpointSeries, EMACallback, ResumeCallback, plain

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

class PowerCut(Callback):
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter == self.at: raise RuntimeError('power cut')

class FakeScaler(Callback):
    "A gradient scaler that grows with every step, as mixed precision would have it."
    order = 10
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2., growth_interval=3)
    def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.loss_grad)
    def after_backward(self):
        for p in self.model.parameters(): p.grad /= self.learn.scaler.get_scale()
    def after_step(self):
        self.learn.scaler._check_inf_per_device(torch.optim.SGD(self.model.parameters(), 0.))
        self.learn.scaler.update()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out, self.aux = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(.3)), nn.Linear(8, 1), nn.Linear(8, 1)
    def forward(self, x): f = self.body(x); return self.out(f), self.aux(f)

def aux_loss(aux, y): return nn.functional.l1_loss(aux[0], y)

def dataset(n, seed):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :1]*2)

def fastai_dls(): return DataLoaders.from_dsets(dataset(20, 0), dataset(8, 1), bs=4, num_workers=0, device='cpu')

def torch_dls():
    g = torch.Generator().manual_seed(int(torch.randint(100, (1,))))
    return DataLoaders(DataLoader(dataset(20, 0), batch_size=4, shuffle=True, generator=g), DataLoader(dataset(8, 1), batch_size=4), device=torch.device('cpu'))

def fit(seed, *cbs, n=4, dls=fastai_dls, cycle=True, **kw):
    with seeded(seed):
        learn = Learner(dls(), Net(), nn.MSELoss(), lr=.02, cbs=[AuxOutputs(aux_loss), *[cb() for cb in cbs]], **kw)
        with learn.no_bar(), learn.no_logging(): (learn.fit_one_cycle if cycle else learn.fit)(n)
    return learn

def same(a, b):
    assert all(p.equal(q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert [float(o) for o in a.recorder.losses] == [float(o) for o in b.recorder.losses]
    assert [list(v) for v in a.recorder.values] == [list(v) for v in b.recorder.values]

cases = dict(adam={}, sgd=dict(opt_func=SGD, cycle=False), torch=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), ranger=dict(opt_func=ranger),
             loader=dict(dls=torch_dls), groups=dict(splitter=lambda m: [list(m.body.parameters()), [*m.out.parameters(), *m.aux.parameters()]]))

@pytest.mark.parametrize('name', cases)
@pytest.mark.parametrize('at', (6, 13, 19))
def test_resume(tmp_path, name, at):
    kw, ema, resume = cases[name], partial(EMACallback, .9, 3), partial(ResumeCallback, tmp_path/'a.pth')
    with pytest.raises(RuntimeError, match='power cut'): fit(1, ema, resume, partial(PowerCut, at), **kw)
    same(fit(1, ema, **kw), fit(2, ema, resume, **kw))

@pytest.mark.parametrize('n_acc', (8, 12, 1000))
def test_resume_with_half_accumulated_gradients(tmp_path, n_acc):
    acc, resume = partial(GradientAccumulation, n_acc), partial(ResumeCallback, tmp_path/'a.pth')
    with pytest.raises(RuntimeError): fit(1, acc, resume, partial(PowerCut, 8))
    same(fit(1, acc), fit(2, acc, resume))

def test_resume_with_a_scaler(tmp_path):
    resume = partial(ResumeCallback, tmp_path/'a.pth')
    with pytest.raises(RuntimeError): fit(1, FakeScaler, resume, partial(PowerCut, 12))
    a, b = fit(1, FakeScaler), fit(2, FakeScaler, resume)
    assert a.scaler.get_scale() == b.scaler.get_scale() > 2.
    same(a, b)

def test_every_other_epoch(tmp_path, capsys):
    resume = partial(ResumeCallback, tmp_path/'a.pth', every=2)
    with pytest.raises(RuntimeError): fit(1, resume, partial(PowerCut, 18), n=5)
    same(fit(1, n=5), fit(2, resume, n=5))
    assert 'after epoch 2 of 5' in capsys.readouterr().out
    fit(3, resume, n=5)
    assert 'after epoch 5 of 5' in capsys.readouterr().out

def test_other_callbacks_do_not_see_skipped_epochs(tmp_path):
    class Seen(Callback):
        def before_fit(self): self.epochs = []
        def before_epoch(self): self.epochs.append(self.epoch)
        def after_epoch(self): self.epochs.append(self.epoch)
    save = partial(SaveModelCallback, monitor='valid_loss')
    resume, series = partial(ResumeCallback, tmp_path/'a.pth'), partial(CheckpointSeries, tmp_path/'series', last=3)
    with pytest.raises(RuntimeError): fit(1, save, series, resume, partial(PowerCut, 12), path=tmp_path/'b')
    b = fit(2, save, series, resume, Seen, path=tmp_path/'b')
    a = fit(1, save, path=tmp_path/'a')
    assert b.seen.epochs == [2, 2, 3, 3] and b.save_model.best == a.save_model.best
    assert [p.name for p in b.checkpoint_series.paths] == [f'epoch_000{i}.safetensors' for i in (1, 2, 3)]
    same(a, b)

def test_resume_with_progress_and_logger(tmp_path):
    with pytest.raises(RuntimeError): fit(1, partial(ResumeCallback, tmp_path/'a.pth'), partial(PowerCut, 12))
    with seeded(2): learn = Learner(fastai_dls(), Net(), nn.MSELoss(), lr=.02, cbs=[AuxOutputs(aux_loss), ResumeCallback(tmp_path/'a.pth')])
    learn.fit_one_cycle(4)
    same(fit(1), learn)

def test_validation_and_lr_find_leave_the_file_alone(tmp_path):
    file = tmp_path/'a.pth'
    learn = fit(1, partial(EMACallback, .9, 3), partial(ResumeCallback, file), partial(CheckpointSeries, tmp_path/'series', last=1), path=tmp_path)
    was = file.read_bytes()
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        nn.init.zeros_(learn.model.out.weight); learn.validate(); learn.get_preds()
        assert not learn.model.out.weight.any(), 'the file was read or the average put back'
        learn.model.load_state_dict(before)
        with learn.added_cbs(LRFinder(num_it=6)): learn.fit(2)
    assert file.read_bytes() == was and len(learn.checkpoint_series.paths) == 1
    assert all(v.equal(before[k]) for k,v in learn.model.state_dict().items())

def test_refusals(tmp_path, monkeypatch):
    resume = partial(ResumeCallback, tmp_path/'a.pth')
    fit(1, resume)
    with pytest.raises(ValueError, match='optimizer Optimizer, here OptimWrapper'): fit(1, resume, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    with pytest.raises(ValueError, match=r'parameter groups of \[8\]'): fit(1, resume, splitter=cases['groups']['splitter'])
    learn = fit(1)
    assert learn.recorder.values, 'a refused fit leaves others alone'
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='for one process, this fit has 2'): fit(1, resume)

def test_a_refused_fit_leaves_the_learner_usable(tmp_path):
    fit(1, partial(ResumeCallback, tmp_path/'a.pth'))
    with seeded(1):
        learn = Learner(fastai_dls(), Net(), nn.MSELoss(), lr=.02, cbs=[AuxOutputs(aux_loss), ResumeCallback(tmp_path/'a.pth')])
        with learn.no_bar(), learn.no_logging():
            with pytest.raises(ValueError, match='epochs 4, here 3'): learn.fit_one_cycle(3)
            (tmp_path/'a.pth').unlink(); learn.fit_one_cycle(3)
    assert len(learn.recorder.values) == 3

def test_plain_reads_back(tmp_path):
    o = dict(a=np.float64(1/3), b=[np.arange(3), (None, True, 'x')], c={1: torch.nn.Parameter(torch.ones(2))})
    torch.save(plain(o), tmp_path/'a.pt')
    back = torch.load(tmp_path/'a.pt', weights_only=True)
    assert back['a'] == 1/3 and back['b'] == [[0, 1, 2], (None, True, 'x')] and back['c'][1].equal(torch.ones(2))

def test_stale_series_is_cleared(tmp_path):
    (tmp_path/'epoch_0099.safetensors').touch(); (tmp_path/'other.safetensors').touch()
    fit(1, partial(CheckpointSeries, tmp_path, last=2), n=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['epoch_0000.safetensors', 'epoch_0001.safetensors', 'other.safetensors']
