"`medseg wsi`: slides from a shell, what is refused, what a bad slide costs, what is not done twice."
import csv, json, pickle, sys
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
pytest.importorskip('openslide'); pytest.importorskip('shapely'); pytest.importorskip('distributed')
from medseg_nb.cli_wsi import LoadSegmenter
from medseg_nb.segment import load_segmenter
from medseg_nb.wsi.coordinates import write_coordinates
from medseg_nb.wsi.files import write_pyramid
from medseg_nb.wsi.geojson import rasterize, read_geojson
from medseg_nb.wsi.slides import open_slide
from medseg_nb.wsi.stitch import grid_size
from medseg_nb.wsi.tiles import tile_slide
from test_cli import files, model, picture, png, refused, report, run

def slide(path, size=(150, 200), mpp=.5, seed=0):
    "Coarse colours: tissue everywhere."
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-size[0]//25), -(-size[1]//25), 3), np.uint8)
    return write_pyramid(path, np.ascontiguousarray(coarse.repeat(25, 0).repeat(25, 1)[:size[0], :size[1]]), mpp=mpp, tile=64)

def torn(path): Path(path).write_bytes(slide(f'{path}.whole').read_bytes()[:3000]); Path(f'{path}.whole').unlink()

def segment(run, model, *args, out='out', size=('--size', '64'), prompts=('left lung', 'optic disc')):
    return run('wsi', 'segment', *args, *(o for p in prompts for o in ('--prompt', p)), '--model', model, '--out', out, *size, '--all-tissue', '--overlap', '0', '--device', 'cpu')

@pytest.mark.parametrize('verb', ['', 'info', 'tissue', 'segment'])
def test_help(run, verb):
    code, out, err = run('wsi', *verb.split(), '--help')
    assert code == 0 and not err and f'Usage: medseg wsi {verb}'.strip() in out
    assert not verb or f'Example:\n    medseg wsi {verb} slides' in out

def test_info(run):
    slide('s/a.tif'); slide('s/b.tif', mpp=None); picture('s/c.png', (40, 60)); Path('s/notes.txt').write_text('no slide')
    code, out, err = run('wsi', 'info', 's')
    lines = [l.split() for l in out.splitlines()]
    assert code == 0 and not err and [l[:5] for l in lines[1:]] == [['a.tif', '200x150', '3', '0.5', 'tiff'], ['b.tif', '200x150', '3', 'unknown', 'tiff'], ['c.png', '60x40', '1', 'unknown', 'picture']]
    code, out, err = run('wsi', 'info', 's/b.tif', '--mpp', '.25')
    assert code == 0 and out.splitlines()[1].split()[3] == '0.25'
    torn('s/d.tif')
    code, out, err = run('wsi', 'info', 's')
    assert code == 1 and len(err) == 1 and "'s/d.tif'" in err[0] and [l.split()[1] for l in out.splitlines()[1:]] == ['200x150', '200x150', '60x40', 'failed']

def test_info_refuses(run):
    torn('a.tif'); torn('b.tif'); slide('c.tif'); Path('bare').mkdir()
    refused(run, 'cut off', 'wsi', 'info', 'a.tif')
    code, out, err = run('wsi', 'info', 'a.tif', 'b.tif')
    assert code == 2 and not out and len(err) == 3 and err[-1] == 'medseg: error: none of the 2 slides can be read'
    for says,*args in (("no file or folder 'no.tif'", 'no.tif'), ("no slides in 'bare'", 'bare'), ('says 0.5 micron per pixel, mpp=0.25 contradicts it: leave --mpp out', 'c.tif', '--mpp', '.25'),
                       ('--mpp', 'c.tif', '--mpp', '30'), ("Missing argument 'slide'",)): refused(run, says, 'wsi', 'info', *args)

def test_tissue(run):
    glass = np.full((700, 1010, 3), 240, np.uint8)
    glass[100:500, 300:900] = (200, 90, 160)
    write_pyramid('s/a.tif', glass, mpp=.5); write_pyramid('s/empty.tif', glass[:90].copy(), mpp=.5); torn('s/cut.tif'); slide('s/none.tif', mpp=None)
    code, out, err = run('wsi', 'tissue', 's', '--out', 'out')
    assert code == 1 and len(err) == 2 and 'does not know its microns per pixel' in err[1] and err[1].endswith('give --mpp')
    r = report()['results']
    assert [Path(e['image']).name for e in r] == ['a.tif', 'cut.tif', 'empty.tif', 'none.tif'] and ['error' in e for e in r] == [False, True, False, True]
    a, empty = r[0], r[2]
    assert list(a) == ['image', 'prompt', 'mask', 'annotations', 'overlay', 'area_fraction', 'stride', 'mpp', 'seconds'] and a['prompt'] == 'tissue'
    mask = png(f"out/{a['mask']}")
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255} and mask.shape == grid_size((1010, 700), a['stride'])
    assert a['area_fraction'] == pytest.approx((mask > 0).mean(), abs=1e-6) == pytest.approx(400*600/700/1010, rel=.1)
    drawn = rasterize(read_geojson(f"out/{a['annotations']}"), (1010, 700), ['background', 'tissue'], a['stride'])
    assert (drawn*255 == mask).all() and png(f"out/{a['overlay']}").shape[2] == 3
    assert empty['area_fraction'] == 0 and read_geojson(f"out/{empty['annotations']}") == []
    assert run('wsi', 'tissue', 's/none.tif', '--mpp', '.5', '--out', 'one')[0] == 0 and report('one')['results'][0]['mpp'] == .5

def test_tissue_refuses(run):
    slide('none.tif', mpp=None); torn('cut.tif')
    refused(run, 'give --mpp', 'wsi', 'tissue', 'none.tif', '--out', 'deep/out')
    refused(run, 'cut off', 'wsi', 'tissue', 'cut.tif', '--out', 'deep/out')
    refused(run, 'cannot write', 'wsi', 'tissue', 'none.tif', '--out', 'none.tif/out')

def test_segment(run, model):
    slide('s/a.tif'); torn('s/b.tif'); slide('s/c.tif', (64, 64), seed=1)
    code, out, err = segment(run, model, 's')
    assert code == 1 and len(err) == 1 and "cannot open 's/b.tif'" in err[0] and out.splitlines()[0].startswith('a.tif: 12 tiles, ') and out.splitlines()[1].startswith('c.tif: 1 tiles, ')
    r = report()
    assert r['command'].startswith('medseg wsi segment s --prompt ') and [(e['image'], e['prompt']) for e in r['results']] == [(f'../s/{n}.tif', p) for n in 'abc' for p in ('left lung', 'optic disc')]
    assert ['error' in e for e in r['results']] == [False, False, True, True, False, False] and "'../s/b.tif'" in r['results'][2]['error'] and str(Path.cwd()) not in r['results'][2]['error']
    for e in (e for e in r['results'] if 'error' not in e):
        assert list(e) == ['image', 'prompt', 'labels', 'probability', 'annotations', 'overlay', 'classes', 'area_fraction', 'tiles', 'seconds']
        assert all(Path('out', e[k]).is_file() for k in ('labels', 'probability', 'annotations', 'overlay')) and e['classes'] == ['background', 'left lung', 'optic disc']
        with open_slide(f"out/{e['labels']}") as s: got = s.read(0, 0, s.size)[..., 0]
        assert e['area_fraction'] == pytest.approx((got == e['classes'].index(e['prompt'])).mean(), abs=.02)
    x = torch.from_numpy(open_slide('s/c.tif').read(0, 0, 64)).permute(2, 0, 1).float()/255
    p = F.avg_pool2d(load_segmenter(model, device='cpu')([x], ['left lung', 'optic disc'])[0].prob[None], 4)[0]
    p = torch.cat((1-p.amax(0, keepdim=True), p)).numpy()
    cells = got[2::4, 2::4]
    assert (got == cells.repeat(4, 0).repeat(4, 1)).all() and len(np.unique(cells)) > 1
    assert (p.max(0) - np.take_along_axis(p, cells[None].astype(int), 0)[0]).max() < 1/255
    assert [r['status'] for r in csv.DictReader(Path('out/batch_results.csv').open())] == ['done', 'failed', 'done']

def test_what_is_done_is_not_done_again(run, model):
    slide('a.tif'); slide('b.tif', seed=1)
    assert segment(run, model, 'a.tif')[0] == 0
    before = {p: p.stat().st_mtime_ns for p in Path('out/a').iterdir()}
    code, out, err = segment(run, model, 'a.tif')
    assert code == 0 and not err and out.startswith('a.tif: was done before\n') and {p: p.stat().st_mtime_ns for p in Path('out/a').iterdir()} == before
    assert all(e['skipped'] and e['area_fraction'] >= 0 for e in report()['results']) and len(Path('out/batch_results.csv').read_text().splitlines()) == 2
    assert segment(run, model, 'a.tif', 'b.tif')[0] == 0 and [e.get('skipped', False) for e in report()['results']] == [True, True, False, False]
    code, out, err = segment(run, model, 'a.tif', '--min-area', '50', '--no-geojson', '--no-confidence', '--plain', '--morphology', 'open', '--refine', 'guided')
    e = report()['results'][0]
    assert code == 0 and 'skipped' not in e and 'annotations' not in e and 'probability' not in e and Path('out', e['plain']).is_file()
    assert segment(run, model, 'a.tif', prompts=['left lung'])[0] == 0 and report()['results'][0]['classes'] == ['background', 'left lung']

def test_coordinates(run, model):
    for n in 'ab': slide(f's/{n}.tif')
    two = tile_slide(open_slide('s/a.tif'), 64, .5).iloc[[0, 5]].drop(columns='slide')
    for n in 'ab': Path('c').mkdir(exist_ok=True); write_coordinates(f'c/{n}.npy', two)
    base = ('--prompt', 'left lung', '--model', model, '--out', 'out', '--device', 'cpu')
    assert run('wsi', 'segment', 's', '--coords', 'c', *base)[0] == 0 and [e['tiles'] for e in report()['results']] == [2, 2]
    assert run('wsi', 'segment', 's/a.tif', '--coords', 'c/a.npy', *base)[0] == 0 and report()['results'][0]['skipped']
    refused(run, "'c/a.npy' is one file for 2 slides", 'wsi', 'segment', 's', '--coords', 'c/a.npy', *base)
    refused(run, '--size is for tiles that are cut here', 'wsi', 'segment', 's', '--coords', 'c', '--size', '64', *base)
    refused(run, "no file or folder 'd' of coordinates", 'wsi', 'segment', 's', '--coords', 'd', *base)
    Path('c/b.csv').write_text('x,y\n0,0\n')
    refused(run, "several files are the coordinates of 'b': b.csv, b.npy", 'wsi', 'segment', 's', '--coords', 'c', *base)
    for p in Path('c').glob('b.*'): p.unlink()
    refused(run, "1 of 2 slides have no coordinates in 'c', the first: 'b'", 'wsi', 'segment', 's', '--coords', 'c', *base)
    Path('c/a.npy').write_bytes(b'\x93NUMPYno'); Path('out/a').rename('elsewhere')
    refused(run, 'a.npy', 'wsi', 'segment', 's/a.tif', '--coords', 'c', *base[:-3], 'other', *base[-2:])

@pytest.mark.parametrize('says,args', [
    ("unknown model 'tinny'. Did you mean 'tiny'?", ('--model', 'tinny')), ('empty prompt', ('--prompt', ' ')), ('holds no word', ('--prompt', '?')),
    ("'background' is the class of what no prompt claims", ('--prompt', 'background')), ("'x' came 2 times", ('--prompt', 'x', '--prompt', 'x')),
    ("in [0, 1), got 1", ('--overlap', '1')), ("in [0, 1), got -0.1", ('--overlap', '-.1')), ("in [0, 1), got nan", ('--overlap', 'nan')),
    ('--size is a multiple of 4 pixels, got 65', ('--size', '65')), ('--size', ('--size', '0')), ("unknown refinement 'gided'. Did you mean 'guided'?", ('--refine', 'gided')),
    ("unknown morphology 'opn'. Did you mean 'open'?", ('--morphology', 'opn')), ("unknown scheduler 'locl'. Did you mean 'local'?", ('--scheduler', 'locl')),
    ('--workers is for --scheduler local', ('--workers', '3')), ('--min-area', ('--min-area', '-1')), ("unknown device 'gpu'", ('--device', 'gpu')), ("unknown mode 'txt'", ('--mode', 'txt')),
    ('0.5 micron per pixel, mpp=0.1 is finer: tiles are not enlarged, give a larger --tile-mpp', ('--tile-mpp', '.1')),
    ('leave --slide-mpp out', ('--slide-mpp', '2')), ('cannot write', ('--out', 'a.tif/out')), ("no file or folder 'b.tif'", ('b.tif',))])
def test_segment_checks_the_call(run, model, says, args):
    slide('a.tif')
    base = dict(zip(('--prompt', '--model', '--out', '--size'), ('disc', str(model), 'out', '64')))
    refused(run, says, 'wsi', 'segment', 'a.tif', *args, *(o for k,v in base.items() if k not in args for o in (k, v)))

def test_segment_refuses_slides(run, model):
    slide('none.tif', mpp=None); slide('a.tif'); slide('x/a.tif'); torn('cut.tif'); write_pyramid('glass.tif', np.full((150, 200, 3), 240, np.uint8), mpp=.5)
    base = ('--prompt', 'disc', '--model', model, '--out', 'deep/out', '--size', '64')
    refused(run, 'give --slide-mpp', 'wsi', 'segment', 'none.tif', *base)
    refused(run, 'lower --least, or give --all-tissue', 'wsi', 'segment', 'glass.tif', *base)
    refused(run, 'stand for several slides', 'wsi', 'segment', 'a.tif', 'x/a.tif', *base)
    before = files()
    code, out, err = run('wsi', 'segment', 'none.tif', 'cut.tif', *base)
    assert code == 2 and not out and len(err) == 3 and err[-1] == 'medseg: error: none of the 2 slides gave a result' and files() == before

def test_nothing_of_anyone_else_is_replaced(run, model):
    "Some scanners keep the pixels of NAME.mrxs in a folder NAME beside it."
    slide('a.tif'); Path('a').mkdir(); Path('a/Data0001.dat').write_text('pixels')
    refused(run, "'a' holds no results of a slide", 'wsi', 'segment', 'a.tif', '--prompt', 'disc', '--model', model, '--out', '.')

@pytest.mark.parametrize('name,args', [('shapely', ()), ('zarr', ()), ('distributed', ('--scheduler', 'local'))])
def test_missing_packages(run, model, monkeypatch, name, args):
    slide('a.tif'); monkeypatch.setitem(sys.modules, name, None)
    refused(run, f"""needs the package '{name}': pip install "medseg_nb[wsi]\"""", 'wsi', 'segment', 'a.tif', '--prompt', 'disc', '--model', model, '--out', 'out', *args)
    if name == 'shapely': refused(run, 'medseg_nb[wsi]', 'wsi', 'tissue', 'a.tif', '--out', 'out')

def test_zero_shot(run):
    slide('a.tif', (64, 64))
    code, out, err = run('wsi', 'segment', 'a.tif', '--prompt', 'optic disc', '--mode', 'zeroshot', '--size', '64', '--all-tissue', '--out', 'out', '--device', 'cpu')
    assert code == 0 and not err and report()['results'][0]['tiles'] == 1

def test_the_loader_can_be_sent(model, tmp_path):
    a, b = (LoadSegmenter(str(model), ('left lung',), device='cpu') for _ in range(2))
    assert hash(a) == hash(b) and pickle.loads(pickle.dumps(a)) == a and a().name == b().name
    other = tmp_path/Path(model).name; other.mkdir()
    for f in Path(model).iterdir(): (other/f.name).write_bytes(f.read_bytes())
    c = json.loads((other/'config.json').read_text()); (other/'config.json').write_text(json.dumps(dict(c, threshold=.4)))
    assert LoadSegmenter(str(other), ('left lung',), device='cpu')().name != a().name

@pytest.mark.slow
def test_workers(run, model):
    for i in range(2): slide(f's/{i}.tif', seed=i)
    torn('s/2.tif')
    code, out, err = segment(run, model, 's', '--scheduler', 'local', '--workers', '2')
    assert code == 1 and ['error' in e for e in report()['results']] == [False]*4 + [True]*2 and any("'s/2.tif'" in l for l in err)
    for f in Path('s').iterdir(): assert segment(run, model, f, out='alone')[0] == (2 if f.stem == '2' else 0)
    for n in '01':
        a, b = (open_slide(f'{o}/{n}/segmentation_mask.ome.tiff').read(0, 0, (200, 150)) for o in ('out', 'alone'))
        assert (a == b).all()
