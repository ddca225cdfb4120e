"`medseg detect`, `detect-bench`, `spai-pairs`: files written, calls refused, one bad image among others; and a `Detector` on any image."
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from medseg_nb.core import seeded
from medseg_nb.spai.checkpoint import save_detector
from medseg_nb.spai.detect import Detector, load_detector_for_use
from medseg_nb.spai.scores import Calibration
from medseg_nb.spai.semantic_detector import SemanticDetector, save_semantic
from medseg_nb.spai.spectral import SpectralDetector, tiny_config
from test_cli import files, nifti, picture, png, refused, report, run

@pytest.fixture(scope='session')
def models(tmp_path_factory):
    "Folders with detectors of random weights: one spectral, one with semantics."
    torch.set_num_threads(1)
    d = tmp_path_factory.mktemp('detectors')
    with seeded(0): a, b = SpectralDetector(**tiny_config()), SpectralDetector(**tiny_config())
    save_detector(a, d/'a', threshold=.5, calibration=Calibration(30., 0.).to_dict())
    save_semantic(SemanticDetector(b, 'tiny', dict(approach='local', how='gate')), d/'b')
    return d

def detect(run, models, *args, out='out', model='a'): return run('detect', *args, '--model', models/model, '--out', out, '--device', 'cpu')

@pytest.mark.parametrize('verb', [('detect',), ('detect-bench',), ('spai-pairs',), ('train', 'spai')])
def test_help(run, verb):
    code, out, err = run(*verb, '--help')
    assert code == 0 and not err and f"Usage: medseg {' '.join(verb)}" in out and f"Example:\n    medseg {' '.join(verb)} " in out

def test_detects(run, models):
    picture('a.png', (40, 60)); picture('d/b.jpg', (150, 260)); picture('d/c.png', (50, 50), 'L')
    code, out, err = detect(run, models, 'a.png', 'd')
    assert code == 0 and not err and [l.split()[0] for l in out.splitlines()[1:4]] == ['a.png', 'b.jpg', 'c.png']
    rows, own = report()['results'], load_detector_for_use(models/'a', 'cpu')
    for r,size in zip(rows, ((40, 60), (150, 260), (50, 50))):
        d, = own(str(Path('out', r['image'])))
        assert png(Path('out', r['overlay'])).shape == (*size, 3) and r['patches'] == len(d.grid)
        assert r['score'] == pytest.approx(d.probability, abs=1e-4) and r['generated'] == (r['score'] > .5) and 'semantic' not in r and 'prompt' not in r
    assert rows[0]['image'] == '../a.png' and not [f for f in files() if Path(f).name.startswith('.')]

def test_threshold(run, models):
    picture('a.png', (60, 60))
    said = [(detect(run, models, 'a.png', '--threshold', t, out=f't{i}')[0], report(f't{i}')['results'][0]['generated']) for i,t in enumerate((1e-6, 1-1e-6))]
    assert said == [(0, True), (0, False)]

def test_semantics(run, models):
    picture('a.png', (140, 200)); picture('b.png', (60, 60))
    code, out, err = detect(run, models, 'a.png', 'b.png', '--text', 'a  chest film', model='b')
    rows = report()['results']
    assert code == 0 and not err and [r['prompt'] for r in rows] == ['a chest film']*2 and all(0 <= r['clip_score'] <= 2.5 for r in rows)
    assert png('out/a_semantic.png').shape == png('out/a_spectral.png').shape == (140, 200, 3)

def test_slices(run, models):
    nifti('v.nii.gz', np.random.default_rng(0).random((40, 50, 3)))
    assert detect(run, models, 'v.nii.gz')[0] == 0
    rows = report()['results']
    assert [r['slice'] for r in rows] == [0, 1, 2] and len({r['overlay'] for r in rows}) == 3 and all(Path('out', r['overlay']).exists() for r in rows)
    assert detect(run, models, 'v.nii.gz', '--slice', 1, out='one')[0] == 0
    assert report('one')['results'][0]['score'] == pytest.approx(rows[1]['score'], abs=1e-4)

def test_one_bad_image(run, models):
    picture('a.png', (40, 40)); Path('b.png').write_text('no picture')
    code, out, err = detect(run, models, 'a.png', 'b.png')
    rows = report()['results']
    assert code == 1 and len(err) == 1 and 'b.png' in err[0] and 'score' in rows[0] and 'error' in rows[1] and 'overlay' not in rows[1] and 'failed' in out

def test_all_bad(run, models):
    Path('b.png').write_text('no picture'); Path('c.png').write_text('no picture')
    code, out, err = detect(run, models, 'b.png', 'c.png')
    assert code == 2 and 'none of the 2 images' in err[-1] and not Path('out').exists()

@pytest.mark.parametrize('says,args', [('between 0 and 1', ['--threshold', '1']), ('empty prompt', ['--text', ' ']), ('reads no captions', ['--text', 'x']), ('unknown window', ['--window', 'lnug']),
                                       ("Invalid value for '--bs'", ['--bs', '0']), ("unknown device 'gpu'", ['--device', 'gpu'])])
def test_refused(run, models, says, args):
    picture('a.png', (40, 40))
    refused(run, says, 'detect', 'a.png', '--model', models/'a', '--out', 'out', *args)

def test_refused_models(run, models):
    picture('a.png', (40, 40)); Path('empty').mkdir(); Path('broken').mkdir(); Path('broken/config.json').write_text('{')
    for m,says in (('tny', "Did you mean 'tiny'"), ('./nowhere', 'config.json'), ('./empty', 'config.json'), ('./broken', 'JSON'), (models/'b', 'give --text')):
        if m == './broken': Path('broken/model.safetensors').write_bytes(b'')
        refused(run, says, 'detect', 'a.png', '--model', m, '--out', 'out')
    refused(run, 'gone.png', 'detect', 'gone.png', '--model', models/'a', '--out', 'out')

def real(n=12, side=140):
    rows = []
    for i in range(n):
        rng = np.random.default_rng(i)
        Path('real').mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(f'real/{i}.png')
        rows.append(dict(image=f'{i}.png', text=f'caption {i}', group=f'p{i}', split=('train', 'val', 'test')[i % 3]))
    pd.DataFrame(rows).to_csv('real/index.csv', index=False)

def pairs(run, *args, out='pairs'): return run('spai-pairs', '--index', 'real/index.csv', '--size', 128, *args, '--out', out)

def test_pairs(run):
    real()
    code, out, err = pairs(run, '--generators', 'bicubic,transposed', '--unseen', 'denoise')
    assert code == 0 and not err
    df = pd.read_csv('pairs/pairs.csv')
    assert set(df[df.split == 'test'].generator) == {'real', 'bicubic', 'transposed', 'denoise'} and set(df[df.split != 'test'].generator) == {'real', 'bicubic', 'transposed'}
    assert all(png(Path('pairs', p)).shape == (128, 128, 3) for p in df.image) and len(pd.read_csv('pairs/audit.csv')) == 3
    stamp = {p: Path('pairs', p).stat().st_mtime_ns for p in df.image}
    assert pairs(run, '--generators', 'bicubic,transposed', '--unseen', 'denoise')[0] == 0 and stamp == {p: Path('pairs', p).stat().st_mtime_ns for p in df.image}
    code, out, err = pairs(run, '--generators', 'bicubic')
    assert code == 2 and len(err) == 1 and 'other settings' in err[0]

@pytest.mark.parametrize('says,args', [("Did you mean 'bicubic'", ['--generators', 'bicubc']), ('all generators are --unseen', ['--generators', 'bicubic', '--unseen', 'bicubic']), ('is empty', ['--generators', ' , ']),
                                       ("unknown codec 'bmp'", ['--codec', 'bmp']), ("Invalid value for '--size'", ['--size', '8']), ('would leave the trace', ['--size', '256', '--generators', 'bicubic'])])
def test_pairs_refused(run, says, args):
    real(3)
    before = files()
    code, out, err = pairs(run, *args, out='new')
    assert code == 2 and len(err) == 1 and says in err[0], err
    assert [f for f in files() if f not in before and not f.startswith('new')] == []

def test_bench(run, models):
    real()
    assert pairs(run, '--generators', 'bicubic', '--unseen', 'transposed')[0] == 0
    code, out, err = run('detect-bench', '--index', 'pairs/pairs.csv', '--model', models/'b', '--baseline', models/'a', '--resamples', 50, '--out', 'bench')
    assert code == 0 and not err and 'captions of others' in out
    assert {p.name for p in Path('bench').iterdir()} == {'report.json', 'evaluation.json', 'scores.csv', 'generators.csv', 'sources.csv', 'controls.csv', 'differences.csv'}
    rows, g = report('bench')['results'], pd.read_csv('bench/generators.csv', index_col=0)
    assert len(rows) == 12 and {r['generator'] for r in rows} == {'real', 'bicubic', 'transposed'} and str(g.loc['transposed', 'seen']) == 'False'
    assert np.isclose(pd.read_csv('bench/controls.csv', index_col=0).loc['detector', 'auc'], g.loc['mean all', 'auc'])

def test_bench_one_bad_image(run, models):
    real()
    pairs(run, '--generators', 'bicubic', '--unseen', 'transposed')
    bad = pd.read_csv('pairs/pairs.csv').query("split == 'test' and generator == 'bicubic'").image.iloc[0]
    Path('pairs', bad).write_text('no picture')
    code, out, err = run('detect-bench', '--index', 'pairs/pairs.csv', '--model', models/'a', '--no-controls', '--robustness', '--resamples', 20, '--out', 'bench')
    assert code == 1 and len(err) == 1 and Path(bad).name in err[0] and sum('error' in r for r in report('bench')['results']) == 1
    assert not Path('bench/controls.csv').exists() and len(pd.read_csv('bench/robustness.csv')) > 10

@pytest.mark.parametrize('says,args', [('gone.csv', ['--index', 'gone.csv']), ('lacks label', ['--index', 'real/index.csv']), ("Did you mean 'test'", ['--index', 'pairs.csv', '--split', 'tset']),
                                       ('a label is 0', ['--index', 'odd.csv'])])
def test_bench_refused(run, models, says, args):
    real(3)
    df = pd.DataFrame(dict(image=['real/0.png', 'real/1.png'], label=[0, 1], generator=['real', 'x'], source='s', pair='p', group='g', split='test', text=''))
    df.to_csv('pairs.csv', index=False); df.assign(label='fake').to_csv('odd.csv', index=False)
    refused(run, says, 'detect-bench', *args, '--model', models/'a', '--out', 'bench')

@pytest.mark.parametrize('says,args', [("Did you mean 'tiny'", ['--model', 'tyni']), ("unknown --semantic 'globl'", ['--semantic', 'globl']), ("unknown --how 'gat'", ['--how', 'gat']), ('above 0', ['--lr', '0']),
                                       ('give --semantic', ['--semantic-loss', 'maximise']), ('gone.csv', ['--index', 'gone.csv'])])
def test_train_refused(run, says, args):
    real(3)
    refused(run, says, 'train', 'spai', '--index', 'real/index.csv', '--out', 'model', *args)

def test_trains_with_semantics(run):
    real()
    assert pairs(run, '--generators', 'bicubic', '--unseen', 'transposed')[0] == 0
    code, out, err = run('train', 'spai', '--index', 'pairs/pairs.csv', '--semantic', 'global', '--semantic-loss', 'real_hinge', '--epochs', 1, '--bs', 4, '--device', 'cpu', '--out', 'model')
    assert code == 0 and all('warning' in l for l in err) and 'epoch 1 of 1' in out and report('model')['results'][0]['model'] == '.'
    assert run('detect', 'real', '--text', 'noise', '--model', 'model', '--device', 'cpu', '--out', 'out')[0] == 0
    d = load_detector_for_use('model', 'cpu')
    assert d.calibrated and d.seen == ['bicubic'] and len(report()['results']) == 12
    assert run('detect-bench', '--index', 'pairs/pairs.csv', '--model', 'model', '--resamples', 20, '--no-controls', '--out', 'bench')[0] == 0
    assert json.loads(Path('bench/evaluation.json').read_text())['chosen'] == 'given'

def test_memory_is_bounded(monkeypatch):
    "Patches are cut some at a time, whatever the size of the image."
    from medseg_nb.spai import detect as module
    most, cut = [], module.cut_patches
    monkeypatch.setattr(module, 'cut_patches', lambda x, g: most.append(len(g)) or cut(x, g))
    with seeded(0): d = Detector(SpectralDetector(**tiny_config(), chunk=12), device='cpu')
    assert len(d(torch.rand(3, 900, 700))[0].grid) == 48 and max(most) == 4 and sum(most) == 48

def test_batches_are_nothing():
    with seeded(0): d = Detector(SpectralDetector(**tiny_config()), device='cpu', bs=3)
    images = [torch.rand(3, h, w) for h,w in ((30, 40), (129, 128), (200, 400), (128, 128))]
    for x,a in zip(images, d(images)):
        b, = d(x)
        assert a.logit == pytest.approx(b.logit, abs=1e-5) and torch.allclose(a.attention, b.attention, atol=1e-5) and a.overlay().shape == (*x.shape[1:], 3)
