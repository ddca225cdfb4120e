"The command: exit codes, one line on stderr, and what is left behind."
import csv, json, shlex, subprocess, sys
import nibabel as nib, numpy as np, pytest, tifffile, torch
from pathlib import Path
from PIL import Image
from pydicom.data import get_testdata_file
from medseg_nb import cli, packs
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.core import seeded
from medseg_nb.fmiseg.learner import PromptedFMISeg
from medseg_nb.fmiseg.model import FMISeg, TINY

rng = np.random.default_rng(0)
AFFINE = np.array([[-1.5, .1, 0, 30], [.1, 1.5, .2, -20], [0, -.2, 4, 7], [0, 0, 0, 1]])

@pytest.fixture(scope='session')
def model(tmp_path_factory):
    "A folder with a model of random weights whose masks are neither empty nor full."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('model')
    with seeded(1): m = PromptedFMISeg(FMISeg(**TINY), load_encoder('tiny', pretrained=False), train_text=True)
    for h in m.net.heads.values(): h.out.weight.data *= 30
    m.save_pretrained(folder, size=64)
    return folder

@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    "Call `medseg` in an empty folder: exit code, stdout, lines of stderr."
    monkeypatch.chdir(tmp_path)
    def _run(*args):
        code = cli.main(args)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()
    return _run

def picture(path, size=(20, 30), mode='RGB'):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).convert(mode).save(path)
    return path

def nifti(path, a, affine=AFFINE): nib.save(nib.Nifti1Image(np.asarray(a, np.float32), affine), path); return path
def report(out='out'): return json.loads(Path(out, 'report.json').read_text(encoding='utf-8'))
def files(): return sorted(p.as_posix() for p in Path('.').rglob('*'))
def png(path): return np.asarray(Image.open(path))

def refused(run, says, *args):
    "The call is refused in one line, and writes nothing."
    before = files()
    code, out, err = run(*args)
    assert code == 2 and out == '' and len(err) == 1, (code, out, err)
    assert err[0].startswith('medseg: error: ') and says in err[0], err
    assert files() == before

def test_starts_fast_and_light():
    look = "import sys, medseg_nb.cli; print([m for m in ('torch', 'fastai', 'numpy', 'matplotlib', 'pandas', 'timm', 'monai') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', look], capture_output=True, text=True).stdout.strip() == '[]'

@pytest.mark.parametrize('verb', [(), ('segment',), ('demo',), ('train',), ('train', 'fmiseg'), ('evaluate',), ('saliency',), ('finetune-clip',), ('data',), ('data', 'list'), ('data', 'get'), ('info',)])
def test_help(run, verb):
    for flag in ('--help', '-h'):
        code, out, err = run(*verb, flag)
        assert code == 0 and not err and 'Usage: medseg' in out
    assert verb in ((), ('train',), ('data',)) or 'Example:\n    medseg ' + ' '.join(verb) in out

def test_version(run):
    assert run('--version') == (0, 'medseg_nb 0.1.0\n', [])
    code, out, err = run()
    assert code == 2 and 'Usage' in out

@pytest.mark.parametrize('args,says', [
    (('segmnt', 'a.png'), "No such command 'segmnt'"), (('train',), 'Missing command'), (('segment',), 'image'),
    (('segment', 'a.png', '--out', 'o'), '--prompt'), (('segment', 'a.png', '--prompt', 'x'), '--out'),
    (('segment', 'a.png', '--prompt', 'x', '--out', 'o', '--bs', '0'), '--bs'), (('demo', '--wrong'), '--wrong'),
    (('segment', 'a.png', '--prompt', 'x', '--out', 'o', '--threshold', 'high'), '--threshold')])
def test_usage(run, args, says): refused(run, says, *args)

@pytest.mark.parametrize('says,args', [
    ('empty prompt', ('--prompt', ' ')), ('holds no word', ('--prompt', '...')), ('empty prompt', ('--prompt', 'left lung', '--prompt', '')),
    ('between 0 and 1, got 1', ('--threshold', '1')), ('between 0 and 1, got -0.5', ('--threshold', '-.5')),
    ('between 0 and 1, got nan', ('--threshold', 'nan')),
    ("unknown model 'tinny'. Did you mean 'tiny'?", ('--model', 'tinny')), ('no folder', ('--model', 'no/such/model')),
    ('no config.json', ('--model', 'empty')), ("Did you mean 'lung'", ('--window', 'lungs')), ('(centre, width)', ('--window', '40,')),
    ("'a.png' is PNG: a window is for DICOM and NIfTI", ('--window', 'lung')), ('index=1', ('--index', '1')),
    ("cannot write to 'a.png/out'", ('--out', 'a.png/out')), ("cannot write to 'a.png'", ('--out', 'a.png')), ('--out is empty', ('--out', ''))])
def test_segment_checks_the_call(run, model, says, args):
    picture('a.png'); Path('empty').mkdir()
    base = dict(zip(('--prompt', '--model', '--out'), ('disc', str(model), 'out')))
    refused(run, says, 'segment', 'a.png', *args, *(o for k,v in base.items() if k not in args for o in (k, v)))

@pytest.mark.parametrize('says,args', [
    ("unknown mode 'zeroshoot'. Did you mean 'zeroshot'? Options: text, prior, zeroshot", ('--mode', 'zeroshoot')),
    ('train one with medseg_nb.fmiseg.prior.train_prior', ('--mode', 'prior')), ('class FMISeg, which has no image tower', ('--mode', 'zeroshot')),
    ("unknown encoder 'tinny'. Did you mean 'tiny'?", ('--mode', 'zeroshot', '--model', 'tinny')), ('no folder', ('--mode', 'zeroshot', '--model', 'no/such')),
    ("mode 'text' makes no maps", ('--encoder', 'tiny')), ("mode 'text' makes no maps", ('--method', 'nib')),
    ("unknown saliency method 'gradcan'. Did you mean 'gradcam'?", ('--mode', 'zeroshot', '--model', 'tiny', '--method', 'gradcan')), ('the model is the encoder', ('--mode', 'zeroshot', '--encoder', 'tiny', '--model', 'tiny'))])
def test_segment_checks_the_mode(run, model, says, args):
    picture('a.png')
    refused(run, says, 'segment', 'a.png', '--prompt', 'disc', '--out', 'out', *args, *(() if '--model' in args else ('--model', str(model))))

@pytest.mark.parametrize('flag', ['--uncertainty', '--tta'])
def test_uncertainty(run, model, flag):
    picture('a.png', (33, 50))
    for out,more in (('plain', ()), ('out', (flag,))):
        assert run('segment', 'a.png', '--prompt', 'left lung', '--model', model, '--out', out, *more)[0] == 0
    [plain], [e] = report('plain')['results'], report()['results']
    assert 'uncertainty' not in plain and png(f"out/{e['uncertainty']}").dtype == np.uint16 and png(f"out/{e['uncertainty']}").shape == (33, 50)
    if flag == '--uncertainty': assert e['area_fraction'] == plain['area_fraction'] and e.get('score') == plain.get('score')

def test_hybrid(run, model):
    picture('a.png', (33, 50))
    for limit,who in ((0, 'proposer'), (1, 'segmenter')):
        assert run('segment', 'a.png', '--prompt', 'left lung', '--model', model, '--hybrid', 'random-walker', '--doubt', limit, '--out', 'out')[0] == 0
        [e] = report()['results']
        assert e['by'] == who and e['doubt'] > 0 and png(f"out/{e['uncertainty']}").shape == (33, 50)
    for says,args in (("unknown proposer 'sem'. Did you mean 'sam'?", ('--hybrid', 'sem')), ("Invalid value for '--doubt'", ('--hybrid', 'random-walker', '--doubt', 2))):
        refused(run, says, 'segment', 'a.png', '--prompt', 'left lung', '--model', model, '--out', 'no', *args)

def test_zero_shot(run):
    picture('a.png', (33, 50))
    code, out, err = run('segment', 'a.png', '--prompt', 'left lung', '--prompt', 'optic disc', '--mode', 'zeroshot', '--method', 'gradcam', '--out', 'out')
    assert code == 0 and not err
    for e,p in zip(report()['results'], ('left lung', 'optic disc')):
        assert e['prompt'] == p and 'score' not in e and png(f"out/{e['mask']}").shape == (33, 50) and png(f"out/{e['probability']}").dtype == np.uint16

def test_prior_mode(run, tmp_path):
    from medseg_nb.clip.saliency import encoder_fingerprint
    with seeded(1): m = PromptedFMISeg(FMISeg(**TINY, prior='concat'), load_encoder('tiny', pretrained=False), train_text=True)
    m.save_pretrained(tmp_path/'mapped', size=64, prior=dict(encoder='tiny', fingerprint=encoder_fingerprint(load_encoder('tiny')), method='gradient', settings={}))
    picture('a.png')
    code, out, err = run('segment', 'a.png', '--prompt', 'left lung', '--model', 'mapped', '--mode', 'prior', '--out', 'out')
    assert code == 0 and not err and 'score' in report()['results'][0]
    code, out, err = run('segment', 'a.png', '--prompt', 'left lung', '--model', 'mapped', '--out', 'text')
    assert code == 0 and len(err) == 1 and err[0].startswith('medseg: warning: ') and "mode 'prior' makes them" in err[0]

def bad_images():
    return dict(text=('text.png', lambda p: Path(p).write_text('hello'), 'cannot identify'), none=('none.png', lambda p: None, "no file or folder 'none.png'"),
                empty=('empty.png', lambda p: Path(p).touch(), '0 bytes'), folder=('bare', lambda p: Path(p).mkdir(), 'no images in'),
                truncated=('cut.png', lambda p: Path(p).write_bytes(Path(picture('whole.png')).read_bytes()[:600]), 'cannot read'),
                zero=('zero.nii', lambda p: nifti(p, np.zeros((4, 0, 4))), 'cannot read'),
                dot=('dot.png', lambda p: Image.new('L', (1, 1)).save(p), '1x1 pixels'), nan=('nan.nii', lambda p: nifti(p, np.full((4, 4, 4), np.nan)), 'NaN'),
                five=('five.nii.gz', lambda p: nifti(p, np.zeros((4, 4, 4, 1, 2))), '5-D'), four=('four.nii', lambda p: nifti(p, np.zeros((4, 4, 4, 2))), 'frame=0 to 1'),
                kind=('notes.txt', lambda p: Path(p).write_text('hello'), 'Supported'))

@pytest.mark.parametrize('case', bad_images())
def test_one_bad_image(run, model, case):
    name, make, says = bad_images()[case]
    make(name)
    refused(run, says, 'segment', name, '--prompt', 'disc', '--model', model, '--out', 'deep/out')

def test_one_missing_of_many_is_a_wrong_call(run, model):
    picture('a.png')
    refused(run, "no file or folder 'b.png'", 'segment', 'a.png', 'b.png', '--prompt', 'disc', '--model', model, '--out', 'out')

def test_png(run, model):
    picture('scans/My scan.png', (33, 50)); picture('scans/b.jpg', (20, 30), 'L')
    code, out, err = run('segment', 'scans', '--prompt', 'left  lung', '--prompt', 'Größe?', '--model', model, '--out', 'deep/out')
    assert code == 0 and not err and 'deep/out' in out
    r = report('deep/out')
    assert list(r) == ['version', 'command', 'results'] and r['version'] == '0.1.0' and r['command'].startswith('medseg segment scans --prompt ')
    assert [(e['image'], e['prompt']) for e in r['results']] == [(f'../../scans/{i}', p) for i in ('My scan.png', 'b.jpg') for p in ('left lung', 'Größe?')]
    for e in r['results']:
        assert set(e) == {'image', 'prompt', 'mask', 'probability', 'overlay', 'area_fraction', 'score', 'seconds'}
        size = Image.open(Path('deep/out', e['image'])).size
        mask, prob, over = (Image.open(Path('deep/out', e[k])) for k in ('mask', 'probability', 'overlay'))
        assert mask.size == prob.size == over.size == size and mask.mode == 'L' and over.mode == 'RGB'
        m, p = np.asarray(mask), np.asarray(prob)
        assert set(np.unique(m)) <= {0, 255} and p.dtype == np.uint16
        assert ((m > 0) == (p/65535 > .5)).all()
        assert e['area_fraction'] == pytest.approx((m > 0).mean(), abs=1e-6) and 0 <= e['score'] <= 1 and e['seconds'] >= 0
    named = {Path(e[k]).name for e in r['results'] for k in ('mask', 'probability', 'overlay')}
    assert {p.name for p in Path('deep/out').iterdir()} == named | {'report.json'} and len(named) == 12

def test_threshold_and_rerun(run, model):
    picture('a.png')
    area = []
    for t in ('0.1', '0.9'):
        assert run('segment', 'a.png', '--prompt', 'disc', '--model', model, '--threshold', t, '--out', 'out')[0] == 0
        e, = report()['results']
        assert ((png(f"out/{e['mask']}") > 0) == (png(f"out/{e['probability']}")/65535 > float(t))).all()
        area.append(e['area_fraction'])
    assert area[0] >= area[1] and len(list(Path('out').iterdir())) == 4
    Path('a.png').write_text('broken')
    assert run('segment', 'a.png', '--prompt', 'disc', '--model', model, '--out', 'out')[0] == 2
    assert report()['results'] == [e]

def test_one_bad_of_ten(run, model):
    for i in range(9): picture(f'{i}.png', (16, 16))
    Path('4a.png').write_text('a letter')
    code, out, err = run('segment', '.', '--prompt', 'disc', '--prompt', 'ring', '--model', model, '--out', 'out')
    assert code == 1 and len(err) == 1 and err[0].startswith("medseg: error: cannot read '4a.png'")
    r = report()['results']
    assert len(r) == 20 and [e['image'] for e in r if 'error' in e] == ['../4a.png']*2
    for e in r:
        if 'error' in e: assert set(e) == {'image', 'prompt', 'error', 'seconds'} and '\n' not in e['error']
        else: assert all(Path('out', e[k]).is_file() for k in ('mask', 'probability', 'overlay'))
    assert len(list(Path('out').iterdir())) == 9*2*3 + 1

def test_all_bad(run, model):
    for n in 'ab': Path(f'{n}.png').write_text('a letter')
    before = files()
    code, out, err = run('segment', '.', '--prompt', 'disc', '--model', model, '--out', 'out')
    assert code == 2 and out == '' and files() == before
    assert len(err) == 3 and 'none of the 2 images' in err[-1] and all(l.startswith('medseg: error: ') for l in err)

def test_same_names(run, model):
    for p in ('mon/1.png', 'tue/1.png', 'tue/1.jpg'): picture(p)
    assert run('segment', 'mon', 'tue', 'mon/1.png', '--prompt', 'disc', '--model', model, '--out', 'out')[0] == 0
    masks = [e['mask'] for e in report()['results']]
    assert len(set(masks)) == 3 == len(masks) and all(Path('out', m).is_file() for m in masks)

def test_input_is_not_overwritten(run, model):
    picture('a.png'); picture('a_disc_mask.png')
    was = Path('a_disc_mask.png').read_bytes()
    code, out, err = run('segment', 'a.png', 'a_disc_mask.png', '--prompt', 'disc', '--model', model, '--out', '.')
    assert code == 1 and 'one of the images' in err[0] and Path('a_disc_mask.png').read_bytes() == was

@pytest.mark.parametrize('name', ['v.nii', 'v.nii.gz'])
def test_nifti(run, model, name):
    nifti(name, rng.random((13, 17, 4)))
    code, out, err = run('segment', name, '--prompt', 'disc', '--model', model, '--out', 'out', '--window', '0.5,1')
    e, = report()['results']
    assert (code, err) == (0, []) and e['mask'].endswith('.nii.gz')
    mask, prob = (nib.load(f'out/{e[k]}') for k in ('mask', 'probability'))
    assert (mask.affine == nib.load(name).affine).all() and mask.shape == prob.shape == (13, 17, 4) and mask.get_data_dtype() == np.uint8
    m, p = np.asarray(mask.dataobj), prob.get_fdata()
    assert ((m > 0) == (p > .5)).all() and e['area_fraction'] == pytest.approx(m.mean(), abs=1e-6)
    assert run('segment', name, '--prompt', 'disc', '--model', model, '--out', 'one', '--window', '0.5,1', '--index', '2')[0] == 0
    e, = report('one')['results']
    one = nib.load(f"one/{e['mask']}")
    assert (np.asarray(one.dataobj)[..., 0] == m[..., 2]).all() and e['mask'] == 'v_002_disc_mask.nii.gz'
    refused(run, '0 to 3 exist', 'segment', name, '--prompt', 'disc', '--model', model, '--out', 'no', '--index', '4')

def test_4d_nifti(run, model):
    nifti('v.nii', rng.random((9, 8, 2, 3)))
    assert run('segment', 'v.nii', '--prompt', 'disc', '--model', model, '--out', 'out', '--frame', '1')[0] == 0
    assert nib.load('out/v_disc_mask.nii.gz').shape[:3] == (9, 8, 2)

def test_tiff(run, model):
    tifffile.imwrite('v.tif', rng.integers(0, 65535, (3, 15, 20), np.uint16), photometric='minisblack')
    assert run('segment', 'v.tif', '--prompt', 'disc', '--model', model, '--out', 'out')[0] == 0
    e, = report()['results']
    assert tifffile.imread(f"out/{e['mask']}").shape == (3, 15, 20) and tifffile.imread(f"out/{e['probability']}").dtype == np.uint16

def test_dicom(run, model):
    ct = get_testdata_file('CT_small.dcm')
    assert run('segment', ct, '--prompt', 'disc', '--model', model, '--window', 'bone', '--out', 'out')[0] == 0
    e, = report()['results']
    assert png(f"out/{e['mask']}").shape == (128, 128) and Path('out', e['image']).resolve() == Path(ct).resolve()
    assert json.loads(Path('out', e['geometry']).read_text())['window'] == [400, 1800]

def test_long_prompt(run, model):
    picture('a.png')
    code, out, err = run('segment', 'a.png', '--prompt', 'lung '*10_000, '--model', model, '--out', 'out')
    assert code == 0 and err and all(l.startswith('medseg: warning: ') for l in err) and '10000 words' in err[0]
    assert max(map(len, out.splitlines())) < 300 and len(report()['results'][0]['prompt'].split()) == 128

def test_debug(run, model):
    for args in (('--debug', 'segment', 'a.png', '--prompt', 'x', '--out', 'o'), ('segment', 'a.png', '--prompt', 'x', '--out', 'o', '--debug')):
        code, out, err = run(*args)
        assert code == 2 and err[0].startswith('Traceback') and err[-1] == "medseg: error: no file or folder 'a.png'"

def test_failure_while_saving_leaves_nothing(run, model, monkeypatch):
    from medseg_nb import batch
    picture('a.png')
    def full(*args, **kwargs): Path(args[1], 'half.png').write_text('half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(batch, 'save_segmentation', full)
    refused(run, 'No space left', 'segment', 'a.png', '--prompt', 'disc', '--model', model, '--out', 'deep/out')
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(batch, 'save_segmentation', stop)
    before = files()
    assert run('segment', 'a.png', '--prompt', 'disc', '--model', model, '--out', 'out')[0] == 130 and files() == before

def test_demo(run, model):
    code, out, err = run('demo', '--model', model, '--out', 'out')
    assert code == 0 and not err and 'demo.png' in out
    r = report()['results']
    assert [(Path(e['image']).name, e['prompt']) for e in r] == [(n, p) for n,ps in cli.DEMO.items() for p in ps] and len(r) >= 4
    assert all(Path('out', e[k]).is_file() for e in r for k in ('image', 'mask', 'probability', 'overlay')) and png('out/demo.png').ndim == 3

def index(rows, columns='image,mask,text,split,group', path='index.csv'): Path(path).write_text('\n'.join([columns, *rows])); return path

@pytest.fixture
def cases(run):
    for i in range(3): picture(f'd/{i}.png'); Image.fromarray((np.mgrid[:20, :30][1] < 9+i).astype(np.uint8)*255).save(f'd/{i}_mask.png')
    return index([f'{i}.png,{i}_mask.png,{t},{s},{i}' for i,s in enumerate(('train', 'test', 'test')) for t in ('left side', 'the rest')], path='d/index.csv')

def test_evaluate(run, model, cases):
    code, out, err = run('evaluate', '--index', cases, '--split', 'test', '--model', model, '--out', 'out', '--save-masks')
    assert code == 0 and not err and 'left side' in out
    r = report()['results']
    assert [(e['image'], e['prompt']) for e in r] == [(f'../d/{i}.png', t) for i in (1, 2) for t in ('left side', 'the rest')]
    rows = list(csv.DictReader(Path('out/metrics.csv').open()))
    assert len(rows) == 4
    for e,row in zip(r, rows):
        m, t = png(f"out/{e['mask']}") > 0, png(f"out/{e['image'][:-4]}_mask.png") > 0
        assert e['dice'] == pytest.approx(2*(m & t).sum()/(m.sum() + t.sum()), abs=1e-5) == pytest.approx(float(row['dice']), abs=1e-5)
        assert {'iou', 'area_fraction', 'score', 'seconds'} <= set(e)
    means = json.loads(Path('out/metrics.json').read_text())
    assert means['per_image']['dice'] == pytest.approx(np.mean([e['dice'] for e in r]), abs=1e-5) and set(means['pooled']) == {'dice', 'iou'}

def test_evaluate_goes_on(run, model, cases, tmp_path):
    for bad in ('d/1.png', 'd/2_mask.png'): Path(bad).write_bytes(Path(bad).read_bytes()[:60])
    code, out, err = run('evaluate', '--index', cases, '--model', model, '--out', 'out')
    assert code == 1 and len(err) == 2 and all(l.startswith('medseg: error: ') for l in err)
    r = report()['results']
    assert ['error' in e for e in r] == [False, False, True, True, True, True] and not list(Path('out').glob('*.png'))
    assert "'../d/1.png'" in r[2]['error'] and "'../d/2_mask.png'" in r[4]['error']
    for f in Path('out').iterdir(): assert str(tmp_path) not in f.read_text().replace(shlex.quote(str(model)), '')
    rows = list(csv.DictReader(Path('out/metrics.csv').open()))
    assert [row['truth'] for row in rows] == [f'../d/{i}_mask.png' for i in range(3) for _ in range(2)]

def test_evaluate_where_nothing_can_be_read(run, model, cases):
    for i in range(3): Path(f'd/{i}.png').write_text('a letter')
    refused(run, 'none of the 6 rows could be evaluated', 'evaluate', '--index', cases, '--model', model, '--out', 'out')

def test_evaluate_leaves_rows_without_a_mask_out(run, model, cases):
    some = index(['0.png,0_mask.png,left side,test,0', '1.png,,left side,test,1', '2.png,2_mask.png,,test,2'], path='d/some.csv')
    assert run('evaluate', '--index', some, '--model', model, '--out', 'out')[0] == 0
    assert [e['image'] for e in report()['results']] == ['../d/0.png']
    none = index(['0.png,,left side,test,0'], path='d/none.csv')
    refused(run, 'an image, a mask and a text', 'evaluate', '--index', none, '--model', model, '--out', 'no')

@pytest.mark.parametrize('says,make', [
    ('no index file', lambda: 'nowhere.csv'), ('lacks the column mask', lambda: index(['1.png,left', '2.png,left'], 'image,text', 'd/i.csv')),
    ('not there', lambda: index(['9.png,1_mask.png,left,test,1'], path='d/i.csv')), ('not there', lambda: index(['1.png,9_mask.png,left,test,1'], path='d/i.csv')),
    ('no row', lambda: index([], path='d/i.csv')), ('not a readable CSV', lambda: (Path('d/i.csv').write_bytes(b'\xff\xfe\x00'), 'd/i.csv')[1]),
    ('mask', lambda: (Image.new('L', (7, 5)).save('d/small.png'), index(['1.png,small.png,left,test,1'], path='d/i.csv'))[1])])
def test_evaluate_refuses(run, model, cases, says, make):
    refused(run, says, 'evaluate', '--index', make(), '--model', model, '--out', 'out')

def test_evaluate_names_the_splits(run, model, cases):
    refused(run, "unknown split 'tset'. Did you mean 'test'? Options: test, train", 'evaluate', '--index', cases, '--split', 'tset', '--model', model, '--out', 'out')
    refused(run, "Did you mean 'tiny'", 'evaluate', '--index', cases, '--model', 'tinny', '--out', 'out')
    refused(run, 'cannot write', 'evaluate', '--index', cases, '--model', model, '--out', f'{cases}/out')
    refused(run, 'between 0 and 1', 'evaluate', '--index', cases, '--model', model, '--threshold', '2', '--out', 'out')

def test_train(run, cases, monkeypatch):
    from medseg_nb.fmiseg import learner
    seen = {}
    def train_fmiseg(df, out, **kw): seen.update(kw, rows=len(df), packs=set(df['pack'])); Path(out).mkdir(); kw['progress']('one line')
    monkeypatch.setattr(learner, 'train_fmiseg', train_fmiseg, raising=False)
    code, out, err = run('train', 'fmiseg', '--index', cases, '--out', 'model', '--stage', '64@128,32,1e-3', '--stage', '96,16,5e-4', '--bs', '4', '--seed', '3', '--fresh')
    assert code == 0 and not err and out.startswith('one line') and report('model')['results'][0]['model'] == '.'
    assert [(*s[:3], s.load) for s in seen['stages']] == [(64, 32, .001, 128), (96, 16, .0005, None)] and (seen['bs'], seen['seed'], seen['resume'], seen['rows']) == (4, 3, False, 6) and seen['packs'] == {'d'}
    refused(run, 'nothing to train on', 'train', 'fmiseg', '--out', 'no')
    refused(run, 'a stage', 'train', 'fmiseg', '--index', cases, '--out', 'no', '--stage', '64,32')
    refused(run, "got 'open_clip:ViT-B-32/openai'", 'train', 'fmiseg', '--index', cases, '--out', 'no', '--encoder', 'open_clip:ViT-B-32/openai')
    refused(run, 'no index file', 'train', 'fmiseg', '--index', 'no.csv', '--out', 'no')

def look(run, *args, out='out', method='gradient'):
    return run('saliency', *args, '--prompt', 'left lung', '--prompt', 'optic disc', '--encoder', 'tiny', '--method', method, '--out', out)

def test_saliency(run):
    picture('scans/My scan.png', (33, 50)); picture('scans/b.jpg', (20, 30), 'L')
    code, out, err = look(run, 'scans')
    assert code == 0 and not err and 'b_optic-disc_saliency.png' in out
    r = report()
    assert list(r) == ['version', 'command', 'results'] and r['command'].startswith('medseg saliency scans --prompt ')
    assert [(e['image'], e['prompt']) for e in r['results']] == [(f'../scans/{i}', p) for i in ('My scan.png', 'b.jpg') for p in ('left lung', 'optic disc')]
    for e in r['results']:
        assert list(e) == ['image', 'prompt', 'saliency', 'overlay', 'seconds']
        size, (m, o) = Image.open(Path('out', e['image'])).size, (Image.open(Path('out', e[k])) for k in ('saliency', 'overlay'))
        a = np.asarray(m)
        assert m.size == o.size == size and a.dtype == np.uint16 and (a.min(), a.max()) == (0, 65535) and o.mode == 'RGB'
    assert len(list(Path('out').iterdir())) == 9

def test_saliency_of_volumes(run):
    nifti('v.nii', rng.random((13, 17, 3))); tifffile.imwrite('t.tif', rng.integers(0, 65535, (3, 15, 20), np.uint16), photometric='minisblack')
    assert look(run, 'v.nii', 't.tif', get_testdata_file('CT_small.dcm'))[0] == 0
    v, t, d = report()['results'][::2]
    assert nib.load(f"out/{v['saliency']}").shape == (13, 17, 3) and (nib.load(f"out/{v['saliency']}").affine == nib.load('v.nii').affine).all()
    assert tifffile.imread(f"out/{t['saliency']}").shape == (3, 15, 20) and json.loads(Path('out', d['geometry']).read_text())['size'] == [128, 128]
    assert look(run, 'v.nii', '--index', '1', out='one')[0] == 0
    assert np.allclose(nib.load(f"one/{report('one')['results'][0]['saliency']}").get_fdata()[..., 0], nib.load(f"out/{v['saliency']}").get_fdata()[..., 1], atol=1e-4)

def test_saliency_goes_on(run):
    for n in 'ac': picture(f'd/{n}.png')
    Path('d/b.png').write_text('a letter')
    code, out, err = look(run, 'd')
    assert code == 1 and len(err) == 1 and err[0].startswith("medseg: error: cannot read 'd/b.png'")
    assert [e.get('error', '')[:20] for e in report()['results'][::2]] == ['', "cannot read '../d/b.", '']
    assert len(list(Path('out').iterdir())) == 2*2*2 + 1
    Path('d/a.png').write_text('a letter'); Path('d/c.png').unlink()
    before = files()
    code, out, err = look(run, 'd', out='no')
    assert code == 2 and files() == before and 'none of the 2 images' in err[-1]

@pytest.mark.parametrize('says,args', [
    ("Did you mean 'm2ib'", ('--method', 'm2bi')), ('--beta is no setting of gradcam', ('--method', 'gradcam', '--beta', '1')), ('layer must be 0 to 2', ('--layer', '3')),
    ("Did you mean 'tiny'", ('--encoder', 'tinny')), ('no folder', ('--encoder', 'no/such/encoder')), ('empty prompt', ('--prompt', ' ')),
    ('cannot write', ('--out', 'a.png/out')), ("Did you mean 'lung'", ('--window', 'lungs')), ('index=1', ('--index', '1'))])
def test_saliency_checks_the_call(run, says, args):
    picture('a.png')
    base = dict(zip(('--prompt', '--encoder', '--method', '--out'), ('disc', 'tiny', 'gradient', 'out')))
    refused(run, says, 'saliency', 'a.png', *args, *(o for k,v in base.items() if k not in args for o in (k, v)))

def test_finetune(run, cases, monkeypatch):
    from medseg_nb.clip import finetune
    seen = {}
    def finetune_clip(df, out, encoder, loss, tau, epochs, n, bs, lr, **kw):
        seen.update(kw, rows=len(df), args=(encoder, loss, tau, epochs, n, bs, lr)); Path(out).mkdir(); kw['progress']('one line')
        Path(out, 'finetune.json').write_text(json.dumps(dict(scores={'i2t@1': .5})))
    monkeypatch.setattr(finetune, 'finetune_clip', finetune_clip)
    code, out, err = run('finetune-clip', '--index', cases, '--encoder', 'tiny', '--out', 'enc', '--loss', 'dcl', '--tau', '0.1', '--epochs', '3', '--pairs', '9', '--bs', '4',
                         '--lr', '1e-4', '--vision', '2', '--text', '0', '--flips', '--half', '--fresh', '--seed', '5')
    assert code == 0 and not err and out.startswith('one line') and seen['args'] == ('tiny', 'dcl', .1, 3, 9, 4, 1e-4) and seen['rows'] == 6
    assert [seen[k] for k in ('vision', 'text', 'flips', 'half', 'resume', 'seed')] == [2, 0, True, True, False, 5] and report('enc')['results'][0]['i2t@1'] == .5

def test_finetune_checks_the_call(run, cases):
    pairs = index([f'{i}.png,{i}_mask.png,left side,{s},{i}' for i,s in enumerate(('train', 'train', 'val'))], path='d/pairs.csv')
    for says,*args in (('nothing to train on',), ('at least 2 are needed for a split', '--index', cases), ('no file', '--index', 'no.csv'), ("Did you mean 'hn_nce'", '--index', cases, '--loss', 'nce'),
                       ('tau must be', '--index', cases, '--tau', '0'), ('--lr must be', '--index', cases, '--lr', '0'), ('--bs', '--index', cases, '--bs', '1'),
                       ('the vision tower has 4 blocks', '--index', pairs, '--vision', '5', '--bs', '2'),
                       ('do not fill one batch of 64', '--index', pairs), ("got 'open_clip:RN50/openai'", '--index', cases, '--encoder', 'open_clip:RN50/openai')):
        refused(run, says, 'finetune-clip', '--out', 'deep/no', *args, *(() if '--encoder' in args else ('--encoder', 'tiny')))

def test_data(run, tmp_path, monkeypatch, cases):
    monkeypatch.setenv('MEDSEG_DATA', str(tmp_path))
    code, out, err = run('data', 'list')
    assert code == 0 and any(l.split()[:3] == ['d', '3', '6'] for l in out.splitlines())
    assert run('data', 'get', 'd') == (0, f'{tmp_path}/d\n', [])
    refused(run, "unknown pack 'e'", 'data', 'get', 'e')

def test_data_that_is_missing(run, tmp_path, monkeypatch, cases):
    monkeypatch.setattr(packs, 'data_roots', lambda: [tmp_path])
    Path('bad').mkdir(); Path('bad/index.csv').write_bytes(b'\xff\x00')
    code, out, err = run('data', 'list')
    assert (code, err) == (0, []) and [l.split()[-1] for l in out.splitlines() if l.startswith(('cxr_lungs', 'fundus'))] == ['missing']*2
    assert [l.split()[1] for l in out.splitlines() if l.startswith('bad')] == ['unreadable']
    refused(run, 'v7labs/covid-19-xray-dataset@51fca0d0d089b2fa7b0b95f0aed32ebaebd561f2', 'data', 'get', 'cxr_lungs')
    refused(run, "Did you mean 'cxr_lungs'?", 'data', 'get', 'cxr_lung')

def test_info(run):
    code, out, err = run('info')
    assert code == 0 and not err and all(w in out for w in ('torch', 'device', 'tiny', 'packs'))
