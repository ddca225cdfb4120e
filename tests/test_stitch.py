"Blending of tiles that holds for any tiling, in bounded memory, and a store that survives being cut off."
import os, signal, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from medseg_nb.wsi.stitch import GridStore, StripBlender, grid_size, grid_xy, tile_tta, tile_window

fast = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10**6)

def reference(shape, tiles, xy, w, fill):
    "The equation, in double precision, over the whole grid."
    num, den = np.zeros((tiles.shape[1], *shape)), np.zeros(shape)
    g = len(w)
    for t,(x, y) in zip(tiles.astype(np.float64), xy):
        for j in range(max(0, -y), min(g, shape[0]-y)):
            for i in range(max(0, -x), min(g, shape[1]-x)):
                num[:, y+j, x+i] += w[j, i]*t[:, j, i]; den[y+j, x+i] += w[j, i]
    return np.where(den > 0, num/np.where(den > 0, den, 1), fill[:, None, None]), den == 0

def tiling(rng, h, w, g, c):
    "Tiles at random places, some of them over the edge, in row order but for a shuffle of some rows."
    step = int(rng.integers(1, g+3))
    at = np.array([(x, y) for y in range(-int(rng.integers(0, g)), h, step) for x in range(-int(rng.integers(0, g)), w, step)])
    at = at[rng.random(len(at)) < rng.choice([1, .6, .1])] + rng.integers(-1, 2, 2)
    order = np.argsort(at[:, 1] + rng.integers(0, 2*g+1, len(at)), kind='stable') if len(at) else []
    at = at[order].reshape(-1, 2).astype(np.int64)
    return at, rng.dirichlet(np.ones(c), (len(at), g, g)).transpose(0, 3, 1, 2)

@fast
@given(seeds, st.integers(1, 30), st.integers(1, 24), st.integers(1, 9), st.integers(1, 3), st.sampled_from(['gaussian', 'constant']),
       st.sampled_from(['zero', 'nan', 0]), st.sampled_from(['float32', 'float64']), st.integers(1, 7))
def test_strips_equal_the_whole(seed, h, w, g, c, window, fill, dtype, batch):
    rng = np.random.default_rng(seed)
    xy, tiles = tiling(rng, h, w, g, c)
    b = StripBlender((h, w), xy, c, g, window, fill=fill, dtype=dtype, max_rows=h+2*g)
    give = torch.tensor if seed % 2 else np.asarray
    got = list(b.strips((give(tiles[i:i+batch]), xy[i:i+batch]) for i in range(0, len(xy), batch)))
    assert [y for y,_ in got] == np.cumsum([0, *(r.shape[1] for _,r in got)])[:-1].tolist() and sum(r.shape[1] for _,r in got) == h
    vector = np.full(c, np.nan) if fill == 'nan' else np.eye(c)[0]*(fill == 0)
    want, bare = reference((h, w), tiles, xy, tile_window(g, window), vector)
    out = np.concatenate([r for _,r in got], 1)
    assert out.dtype == dtype and b.uncovered == bare.sum()
    np.testing.assert_allclose(out, want, atol=1e-5 if dtype == 'float32' else 1e-12)

@fast
@given(seeds, st.integers(2, 25), st.integers(1, 8), st.data())
def test_any_start_gives_the_same_rows(seed, h, g, draw):
    rng = np.random.default_rng(seed)
    xy, tiles = tiling(rng, h, 11, g, 2)
    start = draw.draw(st.integers(0, h))
    run = lambda s: [*StripBlender((h, 11), xy, 2, g, start=s, max_rows=h+2*g).strips([(tiles, xy)])]
    whole = np.concatenate([r for _,r in run(0)], 1)
    part = run(start)
    assert (start == h and not part) or np.array_equal(np.concatenate([r for _,r in part], 1), whole[:, start:])

def test_rows_leave_as_soon_as_they_can():
    xy = np.array([(0, 0), (6, 0), (0, 6), (6, 6)])
    b = StripBlender((14, 14), xy, 1, 8)
    p = np.ones((1, 1, 8, 8))
    assert list(b.add(p, xy[:1])) == []
    assert [(y, r.shape[1]) for y,r in b.add(p, xy[1:2])] == [(0, 6)]
    assert list(b.add(p, xy[3:])) == []
    assert [(y, r.shape[1]) for y,r in b.add(p, xy[2:3])] == [(6, 8)]

def test_a_gap_costs_no_memory():
    xy = np.array([(0, 0), (0, 90000)])
    b = StripBlender((100000, 8), xy, 1, 8, fill='nan')
    rows = list(b.add(np.ones((1, 1, 8, 8)), xy[:1]))
    assert sum(r.shape[1] for _,r in rows) == 90000 and max(r.shape[1] for _,r in rows) <= 8 and b.nbytes < 1000
    rows += b.add(np.ones((1, 1, 8, 8)), xy[1:])
    assert sum(r.shape[1] for _,r in rows) == 100000 and b.uncovered == 8*(100000-16)

@fast
@given(st.floats(.3, 40), st.integers(1, 300), st.integers(1, 300))
def test_grid_covers_the_slide_and_no_more(stride, w, h):
    gh, gw = grid_size((w, h), stride)
    assert gw*stride >= w - 1e-5 and (gw-1)*stride < w and gh*stride >= h - 1e-5 and (gh-1)*stride < h

@fast
@given(st.integers(1, 60), st.integers(1, 500), st.integers(0, 10**6))
def test_whole_multiples_stay_where_they_are(g, side, k):
    x = round(k*side/g)
    assert grid_xy([(x, x)], side/g)[0].tolist() == [k, k] if side >= g else True

def test_tta_of_an_equivariant_network_changes_nothing():
    net = lambda x: torch.softmax(torch.nn.functional.avg_pool2d(x, 8)*3, 1)
    x = torch.rand(3, 3, 32, 32)
    for s in ('none', 'hflip', 'flips', 'dihedral'): assert torch.allclose(tile_tta(net, s)(x), net(x), atol=1e-6)

memory = """
import sys, resource, tempfile, numpy as np
from medseg_nb.wsi.stitch import GridStore, StripBlender, grid_size
n = int(sys.argv[1])
shape = grid_size((n, n), 4)
xs = [*range(0, shape[0]-56, 42), shape[0]-56]
p = np.random.default_rng(0).dirichlet((1, 1), (64, 56, 56)).transpose(0, 3, 1, 2).astype(np.float32)
xy = np.array([(x, y) for y in xs for x in xs])
with tempfile.TemporaryDirectory() as d:
    b, store = StripBlender(shape, xy, 2, 56), GridStore.create(d, (2, *shape))
    for y0, rows in b.strips((p[:len(xy[i:i+64])], xy[i:i+64]) for i in range(0, len(xy), 64)): store.write(y0, rows)
    read = GridStore(d)
    total = sum(float(read[:, y:y+100].sum()) for y in range(0, shape[0], 100))
    assert abs(total/(shape[0]*shape[1]) - 1) < .01
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='peak memory is read the Linux way')
def test_memory_does_not_grow_with_the_slide():
    def peak(n): # behind a shell: a process inherits the peak of the one that starts it
        run = ['sh', '-c', '"$0" "$@"; exit $?', sys.executable, '-W', 'ignore', '-c', memory, str(n)]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert peak(20000) < 1.1*peak(5000)

cut_off = """
import sys, time, numpy as np
from medseg_nb.wsi.stitch import GridStore
store = GridStore.create(sys.argv[1], (2, 400, 50), 'float32', resume=True, stride=4)
for y in range(store.next_row, 400, 10):
    store.write(y, np.random.default_rng(y).random((2, 10, 50), dtype=np.float32))
    print(y, flush=True); time.sleep(.02)
"""

def test_a_killed_run_is_seen_and_goes_on(tmp_path):
    run = [sys.executable, '-W', 'ignore', '-c', cut_off, str(tmp_path/'s')]
    p = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    for _ in range(7): p.stdout.readline()
    p.send_signal(signal.SIGKILL); p.wait()
    with pytest.raises(ValueError, match='half written.*resume=True'): GridStore(tmp_path/'s')
    part = GridStore(tmp_path/'s', partial=True)
    assert 70 <= part.next_row < 400 and part[:, :70].shape == (2, 70, 50)
    with pytest.raises(ValueError, match='never written'): part[:, 60:]
    subprocess.run(run, check=True, capture_output=True)
    done = GridStore(tmp_path/'s')
    for y in range(0, 400, 10): assert np.array_equal(done[:, y:y+10], np.random.default_rng(y).random((2, 10, 50), dtype=np.float32))

def test_damage_is_told(tmp_path):
    s = GridStore.create(tmp_path/'s', (1, 6, 4), stride=2)
    s.write(0, np.full((1, 6, 4), .5))
    assert GridStore(tmp_path/'s').complete
    journal = tmp_path/'s'/'strips.txt'
    for text in ('0 6', 'x\n0 y\n', '', '0 3\n4 6\n'):
        journal.write_text(text)
        with pytest.raises(ValueError, match='half written'): GridStore(tmp_path/'s')
    part = GridStore.create(tmp_path/'s', (1, 6, 4), resume=True, stride=2)
    assert part.next_row == 3
    journal.write_text('0 3\n4 6\n3')
    part.write(3, np.zeros((1, 1, 4)))
    assert GridStore(tmp_path/'s').complete
    npy = tmp_path/'s'/'grid.npy'
    os.truncate(npy, npy.stat().st_size-1)
    with pytest.raises(ValueError, match='damaged'): GridStore(tmp_path/'s')
    with pytest.raises(ValueError, match='holds another grid: .*stride'): GridStore.create(tmp_path/'s', (1, 6, 4), resume=True, stride=4)

@pytest.mark.parametrize('kw, message', [(dict(n_classes=0), 'n_classes'), (dict(g=0), 'g is the side'),
    (dict(dtype='float16'), 'unknown dtype'), (dict(fill='nothing'), 'unknown fill'), (dict(fill=-1), 'unknown fill'),
    (dict(shape=(0, 3)), 'shape is'), (dict(sigma=0), 'sigma')])
def test_bad_blenders(kw, message):
    good = dict(shape=(9, 9), xy=np.zeros((1, 2), int), n_classes=2, g=4)
    with pytest.raises(ValueError, match=message): StripBlender(**good | kw)

def test_a_refused_batch_changes_nothing():
    xy = np.array([(0, 0), (0, 4)])
    b = StripBlender((8, 4), xy, 1, 4)
    bad = np.ones((2, 1, 4, 4)); bad[1, 0, 2, 2] = np.inf
    with pytest.raises(ValueError, match='NaN or infinite'): b.add(bad, xy)
    with pytest.raises(ValueError, match='announced'): b.add(np.ones((2, 1, 4, 4)), xy[[0, 0]])
    out = np.concatenate([r for _,r in b.strips([(np.ones((2, 1, 4, 4)), xy)])], 1)
    assert (out == 1).all()
