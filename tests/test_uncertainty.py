"Properties of uncertainty, its wrappers and the hybrid that hold for any input, and what is refused."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from medseg_nb.calibration import reliability, risk_coverage
from medseg_nb.core import Segmentation, as_image
from medseg_nb.hybrid import doubt, hybrid, needs_help, provenance
from medseg_nb.sam.proposers import MaskProposer, RandomWalkerProposer
from medseg_nb.save import save_segmentation
from medseg_nb.segment import check_segmenter, load_segmenter
from medseg_nb.uncertainty import (Ensemble, View, binary_entropy, combine, expected_entropy, load_ensemble, look, look_back, mc_dropout,
                                   mutual_information, predictive_entropy, tta)
from medseg_nb.wording import mirror_prompt

fast = settings(max_examples=40, deadline=None)
seeds, sides = st.integers(0, 10**6), st.integers(2, 40)
unit = st.floats(0, 1, width=32)

def image(h, w, seed): return as_image(np.random.default_rng(seed).random((h, w, 3)))

def bright(images, prompts, boxes=None):
    "Marks by the value of each pixel, and remembers what it was asked."
    bright.asked = [list(ps) for ps in prompts]
    return [Segmentation(torch.stack([im.x.mean(0).clamp(0, 1)**(1+len(p) % 3) for p in ps]), list(ps), image=im.x, meta=im.meta)
            for im,ps in zip(images, prompts)]

def sided(images, prompts, boxes=None):
    "'left' is the right half of the picture."
    def one(im, p):
        x = torch.arange(im.size[1]).expand(im.size) >= im.size[1]/2
        return (x if 'left' in p.lower() else ~x).float()
    return [Segmentation(torch.stack([one(im, p) for p in ps]), list(ps), image=im.x, meta=im.meta) for im,ps in zip(images, prompts)]

@fast
@given(st.lists(unit, min_size=1, max_size=60))
def test_entropy_is_finite_and_bounded(ps):
    p = torch.tensor(ps)
    h = binary_entropy(p)
    assert h.isfinite().all() and (h >= 0).all() and (h <= 1).all()
    assert torch.allclose(h, binary_entropy(1-p), atol=1e-6)
    assert torch.allclose(binary_entropy(p, 'nats'), h*math.log(2), atol=1e-6)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_entropy_is_exact_at_the_ends_and_in_the_middle(dtype):
    assert binary_entropy(torch.tensor([0, 1, .5]*33, dtype=dtype)).tolist() == [0, 0, 1]*33

@fast
@given(seeds, st.integers(1, 6))
def test_doubt_is_what_is_shared_and_what_is_not(seed, m):
    rng = torch.Generator().manual_seed(seed)
    probs = torch.rand(m, 4, 5, generator=rng, dtype=torch.float64).round(decimals=int(seed % 3))
    total, expected, mi = (f(probs) for f in (predictive_entropy, expected_entropy, mutual_information))
    assert torch.allclose(total, expected + mi, atol=1e-12) and (mi >= 0).all() and (expected <= total + 1e-12).all()
    if m == 1: assert (mi == 0).all()

@fast
@given(seeds, st.integers(1, 5), st.sampled_from(['entropy', 'expected', 'mi', 'std']))
def test_order_of_members_does_not_matter(seed, m, how):
    probs = torch.rand(m, 2, 5, 6, generator=torch.Generator().manual_seed(seed))
    a, b = (combine(((0, Segmentation(p, ['a', 'b'])) for p in o), how)[0] for o in (probs, probs.flip(0)))
    assert torch.allclose(a.prob, b.prob, atol=1e-7) and torch.allclose(a.uncertainty, b.uncertainty, atol=1e-6)
    assert a.uncertainty.min() >= 0 and a.uncertainty.max() <= 1

@fast
@given(seeds, sides, sides)
def test_ensemble_of_one_is_the_identity(seed, h, w):
    images, prompts = [image(h, w, seed), image(w, h, seed+1)], [['a', 'bb'], ['c']]
    for s,one in zip(bright(images, prompts), Ensemble([bright])(images, prompts)):
        assert one.prob.equal(s.prob) and one.prompts == s.prompts and one.threshold == s.threshold and one.meta is s.meta

def test_ensemble_of_copies_agrees():
    im = image(8, 9, 0)
    seg = Ensemble([bright]*5, 'mi')([im], [['a']])[0]
    assert torch.allclose(seg.prob, bright([im], [['a']])[0].prob, atol=1e-7) and seg.uncertainty.max() < 1e-6

views = st.lists(st.tuples(st.booleans(), st.floats(.25, 1)), min_size=1, max_size=4)

@fast
@given(seeds, sides, sides, views)
def test_views_of_a_pixelwise_segmenter_are_the_identity(seed, h, w, vs):
    im = image(h, w, seed)
    seg = tta(bright, [View(*v) for v in vs])([im], 'a lesion')[0]
    assert torch.allclose(seg.prob, bright([im], [['a lesion']])[0].prob, atol=1e-7) and seg.prompts == ['a lesion'] and seg.meta is im.meta

@fast
@given(seeds, sides, sides, st.booleans(), st.floats(.25, 1))
def test_every_view_comes_back(seed, h, w, mirror, scale):
    im, v = image(h, w, seed), View(mirror, scale)
    seen, _, _ = look(im, ['a'], v)
    assert look_back(seen.x, v, im.size).equal(im.x) and seen.meta.size == seen.size and seen.meta is not im.meta

@pytest.mark.parametrize('prompt', ['left lung', 'Right upper lobe', 'both lungs', 'LEFT eye, right lung'])
def test_the_sentence_is_mirrored_with_the_picture(prompt):
    im = image(6, 8, 0)
    seg = tta(bright, [View(), View(mirror=True)])([im], prompt)[0]
    assert bright.asked == [[prompt], [mirror_prompt(prompt)]] and seg.prompts == [prompt]

def test_left_stays_left():
    im = image(6, 8, 0)
    seg = tta(sided)([im], ['left lung', 'right lung'])[0]
    assert seg.prob.equal(sided([im], [['left lung', 'right lung']])[0].prob) and seg.uncertainty.max() == 0

class Noisy(torch.nn.Module):
    def __init__(self): super().__init__(); self.layer = torch.nn.Conv2d(3, 8, 1)
    def forward(self, x): return self.layer(x).mean(1).sigmoid()

def noisy():
    torch.manual_seed(0)
    net = Noisy().eval()
    @torch.no_grad()
    def segment(images, prompts, boxes=None): return [Segmentation(net(im.x[None]).expand(len(ps), -1, -1), list(ps)) for im,ps in zip(images, prompts)]
    segment.model = net
    return segment

def test_dropout_repeats_and_leaves_no_trace():
    segment, im = noisy(), image(7, 7, 1)
    before, drop = segment([im], [['a']])[0].prob, mc_dropout(noisy(), n=4, at='layer', p=.3)
    a, b, c = drop([im], 'a')[0], drop([im], 'a')[0], mc_dropout(noisy(), n=4, at='layer', p=.3, seed=1)([im], 'a')[0]
    assert a.prob.equal(b.prob) and not a.prob.equal(c.prob) and not a.prob.equal(before)
    assert drop.model.layer(im.x[None]).equal(drop.model.layer(im.x[None])) and not drop.model.layer._forward_hooks

def test_dropout_is_taken_off_after_an_error():
    segment = noisy()
    def broken(images, prompts, boxes=None): raise RuntimeError('out of memory')
    with pytest.raises(RuntimeError, match='out of memory'): mc_dropout(broken, at='layer', model=segment.model)([image(4, 4, 0)], 'a')
    assert not segment.model.layer._forward_hooks

@pytest.mark.parametrize('wrap', [lambda s: Ensemble([s]), tta, lambda s: mc_dropout(s, n=2, at='net.branches.*.ups.*'),
                                  lambda s: hybrid(s, RandomWalkerProposer(side=32))], ids=['ensemble', 'tta', 'dropout', 'hybrid'])
def test_the_embedded_model_keeps_the_contract_in_every_wrapper(wrap, tmp_path):
    tiny, im = load_segmenter('tiny', size=64, device='cpu'), image(40, 52, 0)
    seg, = check_segmenter(wrap(tiny), im, ['left lung', 'optic disc'])
    row = save_segmentation(seg, tmp_path)[0]
    saved = np.asarray(Image.open(tmp_path/row['uncertainty']))
    assert saved.shape == (40, 52) and np.abs(saved/65535 - seg.uncertainty[0].numpy()).max() < 1e-5

@pytest.mark.parametrize('make, says', [
    (lambda: binary_entropy(torch.tensor([.5, float('nan')])), '1 NaN'), (lambda: binary_entropy(torch.tensor([-.1])), r'\[0, 1\]'),
    (lambda: binary_entropy(.5), 'float'), (lambda: Ensemble([]), 'at least one segmenter'), (lambda: Ensemble([bright], 'var'), 'unknown measure'),
    (lambda: load_ensemble([], print), 'at least one segmenter'), (lambda: tta(bright, [View(scale=0)]), 'scale from 0.25'),
    (lambda: tta(bright, [View(gamma=float('nan'))]), 'gamma above 0'), (lambda: mc_dropout(bright), 'no attribute model'),
    (lambda: mc_dropout(noisy()), 'nothing in Noisy is random'), (lambda: mc_dropout(noisy(), at='layr'), "Did you mean 'layer'"),
    (lambda: tta(bright)([], 'a'), 'no image'), (lambda: tta(bright)([image(4, 4, 0)], []), 'no prompt'),
    (lambda: hybrid(bright, None), 'a proposer with set_image and masks'),
    (lambda: reliability(torch.rand(3, 3), torch.rand(3, 3)), 'bool'), (lambda: risk_coverage(torch.rand(3, 3) > .5, torch.rand(3, 2)), 'of one shape')])
def test_bad_input_is_told(make, says):
    with pytest.raises(ValueError, match=says): make()

def test_a_folder_without_models_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match='no model folder'): load_ensemble(tmp_path, print)

@fast
@given(seeds, st.integers(1, 20))
def test_calibration_error_lies_between_0_and_1(seed, n):
    rng = torch.Generator().manual_seed(seed)
    p, t = torch.rand(3, 9, 9, generator=rng), torch.rand(3, 9, 9, generator=rng) > .3
    rel = reliability(p, t, n)
    assert 0 <= rel.ece <= rel.mce + 1e-9 <= 1 + 1e-8 and rel.count.sum() == p.numel() and reliability(t.float(), t, n).ece == 0

@fast
@given(seeds)
def test_no_doubt_beats_the_oracle(seed):
    rng = torch.Generator().manual_seed(seed)
    e, u = torch.rand(2, 8, 8, generator=rng) > .8, torch.rand(2, 8, 8, generator=rng).round(decimals=seed % 3)
    r = risk_coverage(e, u)
    assert r.ause >= -1e-9 and abs(r.risk[-1].item() - e.float().mean().item()) < 1e-6 and abs(risk_coverage(e, e.float()).ause) < 1e-9

class Square(MaskProposer):
    "Answers a box by the box."
    prompts = 'boxes',
    def _encode(self, x): self.encoded = getattr(self, 'encoded', 0) + 1; return x
    def _propose(self, q, multimask):
        out = torch.zeros(len(q.points), 1, *self.size)
        for o,(x0, y0, x1, y1) in zip(out, q.boxes.round().long().tolist()): o[0, y0:y1+1, x0:x1+1] = 1
        return out, torch.ones(len(out), 1)

def blobs(faint):
    def segment(images, prompts, boxes=None):
        p = torch.full((2, 20, 20), .01)
        p[0, 4:9, 4:9], p[1, 4:9, 4:9] = .999, faint
        return [Segmentation(p, list(ps), image=im.x, meta=im.meta) for im,ps in zip(images, prompts)]
    return segment

def test_only_the_doubtful_is_replaced():
    im, proposer = image(20, 20, 0), Square()
    first, seg = blobs(.6)([im], [['a', 'b']])[0], hybrid(blobs(.6), proposer, margin=0)([im], ['a', 'b'])[0]
    assert [needs_help(first, j) for j in (0, 1)] == [False, True] and doubt(first, 1) > .4
    assert seg.prob[0].equal(first.prob[0]) and seg.mask()[1].equal(first.mask()[1]) and seg.prob[1].max() == 1
    assert [o['by'] for o in provenance(seg)] == ['segmenter', 'proposer'] and 'provenance' not in im.meta.extra and proposer.encoded == 1
    assert seg.uncertainty[1].max() == 0

def test_a_box_is_obeyed():
    im, proposer = image(20, 20, 0), Square()
    seg = hybrid(blobs(.999), proposer)([im], ['a', 'b'], boxes=[[None, (10, 12, 15, 17)]])[0]
    assert seg.mask()[1].sum() == 36 and seg.mask()[1, 12:18, 10:16].all()
    assert [(o['by'], o['asked']) for o in provenance(seg)] == [('segmenter', None), ('proposer', 'box')]

def test_the_sure_are_left_alone():
    im, proposer = image(20, 20, 0), Square()
    seg = hybrid(blobs(.999), proposer)([im], ['a', 'b'])[0]
    assert seg.prob.equal(blobs(.999)([im], [['a', 'b']])[0].prob) and not hasattr(proposer, 'encoded')

def test_boxes_are_checked():
    im = image(20, 20, 0)
    for boxes,says in (([], 'for each image'), ([[None]], 'for each of 2 prompts'), ([[None, (1, 2, 3)]], 'Q, 4'), ([[None, (30, 30, 40, 40)]], 'is no x0')):
        with pytest.raises(ValueError, match=says): hybrid(blobs(.9), Square())([im], ['a', 'b'], boxes=boxes)

def test_what_cannot_be_proposed_stays():
    "A flat map has no region to make a box of: the first answer is kept, and the notes say that help was asked for."
    flat = lambda images, prompts, boxes=None: [Segmentation(torch.full((1, 9, 9), .4), list(ps), image=im.x, meta=im.meta) for im,ps in zip(images, prompts)]
    im = image(9, 9, 0)
    seg = hybrid(flat, RandomWalkerProposer())([im], 'a')[0]
    assert seg.prob.equal(torch.full((1, 9, 9), .4)) and provenance(seg)[0]['by'] == 'segmenter' and provenance(seg)[0]['asked'] == 'doubt'
