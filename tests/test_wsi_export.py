"Files of a slide that hold for any mask, read back by other programs, and that appear whole or not at all."
import csv, gzip, json, signal, subprocess, sys, tempfile
import numpy as np, openslide, pytest, shapely, tifffile, zarr
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy import ndimage
from medseg_nb.wsi.export import (HALVES, SlideLayer, append_result, label_strips, write_confidence, write_labels, write_metadata,
                                  write_overview, write_png)
from medseg_nb.wsi.geojson import Outline, outlines, rasterize, read_geojson, write_geojson
from medseg_nb.wsi.stitch import GridStore, grid_size

fast = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)
names = ['background', 'tumor', 'stroma', 'fat']

def blobs(seed, h, w, c, smooth):
    "Class indices in blobs with holes, or noise."
    maps = np.random.default_rng(seed).random((c, h, w))
    return np.stack([ndimage.gaussian_filter(m, smooth) for m in maps]).argmax(0).astype(np.uint8)

def layer(seed, w, h, stride, c=3, smooth=1.):
    gh, gw = grid_size((w, h), stride)
    return SlideLayer(blobs(seed, gh, gw, c, smooth), stride, (w, h), .25, names[:c])

def pixels(l, **kw): return np.concatenate([*label_strips(l, **kw)])

@fast
@given(seeds, st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 2, 3, 2.5, 7.3]), st.integers(1, 4),
       st.sampled_from([0, .6, 1.5]), st.integers(1, 20))
def test_outlines_give_the_mask_back(seed, w, h, stride, c, smooth, rows):
    l = layer(seed, w, h, stride, c, smooth)
    mask = pixels(l)
    found = [Outline(names[k], None, 'annotation', p) for k,p in outlines(l, skip=(), rows=rows)]
    assert all(o.polygon.is_valid for o in found)
    assert np.array_equal(rasterize(found, (w, h), names, fill=9), mask)
    for k in range(c):
        mine = [o.polygon for o in found if o.name == names[k]]
        ids, n = ndimage.label(mask == k)
        assert sorted(p.area for p in mine) == sorted(np.bincount(ids.ravel())[1:n+1].tolist())
        around = np.pad(mask == k, 1)
        if len(mine) == 1: assert len(mine[0].interiors) == ndimage.label(~around)[1] - 1

@fast
@given(seeds, st.sampled_from([1, 4, 6.5]))
def test_geojson_survives_the_file(seed, stride):
    l = layer(seed, 120, 100, stride)
    with tempfile.TemporaryDirectory() as d:
        n = write_geojson(f'{d}/a.geojson.gz', l, 'detection')
        back = read_geojson(f'{d}/a.geojson.gz')
        raw = json.loads(gzip.open(f'{d}/a.geojson.gz').read())
    assert len(back) == n and np.array_equal(rasterize(back, (120, 100), names), pixels(l))
    assert raw['type'] == 'FeatureCollection'
    for f in raw['features']:
        about, cls = f['properties'], f['properties']['classification']
        assert about['objectType'] == 'detection' and cls['name'] in names and len(cls['color']) == 3
        for ring in f['geometry']['coordinates']: assert ring[0] == ring[-1] and len(ring) >= 5

@pytest.mark.parametrize('stride', [1, 4, 7.3])
@pytest.mark.parametrize('d', [1, 2, 3.7, 8])
def test_a_pixel_shows_the_cell_below_its_centre(stride, d):
    l = layer(3, 203, 157, stride)
    full = pixels(l)
    at = lambda n: np.minimum(((np.arange(int(np.ceil(n/d)))+.5)*d).astype(int), n-1)
    assert np.array_equal(pixels(l, downsample=d), full[np.ix_(at(157), at(203))])

@fast
@given(seeds, st.integers(0, 3))
def test_simplified_outlines_stay_near(seed, px):
    l = layer(seed, 600, 500, 4, 2, smooth=6)
    found = [Outline(names[k], None, 'annotation', p) for k,p in outlines(l, simplify=px)]
    a, b = rasterize(found, l.size, names) > 0, pixels(l) > 0
    assert all(o.polygon.is_valid for o in found) and (a & b).sum() >= (1 if not px else .97)*(a | b).sum()

def test_any_polygon_is_filled_as_shapely_says():
    rng = np.random.default_rng(0)
    for _ in range(20):
        disc = lambda lo, hi: shapely.Point(*rng.uniform(5, 35, 2)).buffer(rng.uniform(lo, hi))
        p = disc(3, 20).difference(disc(1, 6))
        y, x = np.mgrid[:40, :40] + .5
        want = shapely.contains_xy(p, x.ravel(), y.ravel()).reshape(40, 40)
        assert np.array_equal(rasterize([Outline('tumor', None, '', o) for o in getattr(p, 'geoms', [p])], (40, 40), names) == 1, want)

def test_area_and_holes_can_be_asked_for(tmp_path):
    m = np.zeros((20, 20), np.uint8); m[2:12, 2:12] = 1; m[4, 4] = 0; m[6:9, 6:9] = 0; m[15:17, 15:17] = 1
    l = SlideLayer(m, 2, (40, 40), .5, names[:2])
    count = lambda **kw: [(p.area, len(p.interiors)) for _,p in outlines(l, **kw)]
    assert count() == [(360, 2), (16, 0)] and count(min_area=17) == [(360, 2)] and count(min_area=17, min_hole=5) == [(364, 1)]
    assert write_geojson(tmp_path/'none.geojson', l, min_area=1e6) == 0 and read_geojson(tmp_path/'none.geojson') == []

def test_a_file_of_qupath_is_read(tmp_path):
    square = lambda x: [[[x, 0], [x+4, 0], [x+4, 4], [x, 4], [x, 0]]]
    fs = [dict(type='Feature', id='0', geometry=dict(type='MultiPolygon', coordinates=[square(0), square(8)]),
               properties=dict(objectType='annotation', classification=dict(name='tumor', color=[200, 0, 0]), isLocked=True)),
          dict(type='Feature', geometry=dict(type='Polygon', coordinates=square(20)), properties=dict(objectType='annotation'))]
    (tmp_path/'q.geojson').write_text(json.dumps(fs))
    a = read_geojson(tmp_path/'q.geojson')
    assert [o.name for o in a] == ['tumor', 'tumor', ''] and a[0].color == [200, 0, 0] and a[1].polygon.bounds == (8, 0, 12, 4)

@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 4, 7.3]), st.booleans(), st.sampled_from(['nearest', 'mode']))
def test_pyramids_hold_the_mask(seed, w, h, stride, plain, pyramid):
    l = layer(seed, w, h, stride)
    with tempfile.TemporaryDirectory() as d:
        p = write_labels(f'{d}/m.ome.tiff', l, pyramid=pyramid, plain=plain, tile=64)
        with tifffile.TiffFile(p) as t:
            assert t.is_ome != plain
            levels = [*t.pages] if plain else [t.pages[0], *(t.pages[0].pages or [])]
            assert all(v.is_tiled and v.compression.name == 'ADOBE_DEFLATE' for v in levels)
            got = [v.asarray().reshape(v.imagelength, v.imagewidth) for v in levels]
        want = [pixels(l)]
        while max(want[-1].shape) > 64: want.append(HALVES[pyramid](want[-1]))
        assert len(got) == len(want) and all(np.array_equal(*o) for o in zip(got, want))
        with openslide.OpenSlide(p) as s:
            assert s.level_count == (len(want) if plain else 1) and abs(float(s.properties['openslide.mpp-x']) - .25) < 1e-6
            for k in range(s.level_count): assert np.array_equal(np.array(s.read_region((0, 0), k, s.level_dimensions[k]))[..., 0], want[k])

def test_a_store_goes_everywhere(tmp_path):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), (30, 25)).transpose(2, 0, 1).astype(np.float32)
    store = GridStore.create(tmp_path/'s', p.shape, 'float32')
    store.write(0, p[:, :20]); store.write(20, p[:, 20:])
    a, b = (SlideLayer(o, 8, (199, 233), .5, names[:3]) for o in (GridStore(tmp_path/'s'), p))
    for how in ('nearest', 'bilinear'): assert np.array_equal(pixels(a, how=how), pixels(b, how=how))
    for kw in (dict(), dict(limit=1)):
        out = write_confidence(tmp_path/'confidence_maps', a, **kw)
        o = np.load(out) if out.suffix == '.npz' else zarr.open_group(out, mode='r')
        for c in range(3): assert np.array_equal(o[f'class_{c}'][:], p[c].astype(np.float16))
    assert np.array_equal(np.array(Image.open(write_png(tmp_path/'m.png', a))), p.argmax(0))
    write_geojson(tmp_path/'m.geojson', a)
    assert np.array_equal(rasterize(read_geojson(tmp_path/'m.geojson'), (199, 233), names), pixels(b))

def test_labels_need_no_other_codec(tmp_path):
    code = ("import sys; sys.modules['imagecodecs'] = None\nimport numpy as np, tifffile\n"
            "from medseg_nb.wsi.export import SlideLayer, write_labels\n"
            "m = np.arange(90*70, dtype=np.uint8).reshape(90, 70) % 2\nl = SlideLayer(m, 4, (280, 360), .5, ['a', 'b'])\n"
            "for k in (False, True):\n    p = write_labels(sys.argv[1], l, plain=k, tile=64)\n"
            "    assert (tifffile.imread(p, level=0) == np.kron(m, np.ones((4, 4)))).all()")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path/'m.tiff')], check=True, capture_output=True, text=True)

slow_write = """
import sys, time, numpy as np
from medseg_nb.wsi.export import SlideLayer, write_labels, write_confidence
from medseg_nb.wsi.geojson import write_geojson
class Slow:
    shape, dtype = (2, 400, 400), np.dtype('f4')
    def __getitem__(self, idx):
        print('row', flush=True); time.sleep(.2)
        n = idx[1].stop - idx[1].start
        return np.random.default_rng(0).random((2, n, 400), dtype=np.float32)
out, what = sys.argv[1:]
l = SlideLayer(Slow(), 4, (1600, 1600), .5, ['background', 'b'])
dict(tiff=lambda: write_labels(out+'/m.tiff', l, tile=64),
     zarr=lambda: write_confidence(out+'/c.zarr', l), geojson=lambda: write_geojson(out+'/m.geojson', l))[what]()
"""

@pytest.mark.parametrize('what', ['tiff', 'zarr', 'geojson'])
def test_nothing_is_half_written(tmp_path, what):
    run = [sys.executable, '-W', 'ignore', '-c', slow_write, str(tmp_path), what]
    p = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    p.stdout.readline(); p.stdout.readline()
    p.send_signal(signal.SIGKILL); p.wait()
    assert [f.name for f in tmp_path.iterdir() if not f.name.startswith('.')] == []

def test_an_old_file_stays_when_the_new_one_fails(tmp_path):
    good = layer(0, 100, 90, 4)
    bad = SlideLayer(np.full(good.grid.shape, 3, np.uint8), 4, (100, 90), .5, names[:3])
    for write, name in ((write_labels, 'm.tiff'), (write_png, 'm.png'), (write_geojson, 'm.geojson')):
        write(tmp_path/name, good)
        before = (tmp_path/name).read_bytes()
        with pytest.raises(ValueError, match='class index 3'): write(tmp_path/name, bad)
        assert (tmp_path/name).read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 3

adder = """
import sys
from medseg_nb.wsi.export import append_result
for i in range(20): append_result(sys.argv[1], dict(wsi_name=f'{sys.argv[2]}-{i}, a', num_patches=i, processing_time=.5, model_version='m'))
"""

def test_processes_add_to_one_table(tmp_path):
    path = tmp_path/'batch_results.csv'
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', adder, str(path), k]) for k in 'xy']
    assert [p.wait() for p in ps] == [0]*2
    rows = [*csv.DictReader(path.open(newline=''))]
    assert len(rows) == 40 and {r['wsi_name'] for r in rows} == {f'{k}-{i}, a' for k in 'xy' for i in range(20)}
    assert [f.name for f in tmp_path.iterdir()] == [path.name]

def test_a_torn_line_spoils_only_itself(tmp_path):
    path, row = tmp_path/'b.csv', dict(wsi_name='a', n=1)
    append_result(path, row)
    path.write_text(path.read_text() + 'cut o')
    append_result(path, dict(n=2, wsi_name='b'))
    assert path.read_text().splitlines() == ['wsi_name,n', 'a,1', 'cut o', 'b,2']

def test_metadata_has_the_keys(tmp_path):
    o = write_metadata(tmp_path/'metadata.json', layer(0, 50, 40, 4), 's.svs', 'v1', 9, 1.5, timestamp='2026-01-12T14:30:00Z', gpu='none')
    keys = ['wsi_name', 'model_version', 'num_patches', 'processing_time_sec', 'class_order', 'segmentation_mask', 'confidence_maps',
            'post_processing', 'timestamp']
    assert [*o][:9] == keys and {'mpp', 'stride', 'versions', 'gpu'} <= {*o} and o['timestamp'] == '2026-01-12T14:30:00Z'
    assert json.loads((tmp_path/'metadata.json').read_text()) == o

def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    p = np.full((2, 5, 5), .5, np.float32)
    l = SlideLayer(p, 2, (10, 10), .5, names[:2])
    calls = dict(zarr=lambda: write_confidence(tmp_path/'c.zarr', l), shapely=lambda: write_geojson(tmp_path/'m.geojson', l))
    for module,call in calls.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r'medseg_nb\[wsi\]'): call()
    assert [*tmp_path.iterdir()] == []

def test_overview_of_any_shape(tmp_path):
    l = layer(0, 400, 100, 4)
    for h,w in ((25, 100), (5, 20), (100, 400)):
        im = np.array(Image.open(write_overview(tmp_path/'o.png', l, np.full((h, w, 3), 255, np.uint8), skip=())))
        assert im.shape[0] >= h and im.shape[1] > w

@pytest.mark.parametrize('mpp', [None, 0, -1, float('nan'), '0.5', True])
def test_scale_is_never_guessed(mpp):
    with pytest.raises(ValueError, match='a viewer needs it'): SlideLayer(np.zeros((5, 5), np.uint8), 2, (10, 10), mpp, names[:2])
