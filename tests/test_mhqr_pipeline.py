"MHQR as a whole: rejection is exact, repeats are equal, odd maps do not crash, SAM 2 of full size runs through it."
import numpy as np, pytest, torch, torch.nn.functional as F
from medseg_nb.clip.sclip import DensePrediction
from medseg_nb.mhqr.pipeline import MHQR, box_masks, compose, whole_classes, widen
from medseg_nb.sam.proposers import MaskProposer
from medseg_nb.segment import check_segmenter
from medseg_nb.dense_segment import DenseSegmenter, load_dense, save_labels

def predictor(prob, dim=0):
    "A dense predictor that always says `prob`."
    c = len(prob)
    g = torch.Generator().manual_seed(0)
    f = F.normalize(torch.randn(dim, 6, 7, generator=g), dim=0) if dim else None
    t = F.normalize(torch.randn(c, dim, generator=g), dim=1) if dim else None
    return lambda image, names: DensePrediction(prob, f, t, list(names), ())

def random_map(c, h, w, seed=0, sharp=3.):
    g = torch.Generator().manual_seed(seed)
    return F.interpolate((torch.randn(1, c, 7, 7, generator=g)*sharp).softmax(1), (h, w), mode='bilinear')[0]

class Fixed(MaskProposer):
    "Answers every query with one mask."
    def __init__(self, mask): self.mask = mask
    def _encode(self, x): return x
    def _propose(self, q, multimask):
        m = 3 if multimask else 1
        return self.mask.float().expand(len(q.points), m, *self.size).clone(), torch.ones(len(q.points), m)

x = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(1))
ON = [dict(), dict(queries=True), dict(queries=True, decoder=True, merger=True), dict(context=False, queries=True, multimask=True, decoder=True)]

@pytest.mark.parametrize('kw', ON)
@pytest.mark.parametrize('dim', [0, 16])
def test_rejected_masks_leave_the_dense_map(kw, dim):
    p, corner = random_map(4, 60, 80), torch.zeros(60, 80)
    corner[0, 0] = 1
    for proposer,more in ((Fixed(corner), {}), ('prior-walker', dict(min_score=2.)), ('random-walker', dict(min_score=2.))):
        r = MHQR(predictor(p, dim), proposer, **kw, **more)(x, list('abcd'))
        assert torch.equal(r.prob, p) and not r.accepted.any()

@pytest.mark.parametrize('kw', ON + [dict(proposer=None), dict(proposer=None, decoder=True, merger=True, queries=True), dict(crf=True), dict(rounds=3)])
def test_same_input_same_output(kw):
    p, memo = random_map(5, 60, 80, 2), {}
    one, two = (MHQR(predictor(p, 8), **kw)(x, list('abcde'), memo if i else None) for i in (0, 1))
    assert torch.equal(one.prob, two.prob) and torch.equal(MHQR(predictor(p, 8), **kw)(x, list('abcde'), memo).prob, one.prob)
    assert one.prob.isfinite().all() and torch.allclose(one.prob.sum(0), torch.ones(60, 80), atol=1e-4)

@pytest.mark.parametrize('kw', [dict(queries=True), dict(queries=True, proposer='random-walker', decoder=True, merger=True, scales=(.125, 1.))])
@pytest.mark.parametrize('what', ['constant', 'one class', 'many classes', 'one pixel', 'certain'])
def test_odd_maps(kw, what):
    c = dict(constant=3, **{'one class': 1, 'many classes': 200}).get(what, 2)
    p = torch.full((c, 60, 80), 1/c)
    if what == 'many classes': p = random_map(200, 60, 80, 3, 8.)
    if what == 'one pixel': p = torch.stack([torch.full((60, 80), .95), torch.full((60, 80), .05)]); p[:, 30, 40] = torch.tensor([.1, .9])
    if what == 'certain': p = torch.zeros(2, 60, 80); p[0, :, :40], p[1, :, 40:] = 1, 1
    r = MHQR(predictor(p/p.sum(0)), n_max=20, **kw)(x, [f'c{i}' for i in range(c)])
    assert r.prob.isfinite().all() and tuple(r.labels.shape) == (60, 80)

def test_nothing_is_asked_of_background():
    p = torch.zeros(2, 60, 80)
    p[0] = 1
    back = lambda image, names: DensePrediction(p, None, None, list(names), (0,))
    for q in (True, False):
        r = MHQR(back, queries=q, skip_background=True)(x, ['background', 'a'])
        assert torch.equal(r.prob, p) and not len(r.queries.classes)

def test_compose_is_local():
    p, g = random_map(3, 20, 30), torch.Generator().manual_seed(0)
    for _ in range(20):
        b = torch.randint(0, 15, (3, 2), generator=g)
        inside = box_masks(torch.cat((b, b + torch.randint(1, 8, (3, 2), generator=g)), 1).float(), (20, 30))
        out = compose(p, torch.rand(3, 20, 30, generator=g), torch.randint(3, (3,), generator=g), inside)
        away = ~inside.any(0)
        assert torch.equal(out[:, away], p[:, away]) and torch.allclose(out.sum(0), torch.ones(20, 30), atol=1e-5)

def test_boxes_stay_inside():
    w = widen(torch.tensor([[0., 0, 79, 59], [10, 20, 10, 20]]), .5, (60, 80))
    assert (w[:, :2] >= 0).all() and (w[:, 2] <= 79).all() and (w[:, 3] <= 59).all()
    q = whole_classes(random_map(3, 20, 30))
    assert all(q.masks[i][int(y), int(a)] for i,(a, y) in enumerate(q.points[:, 0].tolist()))

@pytest.mark.parametrize('bad,says', [(dict(scales=()), 'scale'), (dict(accept=-1), 'accept'), (dict(rounds=0), 'rounds'), (dict(chunk=0), 'chunk'),
                                      (dict(options=dict(decoder=dict(variant='shrap'))), 'sharp'), (dict(proposer=3), 'MaskProposer')])
def test_bad_settings(bad, says):
    with pytest.raises(ValueError, match=says): MHQR(predictor(random_map(2, 60, 80), 8), **{**dict(queries=True, decoder=True), **bad})(x, ['a', 'b'])

def test_bad_images():
    mhqr = MHQR(predictor(random_map(2, 60, 80)))
    with pytest.raises(ValueError, match=r'\[0, 1\]'): mhqr(x*9, ['a', 'b'])
    with pytest.raises(ValueError, match='NaN'): mhqr(torch.full((3, 60, 80), float('nan')), ['a', 'b'])

def test_a_segmenter_like_the_others(tmp_path):
    s = DenseSegmenter(load_dense('tiny'))
    seg, = check_segmenter(s, x, ['left lung', 'optic disc'])
    assert not (seg.mask()[0] & seg.mask()[1]).any()
    with pytest.raises(ValueError, match='no boxes'): s(x, ['a'], boxes=[[[0, 0, 5, 5]]])
    with pytest.raises(ValueError, match='empty prompt'): s(x, [' '])
    row = save_labels(load_dense('tiny')(x, ['left lung', 'background']), x, tmp_path, 'a', (1,))
    assert (tmp_path/row['labels']).exists() and abs(sum(row['area_fraction']) - 1) < 1e-5

@pytest.mark.slow
def test_sam2_of_full_size():
    "SAM 2.1 hiera-tiny with random weights, 64 queries."
    from transformers import Sam2Config, Sam2Model
    from medseg_nb.sam.pretrained import Sam2Proposer
    sam = Sam2Proposer(Sam2Model(Sam2Config()), chunk=8, device='cpu')
    image = torch.rand(3, 240, 320, generator=torch.Generator().manual_seed(0))
    p = random_map(6, 240, 320, 4, 4.)
    r = MHQR(predictor(p, 32), sam, n_min=64, n_max=64, multimask=True, decoder=True, merger=True, rounds=1, accept=0., options=dict(queries=dict(min_area=0)))(image, list('abcdef'))
    assert len(r.queries.classes) == 64 and r.accepted.all() and torch.allclose(r.prob.sum(0), torch.ones(240, 320), atol=1e-4)
