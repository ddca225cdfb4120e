"Scores of label maps on inputs that no lesson shows: random maps, ignored regions, merging, bad input."
import json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from medseg_nb.label_maps import LabelScores, boundary_f1, class_iou, confusion, edge_matches, known_pair, label_edges
from medseg_nb.label_maps import scene_entropy, small_object_iou

quick = settings(max_examples=40, deadline=None)
seeds, sides, classes = st.integers(0, 2**31), st.integers(1, 24), st.integers(1, 6)

def random_pair(seed, h, w, c, ignored=.1, noise=.3):
    "A prediction and a truth with regions, some of it ignored."
    rng = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(rng.random((c, h, w)), (0, 1.5, 1.5)).argmax(0)
    pred = np.where(rng.random((h, w)) < noise, rng.integers(0, c, (h, w)), truth)
    truth[rng.random((h, w)) < ignored] = rng.choice([255, -1])
    return pred, truth

def scores(c, **kw): return LabelScores([f'class {i}' for i in range(c)], **kw)
def same(a, b): assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-9) for k in a), (a, b)

@quick
@given(seeds, sides, sides, classes)
def test_a_perfect_map_scores_one(seed, h, w, c):
    _, truth = random_pair(seed, h, w, c)
    pred = np.where((truth == 255) | (truth < 0), 0, truth)
    got = scores(c, small=.5, stuff=['class 0']).add(pred, truth).summary()
    keys = 'miou', 'miou_union', 'fw_iou', 'accuracy', 'boundary_f1', 'small_iou', 'stuff_miou', 'thing_miou'
    assert all(got[k] in (1, None) for k in keys), got
    assert (got['miou'] is None) == (got['pixels'] == 0)

@quick
@given(seeds, sides, sides, classes, st.integers(0, 10**6))
def test_what_is_ignored_never_matters(seed, h, w, c, other):
    pred, truth = random_pair(seed, h, w, c, ignored=.3)
    skip = (truth == 255) | (truth < 0)
    changed = np.where(skip, np.random.default_rng(other).integers(-5, 300, truth.shape), pred)
    same(scores(c, small=.5).add(pred, truth).summary(), scores(c, small=.5).add(changed, truth).summary())

@quick
@given(seeds, sides, sides, classes, st.floats(0, 6))
def test_boundaries_are_symmetric(seed, h, w, c, r):
    pred, truth = known_pair(*random_pair(seed, h, w, c), c)
    a, b = edge_matches(pred, truth, c, r), edge_matches(truth, pred, c, r)
    assert (a == b[[2, 3, 0, 1]]).all() and (a[1] <= a[0]).all() and (a[3] <= a[2]).all()
    f, g = boundary_f1(pred, truth, c, r), boundary_f1(truth, pred, c, r)
    np.testing.assert_allclose(f, g)
    assert ((np.nan_to_num(f) >= 0) & (np.nan_to_num(f) <= 1)).all()
    np.testing.assert_allclose(class_iou(confusion(pred, truth, c)), class_iou(confusion(truth, pred, c)))
    assert (edge_matches(pred, truth, c, r+1) >= a).all()

@quick
@given(seeds, sides, sides, classes)
def test_turning_and_renaming_change_nothing(seed, h, w, c):
    pred, truth = random_pair(seed, h, w, c, ignored=0)
    want = scores(c, small=.3).add(pred, truth).summary()
    order = np.random.default_rng(seed).permutation(c)
    for p,t in ((pred.T, truth.T), (pred[::-1], truth[::-1]), (order[pred], order[truth])):
        same(scores(c, small=.3).add(p, t).summary(), want)

@quick
@given(seeds, classes, st.integers(1, 6))
def test_parts_add_up(seed, c, n):
    pairs = [random_pair(seed+i, 5+i, 9, c) for i in range(n)]
    joint, parts = scores(c, small=.2), [scores(c, small=.2) for _ in range(2)]
    for i,(p, t) in enumerate(pairs): joint.add(p, t); parts[i % 2].add(p, t)
    merged = parts[0] + parts[1]
    same(merged.summary(), joint.summary())
    np.testing.assert_allclose(merged.table().to_numpy(float), joint.table().to_numpy(float))
    resumed = LabelScores.from_dict(json.loads(json.dumps(parts[0].to_dict(), allow_nan=False)))
    for i,(p, t) in enumerate(pairs):
        if i % 2: resumed.add(p, t)
    same(resumed.summary(), joint.summary())
    json.dumps(merged.summary(), allow_nan=False)

@quick
@given(seeds, sides, sides, st.integers(2, 6))
def test_small_objects_by_the_definition(seed, h, w, c):
    pred, truth = known_pair(*random_pair(seed, h, w, c), c)
    area = h*w/3
    want = []
    for k in range(c):
        t, n = ndimage.label(truth == k, np.ones((3, 3)))
        p, _ = ndimage.label(pred == k, np.ones((3, 3)))
        for o in (t == i for i in range(1, n+1)):
            if o.sum() >= area: continue
            mine = np.isin(p, np.setdiff1d(p[o], 0)) & (o | (t == 0))
            want.append((k, (o & mine).sum()/(o | mine).sum()))
    got = sorted(zip(*(a.tolist() for a in small_object_iou(pred, truth, area))))
    assert len(got) == len(want) and np.allclose(got, sorted(want))

@quick
@given(seeds, sides, sides, classes)
def test_entropy_is_bounded(seed, h, w, c):
    pred, _ = random_pair(seed, h, w, c)
    e = scene_entropy(pred)
    assert 0 <= e <= np.log2(c) + 1e-9 and scene_entropy(torch.tensor(pred)) == e
    assert scene_entropy(np.eye(c)[pred].transpose(2, 0, 1)) == pytest.approx(e)
    prob = torch.rand(c, h, w).softmax(0)
    assert scene_entropy(prob) <= np.log2(c) + 1e-6

def test_kinds_of_arrays_agree():
    pred, truth = random_pair(3, 20, 30, 4)
    truth = np.where(truth < 0, 255, truth)
    want = scores(4).add(pred, truth).summary()
    for f in (np.uint8, np.int16, lambda o: torch.tensor(o), lambda o: torch.tensor(o).byte(), np.ndarray.tolist):
        same(scores(4).add(f(pred), f(truth)).summary(), want)

def test_nothing_known_and_nothing_added():
    blank = np.full((4, 5), 255)
    for s in (scores(2), scores(2).add(blank, blank)):
        got = s.summary()
        assert got['pixels'] == 0 and all(got[k] is None for k in ('miou', 'fw_iou', 'accuracy', 'boundary_f1', 'small_iou'))
        assert s.table()['iou'].isna().all()
    assert (scores(2) + scores(2).add(blank, blank)).summary()['images'] == 1

def test_ignored_rims_and_the_frame_are_no_boundary():
    m = np.zeros((6, 8), int)
    assert not label_edges(m).any()
    m[:, 4] = -1
    m[:, 5:] = 1
    assert not label_edges(m).any()

def test_scores_can_be_switched_off():
    pred, truth = random_pair(0, 9, 9, 3)
    got = scores(3, boundary=None, small=None).add(pred, truth)
    assert not {'boundary_f1', 'small_iou', 'stuff_miou'} & set(got.summary())
    assert list(got.table()) == ['iou', 'recall', 'precision', 'truth_pixels']

@pytest.mark.parametrize('kw,msg', [(dict(names=[]), 'different strings'), (dict(names=['a', 2]), 'different strings'),
                                    (dict(names='ab'), "'ab'"), (dict(ignore=(0,)), r'\[0\]'),
                                    (dict(boundary=-1), 'boundary'), (dict(small=True), 'small'),
                                    (dict(boundary=float('nan')), 'boundary'), (dict(stuff=['c']), "unknown class 'c'")])
def test_bad_settings(kw, msg):
    with pytest.raises(ValueError, match=msg): LabelScores(**dict(names=['a', 'b']) | kw)

zeros = lambda *shape: np.zeros(shape, int)

@pytest.mark.parametrize('pred,truth,msg', [
    (zeros(2, 2)/1, zeros(2, 2), 'float64'), (zeros(2, 2) > 0, zeros(2, 2), 'bool'), (zeros(2, 3), zeros(3, 2), 'one shape'),
    (zeros(1, 2, 2), zeros(1, 2, 2), 'label map'), (zeros(2, 2)+255, zeros(2, 2), r'pred: 4 pixels hold \[255\]'),
    (zeros(2, 2), zeros(2, 2)+7, 'truth: 4'), (zeros(0, 2), zeros(0, 2), 'label map'), ('x', zeros(2, 2), 'label map')])
def test_bad_maps(pred, truth, msg):
    s = scores(2)
    with pytest.raises(ValueError, match=msg): s.add(pred, truth)
    assert s.summary()['images'] == 0

def test_bad_merges_and_states():
    for kw in (dict(small=.2), dict(boundary=None), dict(ignore=(255,)), dict(stuff=['class 1'])):
        with pytest.raises(ValueError, match='do not add'): scores(2) + scores(2, **kw)
    with pytest.raises(TypeError): scores(2) + 1
    d = scores(2).to_dict()
    with pytest.raises(ValueError, match='sums: expected'): LabelScores.from_dict(d | dict(sums={}))
    with pytest.raises(ValueError, match='do not fit 3'): LabelScores.from_dict(d | dict(names=['a', 'b', 'c']))

@pytest.mark.parametrize('labels', [zeros(3, 3)+255, np.ones((2, 3, 3)), np.full((1, 2, 2), np.nan), zeros(2, 2)/1, zeros(2, 2) > 0])
def test_entropy_refuses(labels):
    with pytest.raises(ValueError): scene_entropy(labels)
