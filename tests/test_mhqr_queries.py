"Queries from dense maps that no lesson shows: noise, odd sizes, many classes, bad numbers."
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from medseg_nb.core import seeded
from medseg_nb.mhqr.queries import PAD, make_queries, query_budget, segment_entropy
from medseg_nb.sam.proposers import check_queries

quick = settings(max_examples=60, deadline=None)
seeds, sides = st.integers(0, 2**31), st.integers(1, 40)
scale_sets = st.sampled_from([(1.,), (.25, .5, 1.), (.125, .3, 2.), (.25, .5, 1, 2), (1.7,)])

def random_map(seed, c, h, w, grid=4, sharp=3.):
    with seeded(seed): z = torch.randn(1, c, min(grid, h), min(grid, w))*sharp
    return F.interpolate(z, (h, w), mode='bilinear')[0].softmax(0)

def check(q, prob, n_max, negatives, background):
    n, (c, h, w) = len(q.points), prob.shape
    assert n <= n_max and {len(o) for o in q} == {n}
    assert q.points.shape == (n, 1+negatives, 2) and q.labels.shape == (n, 1+negatives) and q.masks.shape == (n, h, w)
    assert q.masks.dtype == torch.bool and q.labels.dtype == q.classes.dtype == torch.long
    if not n: return
    check_queries((h, w), q.points, q.labels, q.boxes)
    assert not set(q.classes.tolist()) & set(background)
    win = prob.argmax(0)
    for p,l,b,k,s,m in zip(q.points.long(), q.labels, q.boxes, q.classes, q.score, q.masks):
        assert l[0] == 1 and m[p[0, 1], p[0, 0]]
        y, x = m.nonzero().T
        assert b.tolist() == [x.min(), y.min(), x.max(), y.max()]
        assert abs(float(s) - float(prob[k][m].double().mean())) < 1e-5
        for (i, j),v in zip(p[1:].tolist(), l[1:].tolist()):
            assert v in (0, PAD) and (v == PAD or not m[j, i] and win[j, i] != k)

@quick
@given(seeds, st.integers(1, 6), sides, sides, scale_sets, st.sampled_from(['distance', 'argmax']), st.integers(0, 2),
       st.sampled_from([0, .001, .05]), st.booleans())
def test_queries_keep_their_contract(seed, c, h, w, scales, peak, negatives, min_area, bg):
    prob, background = random_map(seed, c, h, w), (0,) if bg else ()
    kw = dict(scales=scales, background=background, peak=peak, negatives=negatives, min_area=min_area)
    q = make_queries(prob, **kw)
    check(q, prob, 200, negatives, background)
    for a,b in zip(q, make_queries(prob.clone(), **kw)): assert torch.equal(a, b)

@quick
@given(seeds, st.integers(2, 4), st.integers(3, 24), st.integers(3, 24))
def test_noise_is_no_trouble(seed, c, h, w):
    with seeded(seed): prob = (3*torch.randn(c, h, w)).softmax(0)
    q = make_queries(prob, min_area=0, n_max=50, negatives=1)
    check(q, prob, 50, 1, ())

@quick
@given(seeds, st.integers(2, 5), st.integers(8, 40))
def test_no_query_is_asked_twice(seed, c, side):
    q = make_queries(random_map(seed, c, side, side), scales=(.25, .5, 1.), iou=.7)
    m = q.masks.flatten(1).double()
    both = m@m.T
    iou = both/(m.sum(1)[:, None] + m.sum(1) - both).clamp(min=1)
    assert not ((iou > .7) & (q.classes[:, None] == q.classes)).fill_diagonal_(False).any()

@quick
@given(seeds, st.integers(2, 5), st.integers(4, 40), st.sampled_from([.125, .25, .5, 1.]))
def test_a_region_is_connected(seed, c, side, scale):
    "Regions found at or below scale 1 are one piece on the image too."
    for m in make_queries(random_map(seed, c, side, side), scales=(scale,), min_area=0).masks:
        assert ndimage.label(m.numpy(), np.ones((3, 3)))[1] == 1

@quick
@given(seeds, st.integers(2, 6), st.integers(8, 32))
def test_classes_may_be_renamed(seed, c, side):
    prob = random_map(seed, c, side, side+3)
    with seeded(seed): order = torch.randperm(c)
    a, b = make_queries(prob), make_queries(prob[order])
    names = lambda q, of: sorted((int(of[k]), *o.tolist()) for k,o in zip(q.classes, q.boxes))
    assert names(a, torch.arange(c)) == names(b, order)

@pytest.mark.parametrize('how', ['distance', 'argmax'])
@pytest.mark.parametrize('scale', [.125, .25, .3, .5, .9, 1, 1.3, 2])
def test_a_thin_c_is_pointed_at(how, scale):
    prob = torch.zeros(2, 64, 80)
    prob[1, 8:56, 8:72] = .9
    prob[1, 16:48, 16:] = 0
    prob[0] = 1-prob[1]
    q = make_queries(prob, (scale,), (0,), peak=how, min_area=0)
    x, y = q.points[:, 0].long().T
    assert len(q.points) and q.masks[torch.arange(len(x)), y, x].all()

def test_many_classes_none_starved():
    prob = random_map(0, 200, 96, 128, grid=24, sharp=6)
    q = make_queries(prob, n_max=200, min_area=0)
    check(q, prob, 200, 0, ())
    few = make_queries(prob, n_min=5, n_max=20)
    assert 5 <= len(few.points) <= 20 and len(few.classes.unique()) == len(few.points)

def test_a_pixel_is_a_region():
    prob = torch.zeros(2, 40, 40)
    prob[0], prob[1, 7, 9], prob[0, 7, 9] = 1, 1, 0
    assert make_queries(prob, (1.,), (0,), min_area=0).masks.nonzero().tolist() == [[0, 7, 9]]

def test_nothing_to_ask():
    for prob in (torch.ones(1, 30, 30), torch.zeros(2, 30, 30), torch.full((3, 30, 30), 1/3)):
        q = make_queries(prob, background=range(len(prob)), negatives=2)
        assert q.points.shape == (0, 3, 2) and q.boxes.shape == (0, 4) and q.masks.shape == (0, 30, 30)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_any_float(dtype):
    prob = random_map(1, 3, 32, 40)
    assert len(make_queries(prob.to(dtype)).points) == len(make_queries(prob.to(dtype).float()).points) > 0

def test_a_graph_is_not_kept():
    assert not any(o.requires_grad for o in make_queries(random_map(1, 3, 32, 40).requires_grad_()))

def test_budget_grows_with_entropy():
    n = [query_budget(e) for e in np.linspace(0, 7, 50)]
    assert n[0] == 10 and n[-1] == 200 and n == sorted(n)
    assert segment_entropy(torch.ones(1, 9, 9)) == 0

good = random_map(0, 3, 20, 20)
@pytest.mark.parametrize('prob,kw,says', [
    (good[0], {}, r'expected float maps \(C, H, W\)'), (good.numpy(), {}, 'got ndarray'), (good > .5, {}, 'torch.bool'),
    (good[:0], {}, 'expected float maps'), (good*3, {}, r'lies in \[0, 1\]'), (-good, {}, r'lies in \[0, 1\]'),
    (good/0, {}, 'lies in|NaN'), (good*torch.nan, {}, '1200 NaN'),
    (good, dict(variant='pyramide'), "Did you mean 'pyramid'"), (good, dict(peak='distanse'), "Did you mean 'distance'"),
    (good, dict(scales=()), 'scales'), (good, dict(scales=(0.,)), 'scales'), (good, dict(scales=(-1,)), 'scales'),
    (good, dict(thresholds=1.5), r'\[0, 1\)'), (good, dict(thresholds=(.1, .2)), 'for each of 3 scales'),
    (good, dict(background=(3,)), 'background class 3'), (good, dict(background=(-1,)), 'background class -1'),
    (good, dict(n_min=-1), 'n_min'), (good, dict(n_max=2.5), 'n_max'), (good, dict(n_min=9, n_max=3), 'must not exceed'),
    (good, dict(min_area=-1), 'min_area'), (good, dict(negatives=-1), 'negatives'), (good, dict(iou=float('nan')), 'iou')])
def test_bad_input_says_what_is_wrong(prob, kw, says):
    with pytest.raises(ValueError, match=says): make_queries(prob, **kw)
