"Slides: what needs other processes, missing packages, damaged files or large ones."
import multiprocessing as mp, os, pickle, subprocess, sys
import numpy as np, pytest, tifffile
from hypothesis import given, settings, strategies as st
from PIL import Image
from medseg_nb.wsi.slides import open_slide, tissue_mask, write_pyramid

W, H = 701, 523
N = np.arange(W*H).reshape(H, W)
NUMBERS = np.stack([N >> 16, N >> 8 & 255, N & 255], -1).astype(np.uint8)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('slides')
    write_pyramid(d/'tiled.tif', NUMBERS, mpp=.5, tile=64, how='first')
    tifffile.imwrite(d/'strips.tif', NUMBERS, photometric='rgb', compression='zlib', rowsperstrip=19)
    tifffile.imwrite(d/'planes.tif', NUMBERS.transpose(2, 0, 1), photometric='rgb', planarconfig='separate', tile=(64, 48))
    Image.fromarray(NUMBERS).save(d/'picture.png')
    with tifffile.TiffWriter(d/'sub.ome.tif') as t:
        t.write(NUMBERS, subifds=1, tile=(64, 64), photometric='rgb', compression='zlib', metadata=dict(axes='YXS', PhysicalSizeX=.25, PhysicalSizeY=.25))
        t.write(NUMBERS[::2, ::2], tile=(64, 64), photometric='rgb', compression='zlib', subfiletype=1)
    return d

def expected(a, x, y, w, h):
    out = np.full((h, w, 3), 255, np.uint8)
    ys, xs = np.arange(y, y+h), np.arange(x, x+w)
    iy, ix = (ys >= 0) & (ys < a.shape[0]), (xs >= 0) & (xs < a.shape[1])
    out[np.ix_(iy, ix)] = a[np.ix_(ys[iy], xs[ix])]
    return out

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(['tiled.tif', 'strips.tif', 'planes.tif', 'picture.png', 'sub.ome.tif']), st.integers(-300, 900), st.integers(-300, 800),
       st.integers(1, 300), st.integers(1, 300), st.integers(0, 3))
def test_any_region(folder, name, x, y, w, h, level):
    with open_slide(folder/name, mpp=None) as s:
        level = min(level, len(s.levels)-1)
        d = int(s.downsamples[level])
        assert np.array_equal(s.read(x*d, y*d, (w, h), level), expected(NUMBERS[::d, ::d], x, y, w, h))

def test_openslide_agrees(folder):
    pytest.importorskip('openslide')
    ours, theirs = open_slide(folder/'tiled.tif'), open_slide(folder/'tiled.tif', backend='openslide')
    assert ours.backend == 'tiff' and theirs.backend == 'openslide' and ours.levels == theirs.levels and theirs.mpp == pytest.approx(.5)
    for x, y in ((0, 0), (333, 222), (-9, 500)): assert np.array_equal(ours.read(x, y, 101), theirs.read(x, y, 101))

def _read(args): return args[0].read(*args[1:])

@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_other_processes(folder, method):
    if method not in mp.get_all_start_methods(): pytest.skip(f'no {method} here')
    s = open_slide(folder/'tiled.tif')
    jobs = [(s, 97*k, 61*k, 130, k % 2) for k in range(6)]
    with mp.get_context(method).Pool(2) as pool: got = pool.map(_read, jobs)
    assert all(np.array_equal(a, _read(j)) for a, j in zip(got, jobs))

def test_a_forked_slide_reads_by_itself(folder):
    if not hasattr(os, 'fork'): pytest.skip('no fork here')
    s = open_slide(folder/'tiled.tif')
    s.read(0, 0, 8)
    r, wr = os.pipe()
    pid = os.fork()
    if not pid:
        ok = all(np.array_equal(s.read(x, 11, 99), expected(NUMBERS, x, 11, 99, 99)) for x in range(0, 600, 7))
        os.write(wr, b'1' if ok else b'0'); os._exit(0)
    same = all(np.array_equal(s.read(x, 11, 99), expected(NUMBERS, x, 11, 99, 99)) for x in range(0, 600, 7))
    os.waitpid(pid, 0)
    assert same and os.read(r, 1) == b'1'

def test_pickle_keeps_what_was_said(folder):
    s = open_slide(folder/'strips.tif', mpp=.4)
    t = pickle.loads(pickle.dumps(s))
    assert t.mpp == .4 and t.path == s.path and np.array_equal(t.read(5, 6, 7), s.read(5, 6, 7))

WITHOUT = """import sys
for n in {without!r}: sys.modules[n] = None
from medseg_nb.wsi.slides import open_slide
try: s = open_slide({path!r}); print(s.backend, s.read(3, 4, 5)[0, 0].tolist())
except Exception as e: print(type(e).__name__, e)"""

def without(path, *names):
    r = subprocess.run([sys.executable, '-c', WITHOUT.format(without=names, path=str(path))], capture_output=True, text=True, timeout=300)
    assert not r.returncode, r.stderr
    return r.stdout.strip()

def test_without_packages(folder, tmp_path):
    bare = 'openslide', 'imagecodecs', 'zarr'
    assert without(folder/'tiled.tif', *bare) == f'tiff {NUMBERS[4, 3].tolist()}'
    assert without(folder/'sub.ome.tif', *bare) == f'tiff {NUMBERS[4, 3].tolist()}'
    Image.fromarray(NUMBERS).save(tmp_path/'lzw.tif', compression='tiff_lzw')
    assert without(tmp_path/'lzw.tif', *bare) == f'picture {NUMBERS[4, 3].tolist()}'

def test_without_packages_says_what_to_install(tmp_path):
    pytest.importorskip('imagecodecs')
    tifffile.imwrite(tmp_path/'jpeg.tif', NUMBERS, tile=(64, 64), photometric='ycbcr', compression='jpeg')
    out = without(tmp_path/'jpeg.tif', 'openslide', 'imagecodecs')
    assert out.startswith('ImportError') and 'pip install "medseg_nb[wsi]"' in out and 'jpeg.tif' in out
    if _has_openslide(): assert without(tmp_path/'jpeg.tif', 'imagecodecs').startswith('openslide')

def _has_openslide():
    try: import openslide; return True
    except ImportError: return False

@settings(max_examples=40, deadline=None)
@given(st.sampled_from(['tiled.tif', 'sub.ome.tif', 'picture.png']), st.floats(0, 1), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5))
def test_damaged_files_say_so(folder, tmp_path_factory, name, part, flips):
    raw = bytearray((folder/name).read_bytes())
    for at, v in flips: raw[min(int(at*600), len(raw)-1)] = v
    raw = raw[:max(1, int(part*len(raw)))]
    path = tmp_path_factory.mktemp('bad')/name
    path.write_bytes(raw)
    try:
        with open_slide(path) as s: s.read(0, 0, min(200, *s.size))
    except (ValueError, ImportError) as e: assert name in str(e) and len(str(e)) < 1500

def test_cut_off_is_found_at_opening(folder, tmp_path):
    raw = (folder/'tiled.tif').read_bytes()
    for part in (.1, .5, .9):
        (tmp_path/'cut.tif').write_bytes(raw[:int(part*len(raw))])
        with pytest.raises(ValueError, match='cut off'): open_slide(tmp_path/'cut.tif')

def test_pixel_bombs(tmp_path):
    Image.new('1', (20_000, 20_000)).save(tmp_path/'bomb.png')
    with pytest.raises(ValueError, match='bomb.png'): open_slide(tmp_path/'bomb.png')
    tifffile.imwrite(tmp_path/'one.tif', shape=(14_000, 14_000, 3), dtype=np.uint8, photometric='rgb', rowsperstrip=14_000)
    with pytest.raises(ValueError, match='too large to unpack'): open_slide(tmp_path/'one.tif')

def test_oblong_pixels(tmp_path):
    tifffile.imwrite(tmp_path/'a.tif', NUMBERS, photometric='rgb', tile=(64, 64), resolution=(20_000, 10_000), resolutionunit='CENTIMETER')
    for mpp in (None, .5):
        with pytest.raises(ValueError, match='only square'): open_slide(tmp_path/'a.tif', mpp=mpp)

def test_units_of_ome(tmp_path):
    for unit, v in (('µm', .25), ('nm', 250.), ('mm', .00025)):
        scale = dict(axes='YXS', PhysicalSizeX=v, PhysicalSizeXUnit=unit, PhysicalSizeY=v, PhysicalSizeYUnit=unit)
        tifffile.imwrite(tmp_path/'u.ome.tif', NUMBERS, photometric='rgb', tile=(64, 64), metadata=scale)
        assert open_slide(tmp_path/'u.ome.tif').mpp == pytest.approx(.25)
    scale = dict(axes='YXS', PhysicalSizeX=1, PhysicalSizeXUnit='pixel')
    tifffile.imwrite(tmp_path/'u.ome.tif', NUMBERS, photometric='rgb', tile=(64, 64), metadata=scale)
    with pytest.raises(ValueError, match='pass mpp='): open_slide(tmp_path/'u.ome.tif').mpp

def test_tissue_needs_a_scale_or_a_size(folder):
    with pytest.raises(ValueError, match='pass mpp='): tissue_mask(open_slide(folder/'picture.png'))
    mask, scale = tissue_mask(open_slide(folder/'picture.png'), longest=100)
    assert max(mask.shape) == 100 and scale == pytest.approx(7.01)

BIG = """import resource, sys, numpy as np
from medseg_nb.wsi.slides import open_slide, write_pyramid
def rows(y0, y1, n=20_000):
    a = np.zeros((y1-y0, n, 3), np.uint8)
    a[..., 0], a[..., 1] = (np.arange(y0, y1)[:, None] >> 6), (np.arange(n) >> 6)
    return a
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
s = open_slide(write_pyramid(sys.argv[1], rows, mpp=.25, size=(20_000, 20_000)))
s.read(9_999, 15_000, 512); t = s.thumbnail(500)
assert t.shape == (500, 500, 3) and s.read(12_800, 6_400, 1)[0, 0].tolist() == [100, 200, 0], t.shape
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)//1024)"""

@pytest.mark.slow
def test_twenty_thousand_square_in_little_memory(tmp_path):
    if sys.platform != 'linux': pytest.skip('counts memory as Linux does')
    r = subprocess.run([sys.executable, '-c', BIG, str(tmp_path/'big.tif')], capture_output=True, text=True, timeout=600)
    assert not r.returncode, r.stderr
    assert int(r.stdout) < 700, r.stdout   # mapped pages of the scratch files count too; level 0 alone is 1144 MiB

@pytest.mark.parametrize('mute', ['disabled', 'level', 'all'])
def test_a_cut_file_is_seen_by_who_logs_nothing(tmp_path, mute):
    "Whether a file was cut is told by tifffile's log, also where that is switched off."
    import logging
    log = logging.getLogger('tifffile')
    write_pyramid(tmp_path/'a.tif', np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8), mpp=.5)
    (tmp_path/'cut.tif').write_bytes((tmp_path/'a.tif').read_bytes()[:-200_000])
    try:
        if mute == 'disabled': log.disabled = True
        if mute == 'level': log.setLevel(logging.CRITICAL)
        if mute == 'all': logging.disable(logging.CRITICAL)
        with pytest.raises(ValueError, match='cut off'): open_slide(tmp_path/'cut.tif')
    finally: log.disabled = False; log.setLevel(logging.NOTSET); logging.disable(logging.NOTSET)
