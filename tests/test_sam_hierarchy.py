"Hierarchies of masks by proposers that no lesson shows: any number of masks, any scales, any chunk, bad input."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from medseg_nb.core import seeded
from medseg_nb.sam.hierarchy import HierarchicalMasks, WalkerPyramid, coarse_to_fine, segment_with_points_hierarchical
from medseg_nb.sam.proposers import MaskProposer, RandomWalkerProposer, check_proposer

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
scale_sets = st.lists(st.sampled_from([.1, .25, .3, .5, 1, 1.5]), min_size=1, max_size=4, unique=True)

class Boxes(MaskProposer):
    "Rectangles around the first point, the sides and scores hashed from its place; counts what it is asked."
    prompts = 'points', 'boxes', 'mask_prompt'
    def __init__(self, m=3): self.m, self.encoded, self.asked = m, 0, []
    def _encode(self, x): self.encoded += 1; return x
    def _propose(self, q, multimask):
        self.asked.append(q)
        n, m, (h, w) = len(q.points), self.m if multimask else 1, self.size
        p = q.points[:, 0] if q.points.shape[1] else q.boxes[:, :2] if q.boxes is not None else torch.ones(n, 2)
        key = (p[:, :1]*7 + p[:, 1:]*13 + torch.arange(m)*5)
        half = (key % 6)[:, :, None, None]
        y, x = torch.arange(h)[:, None], torch.arange(w)
        cx, cy = p.T[:, :, None, None, None]
        return (((x-cx).abs() <= half) & ((y-cy).abs() <= half)).float()*.9, (key*3 % 11)/11

def points(seed, q, h=20, w=30):
    with seeded(seed): return (torch.rand(q, 1, 2)*torch.tensor([w-1., h-1.])).round()

def same(a, b, tol=1e-6):
    for x,y in zip(a[:3], b[:3]):
        assert list(x) == list(y)
        for s in x: assert x[s].shape == y[s].shape and torch.allclose(x[s], y[s], atol=tol)

@quick
@given(seeds, st.integers(1, 9), st.integers(1, 5), scale_sets)
def test_areas_fall_from_coarse_to_fine(seed, q, m, scales):
    out = segment_with_points_hierarchical(Boxes(m), torch.rand(3, 20, 30), points(seed, q), output_scales=scales)
    assert isinstance(out, HierarchicalMasks) and list(out.masks) == list(out.scores) == list(out.areas) == scales
    areas = torch.stack([out.areas[s] for s in sorted(scales)])
    assert (areas.diff(dim=0) <= 0).all()
    for s,o in out.masks.items():
        assert o.shape == (q, max(1, round(20*s)), max(1, round(30*s))) and o.min() >= 0 and o.max() <= 1
    if len(scales) > 1:
        every = (Boxes(m).set_image(torch.rand(3, 20, 30)).masks(points(seed, q)).prob > .5).sum((2, 3))
        assert (areas[0] == every.amax(1)).all() and (areas[-1] == every.amin(1)).all()

@quick
@given(seeds, st.integers(1, 12), st.integers(1, 14), st.sampled_from(['area', 'score', 'index']))
def test_a_chunk_changes_nothing(seed, q, chunk, by):
    image, at = torch.rand(3, 20, 30), points(seed, q)
    a, b = (segment_with_points_hierarchical(Boxes(), image, at, by=by, chunk=c, best=True) for c in (chunk, 1))
    same(a, b); assert torch.equal(a.best, b.best)
    p = Boxes(); segment_with_points_hierarchical(p, image, at, by=by, chunk=chunk)
    assert p.encoded == 1 and max(len(o.points) for o in p.asked) <= chunk and sum(len(o.points) for o in p.asked) == q

@quick
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_order_by_every_rule(seed, q, m, n):
    with seeded(seed): area, score = torch.randint(0, 5, (q, m)).float(), torch.rand(q, m)
    for by in ('area', 'score', 'index'):
        at = coarse_to_fine(area, score, n, by)
        assert at.shape == (q, n)
        if n == 1: assert (at[:, 0] == score.argmax(1)).all(); continue
        if by == 'area': assert (area.gather(1, at).diff(dim=1) <= 0).all()
        if by == 'score': assert (score.gather(1, at).diff(dim=1) >= 0).all()
        if by == 'index': assert (at.diff(dim=1) >= 0).all()
        if m >= n: assert all(len(set(o)) == n for o in at.tolist())
        if m <= n: assert all(set(o) == set(range(m)) for o in at.tolist())

def test_scores_belong_to_their_masks():
    image, at = torch.rand(3, 20, 30), points(0, 8)
    ref = Boxes().set_image(image).masks(at)
    for by in ('area', 'score', 'index'):
        out = segment_with_points_hierarchical(Boxes(), image, at, by=by, output_scales=(.5, .9, 1))
        for i in range(8):
            pairs = {(round(s.item(), 4), int((m > .5).sum())) for s,m in zip(ref.score[i], ref.prob[i])}
            assert {(round(out.scores[s][i].item(), 4), int(out.areas[s][i])) for s in out.areas} == pairs
            assert int((out.masks[1][i] > .5).sum()) == out.areas[1][i]

def test_every_kind_of_prompt_arrives():
    p, q = Boxes(), 7
    at, rough = points(1, q), torch.randn(q, 9, 5)
    tags, boxes = torch.tensor([[1]]*q), torch.cat((at[:, 0]-2, at[:, 0]+2), 1).clamp(min=0)
    segment_with_points_hierarchical(p, torch.rand(3, 20, 30), at, tags, boxes.clamp(max=19), rough, chunk=3)
    assert [len(o.points) for o in p.asked] == [3, 3, 1]
    joined = [torch.cat([getattr(o, n) for o in p.asked]) for n in ('points', 'labels', 'boxes', 'mask_prompt')]
    for got,want in zip(joined, (at, tags, boxes.clamp(max=19), rough)): assert torch.equal(got, want)
    p.asked.clear()
    segment_with_points_hierarchical(p, None, boxes=boxes.clamp(max=19))
    assert p.encoded == 1 and p.asked[0].mask_prompt is None and p.asked[0].points.shape == (q, 0, 2)

@pytest.mark.parametrize('kw', [dict(points=torch.zeros(0, 2, 2)), dict(boxes=torch.zeros(0, 4)), dict(mask_prompt=torch.zeros(0, 4, 4))])
def test_no_query_costs_nothing(kw):
    p = Boxes()
    out = segment_with_points_hierarchical(p, torch.rand(3, 20, 30), best=True, **kw)
    assert not p.asked and {s: tuple(o.shape) for s,o in out.masks.items()} == {.25: (0, 5, 8), .5: (0, 10, 15), 1: (0, 20, 30)}
    assert out.best.shape == (0, 20, 30) and all(o.shape == (0,) for o in out.scores.values())

def test_an_error_comes_before_the_image_is_encoded():
    p = Boxes()
    for kw in (dict(points=[[[50., 5]]]), dict(points=[[[5., 5]]], by='size'), dict(points=[[[5., 5]]], output_scales=()), dict()):
        with pytest.raises(ValueError): segment_with_points_hierarchical(p, torch.rand(3, 20, 30), **kw)
    assert not p.encoded and p.size is None

@pytest.mark.parametrize('kw,msg', [
    (dict(output_scales=(0, 1)), 'above 0'), (dict(output_scales=(1, 1.)), 'different'), (dict(output_scales=('1',)), 'numbers'),
    (dict(output_scales=(float('inf'),)), 'above 0'), (dict(chunk=2.5), 'chunk'), (dict(chunk=True), 'chunk'), (dict(by=None), 'by'),
    (dict(labels=[[0]]), 'asks for nothing'), (dict(boxes=torch.zeros(2, 4)), 'as many queries')])
def test_bad_arguments(kw, msg):
    with pytest.raises(ValueError, match=msg): segment_with_points_hierarchical(Boxes(), torch.rand(3, 20, 30), [[[5., 5]]], **kw)

@pytest.mark.parametrize('kw', [dict(windows=()), dict(windows=(0,)), dict(windows=(1.2,)), dict(windows=('1',)), dict(disc=-1),
                                dict(side=3)])
def test_bad_pyramids(kw):
    with pytest.raises(ValueError): WalkerPyramid(**kw)

@pytest.mark.parametrize('shape', [(3, 2, 2), (3, 5, 90), (3, 33, 3), (3, 40, 60)])
def test_the_pyramid_keeps_the_contract(shape): check_proposer(WalkerPyramid(side=32), torch.rand(shape))

def test_the_pyramid_answers_boxes_as_the_walker_does():
    image = torch.rand(3, 30, 40)
    ask = dict(boxes=[[5, 5, 25, 20]]), dict(mask_prompt=torch.randn(1, 8, 8)*4), dict(boxes=[[5, 5, 25, 20]], points=[[[9, 9]]])
    a, b = WalkerPyramid(side=24).set_image(image), RandomWalkerProposer(side=24).set_image(image)
    for kw in ask: assert torch.equal(a.masks(**kw).prob, b.masks(**kw).prob)

@quick
@given(seeds)
def test_windows_bound_the_masks_and_hold_the_points(seed):
    with seeded(seed): image, at = torch.rand(3, 40, 60), (torch.rand(2, 3, 2)*torch.tensor([59., 39])).round()
    tags = torch.tensor([[1, 1, 0], [1, 0, -10]])
    p = WalkerPyramid(windows=(.25,), side=32).set_image(image)
    mask = p.masks(at, tags).prob[:, 0] > .5
    for m,xy,t in zip(mask, at.long(), tags):
        on = xy[t == 1]
        y, x = m.nonzero().T
        slack = torch.tensor([60, 40])*.125 + 2
        lo, hi = on.float().mean(0) - slack, on.float().mean(0) + slack
        lo, hi = torch.minimum(lo, on.amin(0)-1), torch.maximum(hi, on.amax(0)+1)
        if len(x): assert x.min() >= lo[0] and x.max() <= hi[0] and y.min() >= lo[1] and y.max() <= hi[1]
