"PBIP beyond its lessons: properties, bad folders, optional parts, runs without masks."
import json, pickle, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from medseg_nb.core import seeded
from medseg_nb.pbip.learner import SegCounts, class_scores, evaluate_pbip, pbip_learner
from medseg_nb.pbip.losses import PBIPLoss, active_pairs, info_nce
from medseg_nb.pbip.model import MERGES, PBIP, activate, add_background, as_patches, fuse_cams, merge_classes
from medseg_nb.training.callbacks import EMACallback
from fastai.data.core import DataLoaders

few = settings(max_examples=25, deadline=None)
seeds, k_lists = st.integers(0, 999), st.lists(st.integers(1, 4), min_size=1, max_size=4)

class Encoder(torch.nn.Module):
    "Anything with `encode_image` is an image encoder."
    def __init__(self):
        super().__init__()
        with seeded(0): self.body = torch.nn.Conv2d(3, 8, 4, 4)
    def encode_image(self, x): return torch.nn.functional.normalize(self.body(x).relu().mean((2, 3)) + .01, dim=1)

def make_net(names=('benign', 'tumor'), k=2, seed=0, **kw):
    with seeded(seed): return PBIP(torch.randn(k*len(names), 8), [k]*len(names), names, 'tiny', **kw)

def make_dls(n=12, masks=True, bs=4, c=2, dtype=torch.uint8):
    with seeded(1):
        x, y, m = torch.randint(0, 255, (n, 3, 32, 32)), torch.eye(c)[torch.arange(n) % c], torch.randint(0, c, (n, 32, 32))
        x = x.byte() if dtype == torch.uint8 else x.float()/255
        return DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y, m) if masks else zip(x, y)), bs=bs, num_workers=0, device=torch.device('cpu'))

def fit(learn, n=2, seed=0):
    with seeded(seed), learn.no_bar(), learn.no_logging(): learn.fit_pbip(n)
    return learn

@few
@given(k_lists, seeds)
def test_merges_are_those_of_each_class(k_list, seed):
    rng = np.random.default_rng(seed)
    m = rng.standard_normal((2, sum(k_list), 3, 2))
    got = {h: merge_classes(torch.tensor(m), k_list, h).numpy() for h in MERGES}
    ends = np.cumsum([0, *k_list])
    for c,(a,b) in enumerate(zip(ends, ends[1:])):
        part, w = m[:, a:b], np.exp(m[:, a:b])
        for h,v in dict(mean=part.mean(1), max=part.max(1), softmax=(w*part).sum(1)/w.sum(1)).items(): np.testing.assert_allclose(got[h][:, c], v, atol=1e-12)
    assert (got['mean'] <= got['softmax'] + 1e-9).all() and (got['softmax'] <= got['max'] + 1e-9).all()

@few
@given(seeds, st.integers(1, 4), st.floats(.5, 20), st.booleans())
def test_background_makes_probabilities(seed, c, power, extra):
    with seeded(seed): a = torch.rand(2, c, 4, 5)*(torch.rand(2, c, 1, 1) > .4)
    p = add_background(a, None if extra else seed % c, power)
    assert p.shape == (2, c + extra, 4, 5) and p.min() >= 0
    torch.testing.assert_close(p.sum(1), torch.ones(2, 4, 5))

@few
@given(seeds, st.sampled_from(['minmax', 'max']))
def test_fused_cams_stay_in_the_unit_interval(seed, norm):
    with seeded(seed): cams = [torch.randn(2, 3, n, n)*10 for n in (16, 8, 4, 2)]
    f = fuse_cams(cams, norm=norm, size=(11, 13))
    assert f.shape == (2, 3, 11, 13) and f.min() >= 0 and f.max() <= 1 + 1e-5
    assert activate(torch.zeros(1, 1, 2, 2), norm).max() == 0

@few
@given(seeds, st.integers(1, 5))
def test_counts_do_not_depend_on_batches(seed, parts):
    with seeded(seed): t, p = torch.randint(0, 3, (5, 6, 6)), torch.randint(0, 3, (5, 6, 6))
    t[0, 0] = 255
    one, many = SegCounts('abc'), SegCounts('abc')
    one.add(p, t)
    for a,b in zip(p.chunk(parts), t.chunk(parts)): many.add(a, b)
    a, b = one.result(), many.result()
    assert torch.equal(one.matrix, many.matrix) and a['patch_mean'] == pytest.approx(b['patch_mean']) and a['pixels'] == int((t != 255).sum())
    v = torch.stack(list(class_scores(one.matrix).values()))
    assert ((v >= 0) & (v <= 1)).all()

@few
@given(seeds)
def test_contrast_with_one_positive_is_cross_entropy(seed):
    with seeded(seed): s, k = torch.rand(6, 5)*2 - 1, torch.randint(0, 5, (6,))
    pos = torch.nn.functional.one_hot(k, 5).bool()
    torch.testing.assert_close(info_nce(s, pos, ~pos, .07), torch.nn.functional.cross_entropy(s/.07, k))

@few
@given(k_lists, seeds)
def test_pairs_are_of_present_classes(k_list, seed):
    with seeded(seed): sub, y = torch.randn(4, sum(k_list)), (torch.rand(4, len(k_list)) > .5).float()
    i, k = active_pairs(sub, y, k_list)
    own = np.repeat(np.arange(len(k_list)), k_list)
    assert all(y[a, own[b]] == 1 for a,b in zip(i.tolist(), k.tolist()))
    for b,c in ((b, c) for b in range(4) for c in range(len(k_list)) if y[b, c]): assert any(a == b and own[j] == c for a,j in zip(i.tolist(), k.tolist()))

def test_tile_network_travels():
    net = make_net(background='add', white=.9)
    tiles, x = net.tile_network(), torch.rand(2, 3, 64, 64)
    again = pickle.loads(pickle.dumps(tiles))
    assert again.classes == ['background', 'benign', 'tumor'] and torch.equal(again(x), tiles(x)) and tiles(x).shape == (2, 3, 8, 8)

def test_half_folder_and_broken_folders(tmp_path):
    net = make_net()
    net.save_pretrained(tmp_path/'m', half=True)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(PBIP.from_pretrained(tmp_path/'m').segment(x, gate=None), net.segment(x, gate=None), atol=.05, rtol=0)
    weights = (tmp_path/'m/model.safetensors').read_bytes()
    (tmp_path/'m/model.safetensors').write_bytes(weights[:1000])
    with pytest.raises(ValueError, match='not a readable safetensors'): PBIP.from_pretrained(tmp_path/'m')
    (tmp_path/'m/model.safetensors').write_bytes(weights)
    config = json.loads((tmp_path/'m/config.json').read_text())
    config['args']['backbone'] = 'mit-b0'
    (tmp_path/'m/config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='misshaped|missing'): PBIP.from_pretrained(tmp_path/'m')
    with pytest.raises(FileNotFoundError, match='config.json'): PBIP.from_pretrained(tmp_path)

def test_settings_come_back(tmp_path):
    kw = dict(strides='published', cosine='published', centred=False, merge='softmax', background='add', background_power=3., gate_thresh=.15,
              norm='max', scales=(0, 0, .5, .5), white=.9, mean=(.5, .5, .5), std=(.2, .2, .2), detach=False)
    net = make_net(**kw)
    net.save_pretrained(tmp_path)
    again, x = PBIP.from_pretrained(tmp_path), torch.rand(1, 3, 64, 64)
    assert again.args == net.args and again.names == net.names
    assert torch.equal(again.segment(x), net.segment(x)) and again.tile_network()(x).shape[-1] == 4

def test_run_without_masks_goes_by_labels(tmp_path):
    learn = fit(pbip_learner(make_dls(masks=False), make_net(), Encoder(), out=tmp_path))
    rows = learn.seg.values
    assert 'iou' not in rows[-1] and learn.seg.best == pytest.approx(-min(r['label_loss'] for r in rows))
    assert (tmp_path/'checkpoints/best/config.json').is_file()
    with pytest.raises(ValueError, match='hold no masks'): evaluate_pbip(learn.model, learn.dls.valid)

def test_validation_saves_the_average(tmp_path):
    learn = fit(pbip_learner(make_dls(), make_net(), contrast=0, out=tmp_path, every=2, cbs=[EMACallback(.9, 2)]))
    saved = PBIP.from_pretrained(tmp_path/'checkpoints/latest').state_dict()
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in saved.items())
    assert [r['step'] for r in learn.seg.values] == [2, 3, 4, 6]

def test_patches_without_any_label_train():
    dls = make_dls(n=8)
    dls.train.dataset[:] = [(x, torch.zeros(2)) for x,_ in dls.train.dataset]
    learn = fit(pbip_learner(dls, make_net(), Encoder()))
    assert all(p.isfinite().all() for p in learn.model.parameters()) and learn.seg.values[-1]['train_fg'] == 0

def test_bytes_and_floats_are_the_same_patches():
    a, b = (fit(pbip_learner(make_dls(dtype=t), make_net(), contrast=0)).seg.values for t in (torch.uint8, torch.float32))
    assert a[-1]['train_total'] == pytest.approx(b[-1]['train_total'], rel=1e-4)
    with pytest.raises(ValueError, match='uint8 or float'): as_patches(torch.zeros(1, 1, 4, 4))

@pytest.mark.parametrize('preset', ['seed', 'published'])
def test_presets_train(preset):
    learn = fit(pbip_learner(make_dls(), make_net(), Encoder(), preset))
    assert learn.recipe['preset'] == preset and np.isfinite(learn.seg.values[-1]['train_total'])

def test_encoder_stays_as_it_was():
    enc = Encoder()
    before = [p.clone() for p in enc.parameters()]
    fit(pbip_learner(make_dls(), make_net(), enc))
    assert not enc.training and all(torch.equal(a, b) and b.grad is None for a,b in zip(before, enc.parameters()))

def test_oracle_reads_labels_past_an_added_background():
    net = make_net(('tumour', 'stroma', 'necrosis'))
    with seeded(0): x, m = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])[:, None, None].expand(2, 32, 32).contiguous()
    r = evaluate_pbip(net, [(x, m)], gate='oracle')
    assert r['classes'] == ['background', 'tumour', 'stroma', 'necrosis'] and r['gate_words'].startswith('ORACLE')
    assert r['per_class_metrics']['background']['recall'] > .49 and {'tumour', 'necrosis'} <= set(r['absent'])

def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    fit(pbip_learner(make_dls(), make_net(), contrast=0, out=tmp_path, tensorboard=True))
    assert list((tmp_path/'runs').glob('events.*'))
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    with pytest.raises(ImportError, match=r'medseg_nb\[wsi\]'): fit(pbip_learner(make_dls(), make_net(), contrast=0, out=tmp_path/'b', tensorboard=True))

def test_loss_of_a_frozen_clip_is_refused_in_another_width():
    net = make_net()
    x, y = torch.rand(2, 3, 32, 32), torch.eye(2)
    class Wide(Encoder):
        def encode_image(self, x): return torch.rand(len(x), 9)
    with pytest.raises(ValueError, match='features of 9 numbers, the prototypes have 8'): PBIPLoss(Wide())(net, net(x), x, y)
