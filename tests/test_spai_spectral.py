"Patches of any image, the spectral split, the detector's bad input, and its files."
import json, sys, types
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from medseg_nb.core import seeded
from medseg_nb.io import read_image
from medseg_nb.spai.checkpoint import load_detector, load_released, released_keys, save_detector
from medseg_nb.spai.patches import as_pixels, cut_patches, paint, patch_grid
from medseg_nb.spai.spectral import SpectralDetector, SpectralSplit, band_mask, full_config, split_literal, tiny_config

sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
grids = st.builds(lambda size, patch, part, published: patch_grid(size, patch, max(1, round(patch*part)), published),
                  sizes, st.integers(1, 40), st.floats(.2, 1), st.booleans())
few = settings(max_examples=60, deadline=None)

def pixels_of(g, i):
    "Pixels of the image that patch `i` lies on."
    (x0, y0, x1, y1), (l, t, _, _) = g.boxes[i].tolist(), g.pad
    m = torch.zeros(g.size, dtype=torch.bool)
    m[max(y0-t, 0):max(y1-t, 0), max(x0-l, 0):max(x1-l, 0)] = True
    return m

def detector(**kwargs):
    with seeded(0):
        return SpectralDetector(**{**dict(patch=32, vit=dict(patch_size=8, embed_dim=24, depth=2, num_heads=2), proj_dim=16, heads=2, head_dim=8,
                                          mlp_ratio=2, radius=4), **kwargs}).eval()

@few
@given(sizes, st.integers(1, 40), st.floats(.2, 1))
def test_every_pixel_is_in_a_patch(size, patch, part):
    g = patch_grid(size, patch, max(1, round(patch*part)))
    assert torch.stack([pixels_of(g, i) for i in range(len(g))]).any(0).all()
    assert (g.boxes[:, 2:] - g.boxes[:, :2] == patch).all() and (g.boxes >= 0).all()
    assert g.boxes[:, 2].max() == size[1] + g.pad[0] + g.pad[2] and g.boxes[:, 3].max() == size[0] + g.pad[1] + g.pad[3]

@few
@given(grids)
def test_patches_are_the_image_where_it_is(g):
    with seeded(0): x = torch.rand(3, *g.size)
    p = cut_patches(x, g)
    assert p.shape == (len(g), 3, g.patch, g.patch)
    l, t, r, b = g.pad
    padded = torch.tensor(np.pad(x.numpy(), ((0, 0), (t, b), (l, r)), 'reflect'))
    for o,(x0, y0, x1, y1) in zip(p, g.boxes.tolist()): assert torch.equal(o, padded[:, y0:y1, x0:x1])

@few
@given(grids, st.data(), st.sampled_from(['max', 'mean']))
def test_one_patch_is_painted_over_its_pixels_only(g, data, how):
    i = data.draw(st.integers(0, len(g)-1))
    w = torch.zeros(2, len(g)); w[1, i] = .7
    out = paint(w, g, how)
    assert out.shape == (2, *g.size) and not out[0].any()
    assert torch.equal(out[1] != 0, pixels_of(g, i))
    if how == 'max': assert torch.equal(out[1], .7*pixels_of(g, i))

@few
@given(st.integers(2, 40), st.floats(.5, 30), st.booleans(), st.integers(0, 99))
def test_fast_split_is_the_literal_one(side, radius, published, seed):
    if published: side += side % 2
    with seeded(seed): x = torch.rand(2, 3, side, side, dtype=torch.float64)
    low, high = SpectralSplit(side, radius, published).double()(x)
    for a,b in zip((low, high), split_literal(x, band_mask(side, radius, not published).double())): assert (a-b).abs().max() < 1e-10
    assert (low + high - x).abs().max() < 1e-12
    if not published: assert abs((low**2).sum() + (high**2).sum() - (x**2).sum()) < 1e-9*(x**2).sum()

@pytest.mark.parametrize('size', [(223, 500), (224, 224), (1000, 1500), (1, 1), (3, 700)])
def test_any_size(size):
    net = detector(patch=64)
    with seeded(0): x = torch.rand(3, *size)
    with torch.no_grad(): one, both = net([x]), net([x, torch.rand(3, 50, 200)])
    assert one.shape == (1,) and torch.isfinite(one).all() and abs(both[0] - one[0]) < 1e-5
    [e] = net.explain([x])
    assert e.map().shape == size and abs(e.logit - one.item()) < 1e-5 and torch.allclose(e.attention.sum(1), torch.ones(2))

@pytest.mark.parametrize('kind', ['grey', 'rgb', 'rgba', 'deep'])
def test_any_file(tmp_path, kind):
    g = (np.arange(223*500).reshape(223, 500) % 251).astype(np.uint8)
    a = dict(grey=g, rgb=np.dstack([g]*3), rgba=np.dstack([g]*3 + [np.full_like(g, 255)]), deep=g.astype(np.uint16)*257)[kind]
    Image.fromarray(a).save(tmp_path/'a.png')
    x = as_pixels(read_image(tmp_path/'a.png'))
    assert x.shape == (3, 223, 500) and (x - torch.tensor(g/255.).float()).abs().max() < 1e-6
    with torch.no_grad(): assert abs(detector()([read_image(tmp_path/'a.png')]) - detector()([x])) < 1e-6

@pytest.mark.parametrize('bad,message', [
    ([], 'no image'), (torch.rand(3, 40, 40), 'expected a list of images'), ('a.png', 'expected a list of images'), (['a.png'], 'read_image'),
    ([torch.rand(40, 40)], r'image 0: expected \(3, H, W\)'), ([torch.rand(3, 0, 40)], r'\(3, 0, 40\)'),
    ([torch.rand(3, 40, 40), 9*torch.rand(3, 40, 40)], 'image 1: expected values in'), ([torch.full((3, 40, 40), float('nan'))], '4800 NaN'),
    ([torch.full((3, 40, 40), float('-inf'))], 'infinite'), (np.zeros((40, 40)), 'expected a list'), ([np.full((40, 40), 3.)], 'must lie in'),
    (torch.rand(1, 2, 3, 16, 16), 'expected float patches'), (torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8), 'uint8'),
    (torch.rand(0, 2, 3, 32, 32), 'expected float patches'), (torch.full((1, 1, 3, 32, 32), float('nan')), 'patches has 3072 NaN')])
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message): detector()(bad)

@pytest.mark.parametrize('args,message', [(dict(patch=0), 'at least 1, got 0'), (dict(patch=36), 'take a multiple'), (dict(patch=8), 'at least 16'),
                                          (dict(patch=32.), 'integer'), (dict(heads=0), 'heads'), (dict(chunk=0), 'chunk'), (dict(radius=0), 'radius')])
def test_bad_sizes_are_named(args, message):
    with pytest.raises(ValueError, match=message): detector(**args)

def test_a_uint8_image_is_scaled():
    x = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    with torch.no_grad(): assert torch.equal(detector()([x]), detector()([x/255.]))

def test_chunks_and_order_do_not_matter():
    with seeded(1): x = torch.rand(3, 100, 130)
    with torch.no_grad(): a, b = detector()([x]), detector(chunk=1)([x])
    assert abs(a - b) < 1e-5
    net = detector()
    with seeded(2): z = torch.randn(1, 9, net.dim)
    with torch.no_grad(): assert torch.allclose(net.pool(z)[0], net.pool(z.flip(1))[0], atol=1e-5)

def test_explain_in_training_has_no_dropout():
    net = detector().train()
    x = torch.rand(3, 70, 70)
    assert net.explain([x])[0].logit == net.explain([x])[0].logit and net.training

def test_parameters_of_the_published_size():
    with torch.device('meta'): net = SpectralDetector(**full_config())
    assert sum(p.numel() for p in net.trainable()) == 46_829_593
    assert sum(p.numel() for p in net.vit.parameters()) == 85_798_656 - 2*768

def test_tiny_is_small():
    net = SpectralDetector(**tiny_config())
    assert sum(p.numel() for p in net.parameters()) < 2e6 and net.config['radius'] == 9

def released(net):
    "The weights of `net` in the published layout."
    state, out = net.state_dict(), {}
    for k,names in released_keys(net).items():
        if isinstance(names, str): out[names] = state[k]
        else: out |= {n: (w.T if w.shape[0] > 1 else w[0]) for n,w in zip(names, state[k])}
    e = net.estimator
    out['mfvit.features_processor.original_features_processor.alpha'] = e.context.alpha.data[None]
    out['patch_aggregator'] = net.attention.query.data[:, None]
    return out | {'mfvit.frequencies_mask': band_mask(net.patch, net.config['radius'], centered=False), 'mfvit.vit.norm.weight': torch.ones(24)}

def test_released_file_with_its_settings(tmp_path, monkeypatch):
    "Settings of a class that is not installed are read as a dict; the weights arrive where they belong."
    cfg = type('CfgNode', (dict,), dict(__module__='yacs.config', __init__=lambda self, **kw: (dict.__init__(self, **kw), vars(self).update(immutable=True))[0]))
    for n in ('yacs', 'yacs.config'): monkeypatch.setitem(sys.modules, n, types.ModuleType(n))
    sys.modules['yacs.config'].CfgNode = cfg
    net, other = detector(published=True), detector(published=True)
    torch.save(dict(model=released(net), epoch=34, config=cfg(MODEL=cfg(NAME='x'))), tmp_path/'a.pth')
    for p in other.parameters(): p.data += 1
    x = torch.rand(3, 80, 100)
    with torch.no_grad(): assert torch.equal(load_released(tmp_path/'a.pth', other)([x]), net([x]))

def test_released_file_with_code_is_refused(tmp_path):
    torch.save(dict(model=released(detector(published=True)), hook=types.SimpleNamespace(a=1)), tmp_path/'a.pth')
    with pytest.raises(ValueError, match='nothing is unpickled'): load_released(tmp_path/'a.pth', detector(published=True))

def test_folder_is_whole_and_fetches_nothing(tmp_path):
    save_detector(detector(), tmp_path/'m', threshold=.3)
    config = json.loads((tmp_path/'m/config.json').read_text())
    assert config['cls'] == 'SpectralDetector' and config['threshold'] == .3 and set(config) == {'cls', 'version', 'args', 'threshold'}
    assert load_detector(tmp_path/'m').info == dict(threshold=.3)
    for extra in (dict(pretrained=True), dict(checkpoint_path='x.pth'), dict(model='hf-hub:a/b'), dict(pretrained_cfg=dict(file='x'))):
        bad = {**config, 'args': {**config['args'], 'vit': {**config['args']['vit'], **extra}}}
        (tmp_path/'m/config.json').write_text(json.dumps(bad))
        with pytest.raises(ValueError, match='made from its sizes only'): load_detector(tmp_path/'m')
    for bad,message in (({**config, 'cls': 'ClipEncoder'}, 'holds a ClipEncoder'), ({**config, 'args': None}, 'lacks args'),
                        ({**config, 'args': {**config['args'], 'wings': 2}}, 'wings'), ({**config, 'args': {**config['args'], 'proj_dim': 8}}, 'misshaped')):
        (tmp_path/'m/config.json').write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message): load_detector(tmp_path/'m')
