"`medseg faithfulness` and `medseg train talk2medsam`: files written, calls refused, leaks refused by name."
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from medseg_nb.core import seeded
from medseg_nb.segment import load_segmenter
from test_cli import files, picture, refused, report, run

def table(n=6, splits=('train', 'train', 'train', 'val', 'test', 'test'), path='index.csv', groups=None):
    "Pictures of two discs, each with two texts."
    rows, rng = [], np.random.default_rng(0)
    for i in range(n):
        a = rng.integers(0, 60, (40, 48, 3)).astype(np.uint8)
        for text,x in (('left disc', 34), ('right disc', 10)):
            m = (np.hypot(*(np.mgrid[:40, :48] - np.array([20, x])[:, None, None])) < 7)
            a[m] += 120
            Image.fromarray(m.astype(np.uint8)*255).save(f'{i}_{text[0]}.png')
            rows.append(dict(image=f'{i}.png', mask=f'{i}_{text[0]}.png', text=text, split=splits[i], group=str((groups or range(n))[i])))
        Image.fromarray(a).save(f'{i}.png')
    pd.DataFrame(rows).to_csv(path, index=False)
    return path

def small_sam(folder='small'):
    from medseg_nb.talk2medsam.model import load_sam
    from medseg_nb.sam.pretrained import _quiet
    with seeded(0), _quiet(): load_sam('tiny', pretrained=False).save_pretrained(folder)
    return folder

@pytest.mark.parametrize('verb', ['faithfulness', 'train talk2medsam'])
def test_help(run, verb):
    code, out, err = run(*verb.split(), '--help')
    assert code == 0 and not err and f'Example:\n    medseg {verb} ' in out

def test_faithfulness(run):
    table()
    code, out, err = run('faithfulness', '--index', 'index.csv', '--split', 'test', '--protocol', 'side', '--protocol', 'shuffled', '--protocol', 'constant', '--out', 'f', '--device', 'cpu')
    assert code == 0 and not err and out.startswith('Faithfulness of 4 rows of 2 patients')
    r = report('f')
    assert r['command'].startswith('medseg faithfulness') and [e['image'] for e in r['results']] == ['../4.png']*2 + ['../5.png']*2 and all(0 <= e['dice'] <= 1 for e in r['results'])
    assert {'faithfulness.csv', 'rows.csv', 'page.png', 'faithfulness.json', 'report.json'} == {p.name for p in Path('f').iterdir()}
    assert set(pd.read_csv('f/faithfulness.csv')['protocol']) == {'side', 'shuffled', 'constant'}
    assert json.loads(Path('f/faithfulness.json').read_text())['n_patients'] == 2

def test_one_bad_image(run):
    table()
    Path('5.png').write_text('no picture')
    code, out, err = run('faithfulness', '--index', 'index.csv', '--split', 'test', '--protocol', 'side', '--out', 'f', '--device', 'cpu')
    assert code == 1 and sum('error' in e for e in report('f')['results']) == 2

@pytest.mark.parametrize('says,args', [("Did you mean 'side'", ['--protocol', 'sides']), ("unknown model 'tyni'", ['--model', 'tyni']), ("unknown split 'tset'", ['--split', 'tset']),
                                       ('none.csv', ['--index', 'none.csv']), ("needs", ['--protocol', 'size'])])
def test_refused(run, says, args):
    table()
    refused(run, says, 'faithfulness', *([] if '--index' in args else ['--index', 'index.csv']), *args, '--out', 'f', '--device', 'cpu')

def test_adapter_from_training_to_report(run):
    table(); small_sam()
    call = ('train', 'talk2medsam', '--index', 'index.csv', '--sam', './small', '--adapter', 'hierarchical+dot', '--boxes', 'none', '--epochs', '1', '--out', 'a', '--device', 'cpu')
    code, out, err = run(*call)
    assert code == 0 and not err and 'the adapter is in a/' in out and report('a')['results'][0]['model'] == '.'
    assert {'config.json', 'model.safetensors', 'history.csv', 'training.json', 'report.json'} <= {p.name for p in Path('a').iterdir()}
    seg, = load_segmenter('a', device='cpu')(torch.rand(3, 40, 48), ['left disc'])
    assert tuple(seg.prob.shape) == (1, 40, 48)
    code, out, err = run('faithfulness', '--index', 'index.csv', '--split', 'test', '--model', 'a', '--baseline', 'a', '--protocol', 'side', '--out', 'f', '--device', 'cpu')
    assert code == 0 and Path('f/attribution.csv').exists()

def test_leaks_are_refused_by_name(run):
    table(groups=['p1', 'p2', 'p3', 'p4', 'p5', 'p1']); small_sam()
    call = ('train', 'talk2medsam', '--index', 'index.csv', '--sam', './small', '--boxes', 'none', '--epochs', '1', '--out', 'a', '--device', 'cpu')
    refused(run, "'p1' in test and train", *call)
    assert run(*call, '--leaks')[0] == 0

@pytest.mark.parametrize('says,args', [('pretrained=False', ['--sam', 'tiny']), ("Did you mean 'gated'", ['--adapter', 'gate']), ("Did you mean 'none'", ['--boxes', 'non']), ('--lr', ['--lr', '0']),
                                       ('nothing to train on', None)])
def test_training_refused(run, says, args):
    table(); small_sam()
    refused(run, says, 'train', 'talk2medsam', *(['--sam', './small'] if args is None else ['--index', 'index.csv', *([] if '--sam' in args else ['--sam', './small']), *args]), '--out', 'a', '--device', 'cpu')
