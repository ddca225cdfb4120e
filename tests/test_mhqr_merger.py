"Merging of random masks: what holds for every group, and what is refused."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from medseg_nb.core import seeded
from medseg_nb.mhqr.merger import GROUPINGS, UNIONS, boundary_band, mask_overlap, merge_masks, mergeable, refine_boundary, region_features, union_masks

quick = settings(max_examples=60, deadline=None)
seeds, counts = st.integers(0, 2**31), st.integers(0, 12)

def random_masks(seed, q, h=18, w=22):
    "Soft boxes with different scores, and features."
    with seeded(seed):
        a, b = (torch.rand(2, q, 2)*torch.tensor([h, w])).sort(0).values
        y, x = torch.arange(h)[:, None], torch.arange(w)
        m = torch.stack([(y >= i[0]) & (y <= j[0]) & (x >= i[1]) & (x <= j[1]) for i,j in zip(a, b)]) if q else torch.zeros(0, h, w)
        return m*(.6 + .4*torch.rand(q, 1, 1)), torch.rand(q) + .1, torch.randint(0, 3, (q,)), torch.randn(8, 6, 7), torch.randn(3, 5)

@quick
@given(seeds, counts, st.booleans(), st.booleans())
def test_every_pair_of_a_group_may_merge(seed, q, with_features, with_text):
    m, s, c, f, t = random_masks(seed, q)
    f, t = f if with_features else None, t if with_text else None
    out = merge_masks(m, s, c, f, t)
    ok = mergeable(mask_overlap(m).iou, c, None if f is None else region_features(m, f), t)
    flat = [i for g in out.members for i in g]
    assert len(flat) == len(set(flat)) and {len(o) for o in out} == {len(out.masks)}
    for g in out.members: assert ok[g][:, g].fill_diagonal_(True).all()
    assert (out.scores.diff() <= 0).all() and [float(s[g].max()) for g in out.members] == out.scores.tolist()
    assert out.masks.isfinite().all() and (not q or 0 <= out.masks.min() and out.masks.max() <= 1)
    twins = (mask_overlap(out.masks).iou > .8) & (out.classes[:, None] == out.classes)
    assert not twins.fill_diagonal_(False).any()

@quick
@given(seeds, st.integers(1, 12), st.sampled_from(list(GROUPINGS)), st.sampled_from(list(UNIONS)))
def test_order_and_scale_of_scores_do_not_matter(seed, q, variant, union):
    m, s, c, f, t = random_masks(seed, q)
    with seeded(seed): order = torch.randperm(q)
    a, b = merge_masks(m, s, c, f, t, variant=variant, union=union), merge_masks(m[order], s[order], c[order], f, t, variant=variant, union=union)
    assert [sorted(order[g].tolist()) for g in b.members] == a.members
    assert torch.allclose(a.masks, b.masks, atol=1e-6) and a.classes.tolist() == b.classes.tolist()
    twice = merge_masks(m, s*4, c, f, t, variant=variant, union=union)
    assert twice.members == a.members and torch.allclose(twice.masks, a.masks, atol=1e-6)

@quick
@given(seeds, st.integers(1, 8))
def test_the_best_member_is_kept_whole(seed, q):
    m, s, c, f, t = random_masks(seed, q)
    out = merge_masks(m, s, c, f, t)
    for o,g in zip(out.masks, out.members):
        assert (o >= m[g[int(s[g].argmax())]] - 1e-6).all() and (o <= m[g].amax(0) + 1e-6).all()

@quick
@given(seeds, st.integers(2, 10))
def test_published_groups_are_the_chains(seed, q):
    m, s, c, *_ = random_masks(seed, q)
    ok = mergeable(mask_overlap(m).iou, c).fill_diagonal_(True)
    reach = torch.linalg.matrix_power(ok.double(), q) > 0
    want = {tuple(r.nonzero()[:, 0].tolist()) for r in reach}
    assert {tuple(g) for g in merge_masks(m, s, c, variant='published').members} == want

@quick
@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_refinement_stays_in_the_band(seed, q, width):
    m, _, _, f, _ = random_masks(seed, q)
    out, band = refine_boundary(m, f, width), boundary_band(m, width)
    assert torch.equal(out[~band], m[~band]) and 0 <= out.min() and out.max() <= 1
    assert torch.allclose(out, torch.cat([refine_boundary(o[None], f, width) for o in m]), atol=1e-5)
    want = np.zeros(band.shape, bool)
    for i,o in enumerate(m.numpy() > .5):
        for y,x in np.ndindex(o.shape):
            near = o[max(0, y-width):y+width+1, max(0, x-width):x+width+1]
            want[i, y, x] = near.any() and not near.all()
    assert np.array_equal(band.numpy(), want)

def test_bool_and_half_masks():
    m, s, c, f, t = random_masks(3, 8)
    want = merge_masks((m > .5).float(), s, c, f, t)
    for o in (m > .5, (m > .5).half(), (m > .5).double()):
        got = merge_masks(o, s, c, f, t)
        assert got.members == want.members and torch.allclose(got.masks, want.masks) and got.masks.dtype == torch.float32

def test_input_is_left_alone():
    m, s, c, f, t = random_masks(3, 8)
    before = m.clone(), f.clone()
    merge_masks(m, s, c, f, t, refine=True)
    assert torch.equal(m, before[0]) and torch.equal(f, before[1])

def test_lists_and_empty_masks():
    m = torch.zeros(3, 8, 9)
    m[0, 2:5, 2:5] = 1
    out = merge_masks(m, [.5, .6, .7], [0, 0, 0], torch.ones(4, 3, 3), refine=True)
    assert len(out.masks) == 3 and out.masks.isfinite().all() and out.members == [[2], [1], [0]]

m, s, c, f, t = random_masks(0, 4)
@pytest.mark.parametrize('change,says', [
    (dict(masks=m[0]), r'expected masks \(Q, H, W\)'), (dict(masks=m.numpy()), 'got ndarray'), (dict(masks=m.long()), 'torch.int64'),
    (dict(masks=m*2), r'lie in \[0, 1\]'), (dict(masks=m*torch.nan), r'lie in \[0, 1\]'), (dict(masks=m[:3]), 'one for each of 3 masks'),
    (dict(scores=-s), 'at least 0'), (dict(scores=s*torch.nan), 'finite'), (dict(classes=c.float()), 'whole numbers'), (dict(classes=c-5), 'at least 0'),
    (dict(features=f[0]), r'\(D, h, w\)'), (dict(features=f*torch.inf), 'NaN or infinite'), (dict(text=t[0]), r'text: expected \(C, D\)'),
    (dict(text=t[:0]), 'row for each class'), (dict(variant='publishd'), "Did you mean 'published'"), (dict(union='weigthed'), "Did you mean 'weighted'"),
    (dict(iou=-.1), 'iou'), (dict(duplicate='x'), 'duplicate'), (dict(refine=True, features=None), 'needs features'), (dict(tau=.1), 'only for refine'),
    (dict(refine=True, width=0), 'width'), (dict(refine=True, tau=0), 'tau'), (dict(refine=True, keep=2), 'keep')])
def test_bad_input_says_what_is_wrong(change, says):
    kw = dict(masks=m, scores=s, classes=c, features=f, text=t) | change
    with pytest.raises(ValueError, match=says): merge_masks(**kw)

def test_union_of_nothing():
    assert union_masks(m, s, []).shape == (0, 18, 22)
