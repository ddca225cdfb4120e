"Coordinates and tiles: hostile files, damaged ones, and any table there and back."
import io, os, pickle, struct, zipfile
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from medseg_nb.wsi.arrays import read_npy
from medseg_nb.wsi.coordinates import COLUMNS, read_coordinates, write_coordinates
from medseg_nb.wsi.slides import open_slide, write_pyramid
from medseg_nb.wsi.tiles import read_tile, read_tiles, super_tiles, tile_slide

FIELDS = [(k, 'i4') for k in ('x', 'y', 'tile_level', 'tile_size_resized', 'tile_size', 'tile_size_lv0')] + [('resize_factor', 'f4'), ('wsi_name', 'O')]
HEAD = b"\x93NUMPY\x01\x00"

def npy(payload, shape=(1,), dtype=FIELDS):
    text = repr(dict(descr=dtype if isinstance(dtype, str) else [tuple(f) for f in dtype], fortran_order=False, shape=shape)).encode() + b'\n'
    return HEAD + struct.pack('<H', len(text)) + text + payload

class Runs:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

def hostile(path):
    "Pickles that would make a folder if they were run."
    call = str(path).encode()
    p = b'cos\nmkdir\n'
    return dict(reduce=pickle.dumps(Runs(path)), proto2=pickle.dumps(Runs(path), 2), in_a_list=pickle.dumps([(0, 0, 0, 1, 1, 1, 1., Runs(path))]),
                text=p + b"(S'" + call + b"'\ntR.", inst=b"(S'" + call + b"'\nios\nmkdir\n.", obj=b'(' + p + b"S'" + call + b"'\no.",
                newobj=b'\x80\x04' + p + b"(S'" + call + b"'\nt\x81.", builtins=b"cbuiltins\neval\n(S'__import__(\"os\").mkdir(\"" + call + b"\")'\ntR.",
                ext=b'\x80\x02\x82\x01.', persistent=b'Px\n.', getattr=b'cbuiltins\ngetattr\n.', dotted=b'\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.')

@pytest.mark.parametrize('kind', sorted(hostile('x')))
def test_nothing_in_a_file_is_run(tmp_path, kind):
    harm, path = tmp_path/'harm', tmp_path/'tiles.npy'
    path.write_bytes(npy(hostile(harm)[kind]))
    with pytest.raises(ValueError, match='tiles.npy.*(refused|no array)'): read_coordinates(path)
    assert not harm.exists()

def test_bare_object_arrays_and_zipped_ones(tmp_path):
    harm = tmp_path/'harm'
    a = np.array([Runs(harm)], object)
    np.save(tmp_path/'a.npy', a, allow_pickle=True)
    np.savez(tmp_path/'b.npz', x=a, y=a)
    for n in ('a.npy', 'b.npz'):
        with pytest.raises(ValueError, match=n): read_coordinates(tmp_path/n, size=8, mpp=1., level=0)
    assert not harm.exists()

@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_after_the_header(junk, at):
    a = np.zeros(2, FIELDS)
    a['wsi_name'] = 'case'
    f = io.BytesIO()
    np.save(f, a, allow_pickle=True)
    raw = bytearray(f.getvalue())
    at = min(raw.index(b'\n')+1+at, len(raw))
    raw[at:at+len(junk)] = junk
    try: assert len(read_npy(io.BytesIO(bytes(raw)))['x']) == 2
    except ValueError: pass

def test_declared_sizes_are_not_believed(tmp_path):
    h5py = pytest.importorskip('h5py')
    for n, raw in {'huge.npy': npy(b'', (10**12, 2), '<i8'), 'short.npy': npy(b'1234', (3, 2), '<i8')}.items():
        (tmp_path/n).write_bytes(raw)
        with pytest.raises(ValueError, match=f'{n}.*cut off'): read_coordinates(tmp_path/n, size=8, mpp=1., level=0)
    with h5py.File(tmp_path/'huge.h5', 'w') as f:
        f.create_dataset('coords', (10**10, 2), 'i8', chunks=(2**16, 2), compression='gzip').attrs.update(patch_size=8, patch_level=0)
    assert (tmp_path/'huge.h5').stat().st_size < 10_000
    with pytest.raises(ValueError, match='huge.h5.*more than'): read_coordinates(tmp_path/'huge.h5', mpp=1.)

def test_zip_bombs(tmp_path):
    def archive(name, **arrays):
        with zipfile.ZipFile(tmp_path/name, 'w', zipfile.ZIP_DEFLATED) as z:
            for k, v in arrays.items(): z.writestr(f'{k}.npy', v)
        return tmp_path/name
    zeros = npy(bytes(2**25), (2**22,), '<i8')
    with pytest.raises(ValueError, match='zip bomb'): read_coordinates(archive('a.npz', x=zeros, y=zeros), size=8, mpp=1., level=0)
    small = npy(bytes(80), (10,), '<i8')
    assert len(read_coordinates(archive('b.npz', x=small, y=small, bomb=zeros), size=8, mpp=1., level=0)) == 10   # what is not wanted stays packed
    lies = bytearray(archive('c.npz', x=zeros, y=small).read_bytes())
    for head, at in ((b'PK\x01\x02', 24), (b'PK\x03\x04', 22)): struct.pack_into('<I', lies, lies.index(head)+at, 208)
    (tmp_path/'c.npz').write_bytes(lies)
    with pytest.raises(ValueError, match='c.npz'): read_coordinates(tmp_path/'c.npz', size=8, mpp=1., level=0)

@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_table_there_and_back(tmp_path_factory, data):
    n, whole = data.draw(st.integers(1, 30)), st.integers(0, 2**31-1)
    size = data.draw(st.integers(1, 2048))
    factor = data.draw(st.integers(1, 16))
    t = pd.DataFrame({c: np.array(data.draw(st.lists(whole, min_size=n, max_size=n)), np.int64) for c in 'xy'})
    t = t.assign(level=data.draw(st.integers(0, 9)), read_size=size*factor, size=size, size_lv0=size*factor*4, mpp=data.draw(st.floats(.01, 100)))
    names = st.text(st.characters(codec='utf-8', exclude_characters='\0./\\', exclude_categories=['Cs']), min_size=1, max_size=9)
    if data.draw(st.booleans()): t['slide'] = data.draw(st.lists(names, min_size=n, max_size=n))
    path = tmp_path_factory.mktemp('t')/'t.npy'
    back = read_coordinates(write_coordinates(path, t))
    pd.testing.assert_frame_equal(back, t, check_exact=True)
    assert not np.load(path, allow_pickle=False).dtype.hasobject

def test_a_failed_write_leaves_what_was_there(tmp_path):
    t = pd.DataFrame({c: [1] for c in COLUMNS})
    write_coordinates(tmp_path/'t.npy', t)
    for bad in (t.assign(x=2**40), t.assign(x=.5), t.drop(columns='level')):
        with pytest.raises(ValueError): write_coordinates(tmp_path/'t.npy', bad)
    assert len(read_coordinates(tmp_path/'t.npy')) == 1 and [p.name for p in tmp_path.iterdir()] == ['t.npy']

def test_missing_and_unlike_anything(tmp_path):
    with pytest.raises(FileNotFoundError): read_coordinates(tmp_path/'no.npy')
    bad = dict(empty=b'', junk=bytes(range(256)), words=b'hello world\nand more', zip=b'PK\x03\x04junk', h5=b'\x89HDF\r\n\x1a\njunk', npy=HEAD)
    for name, raw in bad.items():
        (tmp_path/name).write_bytes(raw)
        with pytest.raises(ValueError, match=name): read_coordinates(tmp_path/name, size=8, mpp=1., level=0)

@settings(max_examples=20, deadline=None)
@given(st.integers(16, 200), st.floats(.25, 2.), st.sampled_from([0, .25, .5, .9]), st.integers(1, 8), st.integers(0, 10**6))
def test_batches_equal_single_tiles(field, size, mpp, overlap, super_tile, seed):
    t = tile_slide(field, size, mpp, overlap)
    t = t.sample(min(len(t), 25), random_state=seed).reset_index(drop=True)
    got = {int(i): x for k, xs in read_tiles(field, t, workers=3, super_tile=super_tile, bs=7) for i, x in zip(k, xs)}
    assert sorted(got) == list(range(len(t))) and all(np.array_equal(got[r.Index], read_tile(field, r)) for r in t.itertuples())

@pytest.fixture(scope='module')
def field(tmp_path_factory):
    a = np.random.default_rng(0).integers(0, 256, (700, 900, 3)).astype(np.uint8)
    return open_slide(write_pyramid(tmp_path_factory.mktemp('f')/'field.tif', a, mpp=.25, tile=64))

def test_a_reader_that_stops_early_ends_its_threads(field):
    import threading
    before = threading.active_count()
    batches = read_tiles(field, tile_slide(field, 32), workers=4, super_tile=2)
    next(batches); batches.close()
    assert threading.active_count() == before

def test_large_tiles_are_not_grouped(field):
    t = tile_slide(field, 128)
    assert max(map(len, super_tiles(field, t, k=8, most=300))) <= 4 and len(super_tiles(field, t, k=8, most=100)) == len(t)
