"What the mask decoder guarantees for any input, and what it refuses."
import pytest, torch, torch.nn.functional as F
from medseg_nb.core import load_model_folder, save_model_folder, seeded
from medseg_nb.mhqr.decoder import VARIANTS, agreed, check_features, class_share, mask_evidence, mask_levels, mask_prototypes, refine_logits, refine_masks
from medseg_nb.mhqr.head import RefineHead, RefineItem, refine_batch, refine_dls, refine_learner

def inputs(q=5, size=(40, 56), grid=(10, 14), dim=12, seed=0, scales=(.25, .5, 1)):
    with seeded(seed):
        f = F.normalize(torch.randn(dim, *grid), dim=0)
        return {s: torch.rand(q, round(size[0]*s), round(size[1]*s)) for s in scales}, f, torch.rand(q, *size)

every = pytest.mark.parametrize('variant', VARIANTS)
seeds = pytest.mark.parametrize('seed', range(8))

@every
def test_one_and_no_query(variant):
    m, f, d = inputs(1)
    assert refine_masks(m, f, variant=variant).shape == (1, 40, 56)
    m, f, d = inputs(0)
    assert refine_masks(m, f, d, variant=variant).shape == (0, 40, 56)
    assert refine_masks(m, f, torch.rand(3, 40, 56), torch.zeros(0, dtype=torch.long), variant=variant).shape == (0, 40, 56)
    assert RefineHead(12).refine(m, f).shape == (0, 40, 56)

@every
def test_same_input_same_output(variant):
    m, f, d = inputs()
    before = {s: o.clone() for s,o in m.items()}
    a = refine_masks(m, f, d, variant=variant)
    torch.manual_seed(99)
    assert a.equal(refine_masks(m, f, d, variant=variant))
    assert all(m[s].equal(before[s]) for s in m), 'the input is left as it was'

@every
@pytest.mark.parametrize('chunk', [1, 2, 3, 64])
def test_chunks_change_nothing(variant, chunk):
    m, f, d = inputs(7)
    torch.testing.assert_close(refine_masks(m, f, d, variant=variant, chunk=chunk), refine_masks(m, f, d, variant=variant, chunk=7), atol=1e-5, rtol=0)

@every
def test_queries_do_not_see_each_other(variant):
    m, f, d = inputs(6)
    some = [4, 1]
    alone = refine_masks({s: o[some] for s,o in m.items()}, f, d[some], variant=variant)
    torch.testing.assert_close(alone, refine_masks(m, f, d, variant=variant)[some], atol=1e-5, rtol=0)

@every
def test_probabilities_come_out(variant):
    m, f, d = inputs()
    out = refine_masks(m, f, d, variant=variant)
    assert out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1+1e-5

@seeds
@pytest.mark.parametrize('limit', [0., .5, 2., 6.])
def test_step_is_bounded(seed, limit):
    m, f, d = inputs(seed=seed)
    blend = refine_logits(m, f, limit=0)
    for dense in (None, d): assert (refine_logits(m, f, dense, limit=limit) - blend).abs().max() <= limit + 1e-4
    one = refine_logits(m[1], f, limit=limit)
    assert (one - torch.logit(m[1], 1e-6)).abs().max() <= limit + 1e-4

@seeds
def test_dense_map_protects(seed):
    m, f, d = inputs(seed=seed)
    blend, out = refine_logits(m, f, d, limit=0).sigmoid(), refine_masks(m, f, d, limit=9)
    assert (out[(blend > .5) & (d >= .5)] >= .5).all() and (out[(blend < .5) & (d <= .5)] <= .5).all()
    assert (out[d >= .5] >= blend[d >= .5] - 1e-6).all() and (out[d <= .5] <= blend[d <= .5] + 1e-6).all()

@seeds
def test_area_changes_only_where_unsure(seed):
    p, f, _ = inputs(seed=seed, scales=(1,))
    out, sure = refine_masks(p, f, limit=1.), (p[1] - .5).abs() > .2311
    assert ((out > .5) == (p[1] > .5))[sure].all()

@pytest.mark.parametrize('value', [0., .5, 1.])
def test_constant_masks_stay(value):
    _, f, _ = inputs()
    p = torch.full((2, 40, 56), value)
    out = refine_masks(p, f)
    assert out.isfinite().all()
    if value != .5: torch.testing.assert_close(out, p, atol=2e-6, rtol=0)
    assert (torch.logit(out, 1e-6) - torch.logit(p, 1e-6)).abs().max() <= 2 + 1e-4

@every
def test_one_pixel_and_hard_masks(variant):
    _, f, _ = inputs()
    p = torch.zeros(2, 40, 56, dtype=torch.bool)
    p[0, 7, 9] = True
    p[1, 10:30] = True
    out = refine_masks(p, f, variant=variant)
    assert out.isfinite().all()
    if variant == 'sharp': assert (out > .5).equal(p)

def test_features_that_do_not_tell_change_nothing():
    m, f, _ = inputs()
    same = f[:, :1, :1].expand_as(f).contiguous()
    torch.testing.assert_close(refine_masks(m[1], same), m[1], atol=1e-4, rtol=0)

def test_attention_stays_in_the_mask():
    _, f, _ = inputs()
    t, grid = check_features(f)
    m = torch.zeros(1, *grid)
    m[0, 2:4, 3:6] = 1
    other = t.clone().view(*grid, -1)
    other[6:] = -other[6:]
    a, b = (mask_prototypes(m, o, temperature=.05)[0] for o in (t, other.flatten(0, 1)))
    assert a.equal(b), 'tokens outside the mask have no weight inside'
    assert torch.cosine_similarity(a, t.view(*grid, -1)[2:4, 3:6].reshape(6, -1)).max() > .5

def test_scales_in_any_order_and_one_alone():
    m, f, _ = inputs()
    assert refine_masks(dict(reversed(m.items())), f).equal(refine_masks(m, f))
    assert refine_masks(m[1], f).equal(refine_masks({1: m[1]}, f))

def test_coarse_masks_end_on_the_image():
    m, f, d = inputs(scales=(.25, .5))
    assert refine_masks(m, f).shape == refine_masks(m, f, d).shape == refine_masks(m, f, size=(40, 56)).shape == (5, 40, 56)
    odd = {.5: torch.rand(2, 21, 29)}
    assert refine_masks(odd, f, torch.rand(2, 41, 57)).shape == (2, 41, 57)

@pytest.mark.parametrize('grid', [(1, 1), (1, 9), (60, 80)])
@every
def test_any_token_grid(variant, grid):
    m, f, d = inputs(grid=grid)
    assert refine_masks(m, f, d, variant=variant).isfinite().all()

def test_half_and_double():
    m, f, d = inputs()
    m = {s: .1 + .8*o for s,o in m.items()} # Half precision is coarse near 0 and 1
    want = refine_masks(m, f, d)
    assert refine_masks({s: o.double() for s,o in m.items()}, f.double(), d.double()).dtype == torch.float64
    half = refine_masks({s: o.half() for s,o in m.items()}, f.half(), d.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, want, atol=.02, rtol=0)

def test_share_of_one_map_and_of_none():
    p = torch.rand(1, 4, 5)
    assert class_share(p, torch.tensor([0, 0])).equal(p[[0, 0]])
    zero = class_share(torch.zeros(3, 4, 5), torch.tensor([1]))
    torch.testing.assert_close(zero, torch.full((1, 4, 5), .5), atol=.01, rtol=0)

def test_agreed_is_the_smaller_of_two_that_agree():
    step, prior = torch.linspace(-2, 2, 41)[:, None].expand(41, 21), torch.linspace(0, 1, 21).expand(41, 21)
    got, ask = agreed(step, prior, 2.), 2*(2*prior-1)
    want = torch.where(step*ask > 0, step.sign()*torch.minimum(step.abs(), ask.abs()), 0.)
    torch.testing.assert_close(got, want)

def nan(t): return t.index_fill(0, torch.tensor([0]), float('nan'))

@pytest.mark.parametrize('change, words', [
    (dict(masks={}), 'at least one scale'), (dict(masks='mask'), 'expected float \\(Q, h, w\\), got str'),
    (dict(masks=torch.rand(4, 5)), 'expected float \\(Q, h, w\\)'), (dict(masks=torch.ones(1, 4, 5).long()), 'got torch.int64'),
    (dict(masks={'1': torch.rand(1, 4, 5)}), 'a scale is a positive number'), (dict(masks={-1: torch.rand(1, 4, 5)}), 'a scale is a positive number'),
    (dict(masks=nan(torch.rand(5, 40, 56))), 'without NaN'), (dict(masks=torch.rand(5, 40, 56)-1), 'in \\[0, 1\\]'),
    (dict(masks={.5: torch.rand(4, 20, 28), 1: torch.rand(5, 40, 56)}), 'as many queries'),
    (dict(masks={.5: torch.rand(5, 28, 20), 1: torch.rand(5, 40, 56)}), 'expected about \\(20, 28\\)'),
    (dict(size=(30, 30)), 'for an image of \\(30, 30\\)'), (dict(features=torch.rand(12, 10)), 'float \\(D, h, w\\)'),
    (dict(features=nan(torch.rand(12, 10, 14))), 'NaN'), (dict(features=torch.zeros(12, 10, 14)), '140 of 140 tokens are 0'),
    (dict(features=torch.ones(12, 10, 14)), 'unit length'), (dict(features=None), 'got NoneType'),
    (dict(dense=torch.rand(40, 56)), 'on the image'), (dict(dense=torch.rand(5, 20, 28)), 'on the image'),
    (dict(dense=torch.rand(3, 40, 56)), 'a map for each of 5'),
    (dict(dense=torch.rand(5, 40, 56)*3), 'dense: expected probabilities'), (dict(dense=torch.rand(3, 40, 56), classes=[0, 1]), 'expected \\(5,\\) integers'),
    (dict(dense=torch.rand(3, 40, 56), classes=[0, 1, 2, 3, 0]), 'indices of 3 maps'), (dict(dense=torch.rand(3, 40, 56), classes=torch.rand(5)), 'integers'),
    (dict(classes=[0]*5), 'classes without dense'), (dict(variant='publised'), "Did you mean 'published'"), (dict(limit=-1), 'limit'),
    (dict(fuse=1.5), 'fuse is a share'), (dict(temperature=0), 'above 0'), (dict(reach=1.5), 'reach'), (dict(chunk=0), 'chunk'),
    (dict(variant='published', residual=2), 'residual is a share')])
def test_bad_input_is_named(change, words):
    m, f, _ = inputs()
    with pytest.raises(ValueError, match=words): refine_masks(**{**dict(masks=m, features=f), **change})

def test_no_gradient_is_kept():
    m, f, _ = inputs()
    assert not refine_masks(m, f.requires_grad_()).requires_grad

def items(n=4, q=(3, 1, 2, 3), dense=False):
    out = []
    for i in range(n):
        m, f, d = inputs(q[i], seed=i)
        out.append(RefineItem(m, f, (d > .5).float(), d if dense else None))
    return out

@pytest.mark.parametrize('options', [{}, dict(fuse=.5, temperature=.3, reach=1), dict(hidden=1, embed=8, heads=1)])
def test_head_starts_as_the_decoder(options):
    m, f, d = inputs()
    same = {k: v for k,v in options.items() if k in ('fuse', 'temperature', 'reach')}
    h = RefineHead(12, **options)
    for dense in (None, d): assert h.refine(m, f, dense).equal(refine_masks(m, f, dense, **same))
    classes = torch.tensor([0, 1, 2, 1, 0])
    assert h.refine(m, f, d[:3], classes).equal(refine_masks(m, f, d[:3], classes, **same))

def test_trained_head_moves_no_further_than_it_may():
    m, f, _ = inputs()
    h = RefineHead(12, limit=.7)
    with torch.no_grad():
        for p in h.parameters(): p.normal_(0, 3)
        z = h(f[None], {s: o[None] for s,o in m.items()})[0]
    assert 0 < (z - refine_logits(m, f)).abs().max() <= .7 + 1e-4
    for c in (1, 2, 5): torch.testing.assert_close(h.refine(m, f, chunk=c), z.sigmoid(), atol=1e-4, rtol=0)

@pytest.mark.parametrize('dense', [False, True])
def test_learner_trains_the_head(dense):
    with seeded(0):
        h = RefineHead(12)
        learn = refine_learner(refine_dls(items(dense=dense), items(dense=dense), bs=2, device='cpu'), h)
        with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    losses = [r[0] for r in learn.recorder.values]
    assert losses[-1] < losses[0]
    assert all((p.grad is not None) for p in h.parameters())

def test_filled_queries_do_not_count():
    a, b = items(2)
    f, m, d, t = refine_batch([a, b])
    h = RefineHead(12)
    z = h(f, m, d)
    assert (t[1, 1:] == -1).all()
    loss = refine_learner(refine_dls([a], [b], device='cpu'), h).loss_func
    z2 = z.detach().clone()
    z2[1, 1:] = 5.
    assert loss(z2, t) == loss(z.detach(), t)

def test_head_folder(tmp_path):
    m, f, _ = inputs()
    h = RefineHead(12, embed=8, heads=2)
    with torch.no_grad(): h.conv[2].weight.normal_()
    h.save_pretrained(tmp_path/'a', seed=3)
    again = RefineHead.from_pretrained(tmp_path/'a')
    assert again.refine(m, f).equal(h.refine(m, f)) and again.config['seed'] == 3
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    config, state = load_model_folder(tmp_path/'a')
    save_model_folder(tmp_path/'b', config | dict(cls='FMISeg'), state)
    with pytest.raises(ValueError, match='holds a FMISeg'): RefineHead.from_pretrained(tmp_path/'b')
    save_model_folder(tmp_path/'c', config, {k: v for k,v in state.items() if k != 'out.bias'})
    with pytest.raises(ValueError, match='1 missing: out.bias'): RefineHead.from_pretrained(tmp_path/'c')

def test_bad_items_are_named():
    a, b, *_ = items()
    with pytest.raises(ValueError, match='item 1: masks'): refine_dls([a, b._replace(masks={})], [a])
    with pytest.raises(ValueError, match='item 0: features'): refine_dls([a._replace(features=a.features*2)], [a])
    with pytest.raises(ValueError, match='item 0: dense'): refine_dls([a._replace(dense=torch.rand(3, 4, 5))], [a])
    with pytest.raises(ValueError, match='to train on'): refine_dls([], [a])
    with pytest.raises(ValueError, match='bs=1'): refine_batch([a, b._replace(masks={1.: b.masks[1]})])
    with pytest.raises(ValueError, match='features of 7 numbers'): RefineHead(7).refine(a.masks, a.features)
