"Regions, prompts and proposers on inputs that no lesson shows: random masks, odd sizes, bad numbers."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from skimage.measure import label, regionprops
from medseg_nb.core import MedImage, seeded
from medseg_nb.postprocess import PostProcess
from medseg_nb.regions import PAD, find_regions, kmeans, recentre, region_prompts
from medseg_nb.sam.proposers import MaskProposer, Proposals, RandomWalkerProposer, check_proposer, check_queries, saliency_to_mask

quick = settings(max_examples=40, deadline=None)
seeds, sides = st.integers(0, 2**31), st.integers(1, 24)

def random_masks(seed, p, h, w):
    with seeded(seed): return torch.rand(p, h, w) < torch.rand(p, 1, 1)

@quick
@given(seeds, st.integers(2, 4), st.integers(2, 8))
def test_kmeans_is_the_best_partition(seed, k, n):
    "No other cut of a few distinct values scatters less."
    with seeded(seed): x = (torch.randint(0, 9, (n, 6))/8.).double()
    values = np.unique(x)
    def scatter(cuts):
        part = np.searchsorted(np.asarray(cuts), x.numpy().ravel(), side='left')
        return sum(((v := x.numpy().ravel()[part == j]) - v.mean()).__pow__(2).sum() for j in np.unique(part))
    cuts = kmeans(x, k)
    assert cuts.shape == (k-1,) and (cuts.diff() >= 0).all()
    middle = (values[1:] + values[:-1])/2
    grids = np.stack(np.meshgrid(*[middle]*(k-1)), -1).reshape(-1, k-1) if len(middle) else np.zeros((1, k-1))
    best = min(scatter(np.sort(g)) for g in grids)
    assert scatter(cuts) <= best + 2e-3*x.numel()

@quick
@given(seeds, st.integers(1, 3), sides, sides, st.sampled_from(['map', 'component']), st.sampled_from(['interior', 'random']),
       st.integers(0, 5))
def test_prompts_belong_to_their_regions(seed, p, h, w, per, points, n):
    masks = random_masks(seed, p, h, w)
    o = region_prompts(masks, per=per, points=points, n=n, negatives=2, gap=1)
    assert len({len(t) for t in o}) == 1 and (o.index.diff() >= 0).all()
    parts = [label(m.numpy(), connectivity=2) for m in masks]
    assert len(o.index) == (sum(m.any().item() for m in masks) if per == 'map' else sum(int(l.max()) for l in parts))
    for box,xy,lab,i in zip(*o):
        on, off = (xy[lab == v].long() for v in (1, 0))
        assert len(on) <= n and masks[i, on[:, 1], on[:, 0]].all() and not masks[i, off[:, 1], off[:, 0]].any()
        assert ((xy[lab == 1] >= box[:2]) & (xy[lab == 1] <= box[2:])).all()
        assert len({tuple(v) for v in on.tolist()}) == len(on) and set(lab.tolist()) <= {0, 1, PAD}
        if per == 'map':
            y, x = masks[i].nonzero().T
            assert box.tolist() == [x.min(), y.min(), x.max(), y.max()]
    if per == 'component':
        boxes = ((i, q.bbox) for i,l in enumerate(parts) for q in regionprops(l))
        want = sorted((i, float(x0), float(y0), x1-1., y1-1.) for i,(y0, x0, y1, x1) in boxes)
        assert sorted((i, *b) for i,b in zip(o.index.tolist(), o.boxes.tolist())) == want

@quick
@given(seeds, sides, sides)
def test_a_map_has_its_prompts_whatever_is_beside_it(seed, h, w):
    masks = random_masks(seed, 3, h, w)
    together = region_prompts(masks, points='random', n=3, negatives=2, seed=1)
    for i,m in enumerate(masks):
        alone, mine = region_prompts(m, points='random', n=3, negatives=2, seed=1), together.index == i
        assert torch.equal(alone.boxes, together.boxes[mine])
        for v in (0, 1): assert alone.points[alone.labels == v].tolist() == together.points[mine][together.labels[mine] == v].tolist()

@quick
@given(seeds, st.integers(1, 3), sides, sides, st.sampled_from(['otsu', 'kmeans', .4]), st.sampled_from([None, 1, 2]))
def test_find_regions_takes_any_map(seed, p, h, w, how, keep):
    with seeded(seed): maps = torch.rand(p, h, w)*torch.rand(p, 1, 1)
    maps[0] = maps[0, 0, 0]
    prob = find_regions(maps, how=how, post=PostProcess(keep=keep))
    assert prob.shape == maps.shape and prob.isfinite().all() and 0 <= prob.min() and prob.max() <= 1
    for m in prob > .5: assert keep is None or ndimage.label(m.numpy(), np.ones((3, 3)))[1] <= keep
    assert torch.equal(find_regions(maps[-1], how=how, post=PostProcess(keep=keep)), prob[-1])

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_recentre_keeps_the_cut(dtype):
    with seeded(0): s = torch.rand(3, 40, 40).to(dtype)
    for t in (0., .2, .5, .999): assert torch.equal(recentre(s, t) > .5, s.double() > t)

def walker(h=40, w=50, **kw):
    with seeded(0): return RandomWalkerProposer(**kw).set_image(torch.rand(3, h, w))

@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 60), st.integers(2, 60), st.integers(8, 40))
def test_walker_answers_any_query(seed, h, w, side):
    with seeded(seed):
        p = RandomWalkerProposer(side=side).set_image(torch.rand(3, h, w))
        a, b = torch.rand(2, 3, 2)*torch.tensor([w-1., h-1.])
        boxes = torch.cat((a.minimum(b), a.maximum(b)), 1)
        logits = torch.randn(3, 5, 5)*4 + 1
        logits[:, 0, 0] = 1
    for kw in (dict(boxes=boxes), dict(points=torch.stack((a, b), 1), labels=[[1, 0]]*3), dict(points=a[:, None], boxes=boxes),
               dict(mask_prompt=logits), dict(boxes=boxes, mask_prompt=logits, points=b[:, None], labels=[[0]]*3)):
        o = p.masks(**kw)
        assert o.prob.shape == (3, 3, h, w) and o.prob.isfinite().all() and 0 <= o.prob.min() and o.prob.max() <= 1
        assert (o.score.diff(dim=1) <= 0).all()
        if 'boxes' in kw:
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
            x0, y0, x1, y1 = boxes.T[:, :, None, None]
            out = (x < x0-.5) | (x > x1+.5) | (y < y0-.5) | (y > y1+.5)
            assert not o.prob[out[:, None].expand_as(o.prob)].any()

def test_walker_does_not_see_contrast_or_brightness():
    with seeded(1): x = torch.rand(3, 40, 50)
    a, b = (RandomWalkerProposer().set_image(o).masks(boxes=[[5, 5, 30, 30]]) for o in (x, x*.1 + .7))
    assert (a.prob - b.prob).abs().max() < 1e-2

def test_contract_holds_at_odd_sizes():
    for shape in ((3, 2, 3), (3, 300, 7), (1, 33, 44)): check_proposer(RandomWalkerProposer(side=16), torch.rand(shape))

def test_a_refused_image_leaves_the_last_one():
    p = walker()
    before = p.masks(boxes=[[5, 5, 20, 20]]).prob
    with pytest.raises(ValueError): p.set_image(torch.rand(3, 20, 20)*9)
    assert torch.equal(p.masks(boxes=[[5, 5, 20, 20]]).prob, before)

def test_images_and_numbers_of_any_make():
    x = torch.rand(3, 40, 50)
    want = RandomWalkerProposer().set_image(x).masks(boxes=[[5, 5, 20, 20]]).prob
    for im in (MedImage(x), x.permute(1, 2, 0).numpy(), x.double(), x.clone().requires_grad_()):
        for box in ([[5, 5, 20, 20]], np.array([[5, 5, 20, 20]]), torch.tensor([[5., 5, 20, 20]], requires_grad=True)):
            got = RandomWalkerProposer().set_image(im).masks(boxes=box).prob
            assert torch.allclose(got, want, atol=1e-4) and not got.requires_grad

def test_no_query_is_answered_by_no_mask():
    p = walker()
    for kw in (dict(boxes=torch.zeros(0, 4)), dict(points=torch.zeros(0, 3, 2)), dict(mask_prompt=torch.zeros(0, 4, 4))):
        o = p.masks(**kw)
        assert isinstance(o, Proposals) and o.prob.shape == (0, 1, 40, 50) and o.score.shape == (0, 1)

@pytest.mark.parametrize('kw,says', [
    (dict(), 'no prompt'), (dict(labels=[[1]]), 'no prompt'), (dict(boxes=[[0, 0, 5, 5]], labels=[[1]]), 'labels without points'),
    (dict(points=[[5, 5]]), r'points: expected \(Q, N, 2\)'), (dict(points=[[[5, 5]]], labels=[[3]]), 'got 3'),
    (dict(points=[[[50, 5]]]), 'outside the image of 50 columns and 40 rows'), (dict(points=[[[5, 40]]]), 'outside'),
    (dict(points=[[[-1, 5]]]), 'outside'),
    (dict(points=[[[5, float('nan')]]]), '1 NaN'), (dict(points=[[[5, 5]]], labels=[[0]]), 'asks for nothing'),
    (dict(boxes=[[9, 9, 5, 20]]), 'no x0, y0, x1, y1'), (dict(boxes=[[60, 5, 70, 20]]), 'no x0, y0, x1, y1'),
    (dict(boxes=[[-9, -9, -5, -5]]), 'no x0'),
    (dict(boxes=[[0, 0, 5, 5]]*2, points=[[[1, 1]]]), 'as many queries'), (dict(mask_prompt=[[1., 2]]), r'\(Q, h, w\)'),
    (dict(boxes=object()), 'expected numbers'),
    (dict(boxes=[[0, 0, 5, 5]], points=[[[20, 20]]]), 'outside its box')])
def test_bad_queries_say_what_is_wrong(kw, says):
    with pytest.raises(ValueError, match=says): walker().masks(**kw)

def test_padding_may_hold_anything():
    q = check_queries((40, 50), points=[[[5, 5], [999, -999]]], labels=[[1, PAD]])
    assert q.labels.tolist() == [[1, PAD]]

def test_one_call_for_many_maps():
    "Empty maps among others, several queries for a map, a proposer that counts its images."
    seen = []
    class Boxes(MaskProposer):
        prompts = 'boxes',
        def _encode(self, x): seen.append(x.shape); return x.shape[1:]
        def _propose(self, q, multimask):
            y, x = (torch.arange(n) for n in self._state)
            inside = lambda o, a, b: (o >= a[:, None]) & (o <= b[:, None])
            x0, y0, x1, y1 = q.boxes.T
            return (inside(y, y0, y1)[:, :, None] & inside(x, x0, x1)[:, None]).float()[:, None], torch.ones(len(q.boxes), 1)
    maps = torch.zeros(4, 30, 40)
    maps[0, 3:9, 4:9] = maps[2, 10:20, 10:20] = maps[2, 2:5, 30:35] = .8
    for per in ('map', 'component'):
        out = saliency_to_mask(maps, torch.rand(3, 30, 40), Boxes(), components=None, per=per, chunk=1)
        assert not out[[1, 3]].any() and torch.equal(out[0] > .5, maps[0] > .5)
        assert torch.equal(out[2] > .5, maps[2] > .5) == (per == 'component')
    assert len(seen) == 2
    with pytest.raises(ValueError, match='Boxes takes boxes, got points'):
        saliency_to_mask(maps, torch.rand(3, 30, 40), Boxes(), prompt='points')
