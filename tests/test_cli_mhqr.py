"`medseg mhqr` and `medseg mhqr-bench`: files written, calls refused, one bad image among others, a bench that goes on."
import json
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from test_cli import files, picture, png, refused, report, run

def mhqr(run, *args, out='out'): return run('mhqr', *args, '--out', out, '--device', 'cpu')

@pytest.mark.parametrize('verb', ['mhqr', 'mhqr-bench'])
def test_help(run, verb):
    code, out, err = run(verb, '--help')
    assert code == 0 and not err and f'Usage: medseg {verb}' in out and f'Example:\n    medseg {verb} ' in out
    for o in ('context', 'queries', 'decoder', 'merger', 'crf'): assert f'--no-{o}' in out

def test_labels(run):
    picture('a.png', (40, 60)); picture('b.jpg', (50, 50))
    code, out, err = mhqr(run, 'a.png', 'b.jpg', '--classes', 'left lung,right lung', '--background', 'bone, soft tissue', '--queries', '--decoder', '--merger', '--scales', '.5,1')
    assert code == 0 and not err and [l.split()[0] for l in out.splitlines()[1:3]] == ['a.png', 'b.jpg']
    rows = report()['results']
    for r,size in zip(rows, ((40, 60), (50, 50))):
        labels = png(Path('out', r['labels']))
        assert labels.shape == size and labels.dtype == np.uint8 and r['classes'] == ['left lung', 'right lung', 'background']
        share = np.bincount(labels.ravel(), minlength=3)/labels.size
        assert np.allclose(share, r['area_fraction'], atol=1e-5) and Path('out', r['overlay']).exists()
        assert set(r['steps']) >= {'dense', 'context', 'queries', 'proposer', 'decoder', 'merger'} and r['queries'] >= r['accepted']
    assert rows[0]['image'] == '../a.png' and not [f for f in files() if Path(f).name.startswith('.')]

def test_switches(run):
    picture('a.png', (40, 40))
    said = {}
    for n,args in dict(dense=('--proposer', 'none', '--no-context'), crf=('--proposer', 'none', '--no-context', '--crf'), seeds=('--proposer', 'random-walker', '--rounds', '1'), whole=('--no-queries',)).items():
        assert mhqr(run, 'a.png', '--classes', 'a,b', *args, out=n)[0] == 0
        said[n] = report(n)['results'][0]['steps']
    assert set(said['dense']) == {'dense', 'context'} and 'crf' in said['crf'] and 'proposer' in said['seeds'] and 'proposer' in said['whole']

def test_class_file(run):
    picture('a.png', (40, 40))
    Path('c.txt').write_text('lung, lungs  # both\nbackground: bone, muscle\nheart\n')
    assert mhqr(run, 'a.png', '--class-file', 'c.txt')[0] == 0
    assert report()['results'][0]['classes'] == ['lung', 'background', 'heart']

def test_one_bad_image(run):
    picture('a.png', (40, 40)); Path('b.png').write_text('no picture')
    code, out, err = mhqr(run, 'a.png', 'b.png', '--classes', 'a')
    rows = report()['results']
    assert code == 1 and len(err) == 1 and 'b.png' in err[0] and 'labels' in rows[0] and 'error' in rows[1] and 'labels' not in rows[1]

@pytest.mark.parametrize('says,args', [
    ('give --classes A,B,C or --class-file FILE', []), ('give --classes', ['--classes', 'a', '--class-file', 'c.txt']), ("no file of classes 'c.txt'", ['--class-file', 'c.txt']),
    ("Did you mean 'csa'", ['--classes', 'a', '--attention', 'cas']), ("Did you mean 'prior-walker'", ['--classes', 'a', '--proposer', 'prior_walker']),
    ("numbers parted by commas", ['--classes', 'a', '--scales', '1;2']), ("'a' stands already on", ['--classes', 'a,a']), ('above 0', ['--classes', 'a', '--scales', '0', '--queries']),
    ("unknown encoder 'tyni'", ['--classes', 'a', '--model', 'tyni']), ("Invalid value for '--accept'", ['--classes', 'a', '--accept', '2']), ('tokens', ['--classes', 'a', '--windows', 'token'])])
def test_refused(run, says, args):
    picture('a.png', (40, 40))
    refused(run, says, 'mhqr', 'a.png', *args, '--out', 'out')

def test_no_image(run): refused(run, 'gone.png', 'mhqr', 'gone.png', '--classes', 'a', '--out', 'out')

def voc(n=3):
    "A small VOC of three images."
    rng = np.random.default_rng(0)
    for d in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'): Path('VOC2012', d).mkdir(parents=True)
    for i in range(n):
        picture(f'VOC2012/JPEGImages/{i}.jpg', (40, 48))
        Image.fromarray(rng.integers(0, 21, (5, 6)).astype(np.uint8).repeat(8, 0).repeat(8, 1)).save(f'VOC2012/SegmentationClass/{i}.png')
    Path('VOC2012/ImageSets/Segmentation/val.txt').write_text('\n'.join(map(str, range(n))))

def test_bench(run):
    voc()
    call = ('mhqr-bench', '--data', 'voc21', '--root', 'VOC2012', '--out', 'b')
    code, out, err = run(*call)
    assert code == 0 and not err and 'miou' in out
    made = {p.name for p in Path('b').iterdir()}
    assert made >= {'report.json', 'table.csv', 'classes.csv', 'examples.png', 'rows.jsonl'} and len(report('b')['results']) == 3
    stamp = Path('b/rows.jsonl').read_text()
    assert run(*call)[0] == 0 and Path('b/rows.jsonl').read_text() == stamp # Nothing is done twice
    code, out, err = run(*call, '--crf')
    assert code == 2 and len(err) == 1 and 'crf' in err[0] # Other settings do not mix
    assert run(*call, '--crf', '--fresh', '-n', '2')[0] == 0 and len(report('b')['results']) == 2

def test_bench_ablation(run):
    voc(1)
    code, out, err = run('mhqr-bench', '--data', 'voc21', '--root', 'VOC2012', '--ablation', 'scales', '--rounds', '1', '--out', 'b')
    assert code == 0 and not err and [r['setting'] for r in report('b')['results']] == ['1', '1/2, 1', '1/4, 1/2, 1', '1/8, 1/4, 1/2, 1']
    assert all(r['queries'] for r in report('b')['results']) and not [f for f in files() if '/-' in f]

@pytest.mark.parametrize('says,args', [('Missing option', ['--root', '.']), ("Did you mean 'voc21'", ['--data', 'voc12', '--root', '.']), ('give --root', ['--data', 'ade20k']),
                                       ('JPEGImages', ['--data', 'voc21', '--root', 'VOC2012/JPEGImages']), ("Did you mean 'scales'", ['--data', 'voc21', '--root', 'VOC2012', '--ablation', 'scale'])])
def test_bench_refused(run, says, args):
    voc(1)
    refused(run, says, 'mhqr-bench', *args, '--out', 'b')
