"The contrastive losses over two processes, and at sizes and values that a lesson does not need."
import pytest, torch, torch.multiprocessing as mp, torch.nn as nn, torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from medseg_nb.clip.dhn_nce import gather, list_clip_losses, make_clip_loss, retrieval_topk, same_text

cases = [(n, {}) for n in list_clip_losses()] + [('dhn_nce', dict(variant='released')), ('dhn_nce', dict(beta=(.1, .5), reduction='mean'))]

class Towers(nn.Module):
    "Two towers as small as they come."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.img, self.txt = nn.Linear(5, 4).double(), nn.Linear(6, 4).double()
    def forward(self, x, t): return self.img(x), self.txt(t)

def pairs(n=8):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(n, 5, generator=g).double(), torch.randn(n, 6, generator=g).double(), torch.tensor([0, 1, 2, 1, 3, 1, 0, 4])[:n])

def step(model, part, name, kw):
    x, t, same = (o[part] for o in pairs())
    loss = make_clip_loss(name, **kw)(*model(x, t), None if kw.get('variant') == 'released' else same)
    model.zero_grad(); loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]

def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = DistributedDataParallel(Towers())
    out = dict(steps=[step(model, slice(4*rank, 4*rank+4), *c) for c in cases], order=gather(torch.tensor([[rank, 1], [rank, 2]])))
    try: gather(torch.zeros(3 + rank, 2))
    except ValueError as e: out['uneven'] = str(e)
    torch.save(out, f'{folder}/{rank}.pt')
    distributed.destroy_process_group()

def test_two_processes_are_one_batch(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path/f'{i}.pt', weights_only=True) for i in range(2))
    for c,one,two in zip(cases, a['steps'], b['steps']):
        loss, grads = step(Towers(), slice(None), *c)
        for got,g in (one, two):
            assert got == pytest.approx(loss, rel=1e-9), c
            for p,q in zip(g, grads): torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    assert a['order'].tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]] == b['order'].tolist()
    assert '[3, 4]' in a['uneven'] and '[3, 4]' in b['uneven']

@pytest.mark.parametrize('name,kw', cases)
@pytest.mark.parametrize('tau', (.005, .6))
def test_finite_where_features_coincide(name, kw, tau):
    "Equal and opposite features, in half precision too."
    x = torch.tensor([[1., 0], [1, 0], [-1, 0], [0, 1]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        img = x.to(dtype, copy=True).requires_grad_()
        loss = make_clip_loss(name, tau=tau, **kw)(img, x.flip(0).to(dtype))
        loss.backward()
        assert loss.isfinite() and loss.dtype == torch.float32 and img.grad.isfinite().all()

def test_autocast_changes_nothing():
    g = torch.Generator().manual_seed(0)
    img, txt = torch.randn(2, 16, 32, generator=g)
    loss = make_clip_loss('dhn_nce')
    with torch.autocast('cpu', torch.bfloat16): inside = loss(img, txt)
    assert inside == loss(img, txt)

def test_training_pulls_pairs_together():
    g = torch.Generator().manual_seed(0)
    img, txt = torch.randn(2, 12, 8, generator=g)
    img.requires_grad_()
    opt = torch.optim.Adam([img], .05)
    for _ in range(150): loss = make_clip_loss('dhn_nce', tau=.1)(img, txt); opt.zero_grad(); loss.backward(); opt.step()
    assert retrieval_topk(F.normalize(img.detach(), dim=1), F.normalize(txt, dim=1), k=[1]) == {'i2t@1': 1, 't2i@1': 1}

def test_same_text_is_stable():
    assert same_text(['Left lung', ' left   LUNG ', 'right lung']).tolist() == [same_text(['left lung'])[0].item()]*2 + [same_text(['right lung'])[0].item()]
    assert len(set(same_text([str(i) for i in range(20000)]).tolist())) == 20000
