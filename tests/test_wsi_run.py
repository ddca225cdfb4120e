"A cohort of slides: several workers, a lost one, a slide that is stopped in the middle, memory."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
pytest.importorskip('openslide'); pytest.importorskip('distributed')
from medseg_nb.wsi.files import write_pyramid
from medseg_nb.wsi.run import SlideRun, run_slides, segment_slide
from medseg_nb.wsi.slides import open_slide
from wsi_nets import Dark, Load

FILES = ('segmentation_mask.ome.tiff', 'confidence_maps.npz', 'annotations.geojson', 'visualization.png')
run = SlideRun(size=64, mpp=.5, tissue=None, bs=16)

@pytest.fixture(scope='module')
def slides(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('slides'), np.random.default_rng(0)
    for i in range(5):
        coarse = rng.integers(0, 256, (10, 13, 3), np.uint8)
        write_pyramid(folder/f's{i}.tif', coarse.repeat(50, 0).repeat(50, 1), mpp=.5)
    return sorted(folder.iterdir())

def same(a, b):
    for n in FILES:
        x, y = (open_slide(o/n).read(0, 0, 400) if n.endswith('tiff') else dict(np.load(o/n)) if n.endswith('npz') else (o/n).read_bytes() for o in (a, b))
        if isinstance(x, dict): assert set(x) == set(y) and all(np.array_equal(x[k], y[k]) for k in x)
        else: assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, n

def test_workers_and_a_lost_one(slides, tmp_path):
    "Three processes, one of which is killed in its work, leave what one process leaves."
    alone = run_slides(slides, Load(), tmp_path/'one', run, device='cpu')
    many = run_slides(slides, Load(str(tmp_path/'killed')), tmp_path/'three', run, scheduler='local', n_workers=3, device='cpu')
    assert (tmp_path/'killed').exists()
    assert [r['status'] for r in alone] == [r['status'] for r in many] == ['done']*5
    for p in slides: same(tmp_path/'one'/p.stem, tmp_path/'three'/p.stem)
    assert not [p for p in (tmp_path/'three').iterdir() if p.name.startswith('.')]
    assert [r['status'] for r in run_slides(slides, Load(), tmp_path/'three', run, device='cpu')] == ['there']*5
    assert len((tmp_path/'three'/'batch_results.csv').read_text().splitlines()) == 6

def test_a_scheduler_by_address(slides, tmp_path):
    "Workers that somebody else has started."
    import distributed
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        rows = run_slides(slides[:2], Load(), tmp_path, run, scheduler=cluster.scheduler_address, device='cpu')
    assert [r['status'] for r in rows] == ['done', 'done']

def test_bad_slides_cost_their_rows(slides, tmp_path):
    (tmp_path/'cut.tif').write_bytes(slides[0].read_bytes()[:3000]); (tmp_path/'empty.svs').touch()
    np.save(tmp_path/'far.npy', np.array([[10**6, 0]])); np.save(tmp_path/'ok.npy', np.array([[0, 0]]))
    rows = run_slides([slides[0], tmp_path/'cut.tif', tmp_path/'empty.svs', slides[1]], Dark(), tmp_path/'out', run, device='cpu')
    assert [r['status'] for r in rows] == ['done', 'failed', 'failed', 'done']
    assert 'cut.tif' in rows[1]['error'] and 'empty.svs' in rows[2]['error'] and '\n' not in rows[1]['error']
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['batch_results.csv', 's0', 's1']
    [row] = run_slides([slides[0]], Dark(), tmp_path/'far', run, coordinates={'s0': tmp_path/'far.npy'}, device='cpu')
    assert row['status'] == 'failed' and row['error'], row

def test_other_settings_are_another_run(slides, tmp_path):
    segment_slide(slides[0], Dark(), tmp_path, run, device='cpu')
    assert segment_slide(slides[0], Dark(), tmp_path, run, device='cpu')['skipped']
    other = segment_slide(slides[0], Dark(), tmp_path, SlideRun(size=64, mpp=.5, tissue=None, morphology='open'), device='cpu')
    assert 'skipped' not in other and other['post_processing']['morphology'] == 'open'

def test_a_folder_of_something_else_is_kept(slides, tmp_path):
    (tmp_path/slides[0].stem).mkdir(); (tmp_path/slides[0].stem/'scan.dat').write_text('x')
    with pytest.raises(ValueError, match='no folder of results'): segment_slide(slides[0], Dark(), tmp_path, run, device='cpu')
    assert (tmp_path/slides[0].stem/'scan.dat').read_text() == 'x'

BIG = """
import sys, resource, numpy as np
sys.path.insert(0, {tests!r})
from medseg_nb.wsi.run import SlideRun, segment_slide
from wsi_nets import Dark
said = segment_slide({slide!r}, Dark(), {out!r}, SlideRun(size=512, mpp=.5, tissue=None, bs=8, overlap=0., downsample=4, confidence=False, geojson=False), device='cpu')
print(said['num_patches'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, flush=True)
"""

def big(folder, side):
    grain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    tile = grain.repeat(8, 0).repeat(8, 1)
    row = np.tile(tile, (1, -(-side//512), 1))[:, :side]
    write_pyramid(folder/f'{side}.tif', lambda a, b: np.concatenate([row]*(-(-(b-a)//512) + 1))[a % 512:a % 512 + b-a], mpp=.5, size=(side, side))
    return folder/f'{side}.tif'

def call(folder, slide, out): return [sys.executable, '-c', BIG.format(tests=str(Path(__file__).parent), slide=str(slide), out=str(out))]

def test_a_large_slide(tmp_path):
    "20,480 pixels on a side: memory as for 5,120, and a run that is killed in the middle goes on to the same files."
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parents[1]))
    small, large = (big(tmp_path, s) for s in (5120, 20480))
    peak = [int(subprocess.run(call(tmp_path, s, tmp_path/'whole'), env=env, capture_output=True, text=True, check=True).stdout.split()[1]) for s in (small, large)]
    assert peak[1] < 1.1*peak[0], peak
    p = subprocess.Popen(call(tmp_path, large, tmp_path/'cut'), env=env)
    journal = lambda: next((tmp_path/'cut').glob('.20480.*/grid/strips.txt'), None) if (tmp_path/'cut').exists() else None
    until = time.time() + 300
    while p.poll() is None and time.time() < until and not ((j := journal()) and len(j.read_text().splitlines()) > 3): time.sleep(.05)
    assert p.poll() is None, 'it was over before it could be killed'
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/'cut'/'20480').exists()
    done = subprocess.run(call(tmp_path, large, tmp_path/'cut'), env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) == 1600
    said = json.loads((tmp_path/'cut'/'20480'/'metadata.json').read_text())
    assert said['spent']['tiles'] < 1600
    a, b = (open_slide(tmp_path/o/'20480'/'segmentation_mask.ome.tiff') for o in ('whole', 'cut'))
    assert a.size == b.size == (5120, 5120) and np.array_equal(a.read(0, 0, 5120), b.read(0, 0, 5120))
