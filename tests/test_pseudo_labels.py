"Pseudo-labels: what is refused, what is left out and why, a run that is killed, folders that move, and the verb."
import json, os, shutil
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, tifffile, torch
from PIL import Image
import medseg_nb.cli_stages
from medseg_nb.cli_parts import main
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.core import Segmentation, seeded
from medseg_nb.data import read_index
from medseg_nb.fmiseg.learner import PromptedFMISeg
from medseg_nb.fmiseg.model import FMISeg, TINY
from medseg_nb.hybrid import hybrid
from medseg_nb.io import read_image
from medseg_nb.postprocess import PostProcess
from medseg_nb.sam.proposers import RandomWalkerProposer
from medseg_nb.segment import load_segmenter
from medseg_nb.training.pseudo_labels import expected_dice, pseudo_labels, pseudo_page, read_pseudo, source_of
from medseg_nb.uncertainty import Ensemble, tta

rng = np.random.default_rng(0)

def bright(images, prompts, boxes=None):
    "Marks what is bright, and is sure of it; a prompt of two words scores .9, any other .2."
    return [Segmentation(torch.stack([im.x.mean(0)]*len(ps)), list(ps), torch.tensor([.9 if ' ' in p else .2 for p in ps]), image=im.x, meta=im.meta)
            for im,ps in zip(images, prompts)]

class Falls:
    "`bright` that raises at the k-th image."
    def __init__(self, k, error=KeyboardInterrupt): self.left, self.error, self.asked = k, error, []
    def __call__(self, images, prompts, boxes=None):
        for im in images:
            self.left -= 1
            if self.left == 0: raise self.error('fell')
            self.asked.append(Path(im.meta.path).name)
        return bright(images, prompts)

def picture(path, level=1., part=.3, size=(20, 30)):
    "A bright bar of so much of the picture."
    x = np.full((*size, 3), 25, np.uint8)
    x[:, :round(part*size[1])] = round(255*level)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)
    return str(path)

def table(rows, columns='image,text', path='targets.csv'): Path(path).write_text('\n'.join([columns, *rows])); return path
def tree(folder='.'): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*'))

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

@pytest.fixture
def targets():
    for i in range(6): picture(f'd/{i}.png', .6 + .08*i, size=(20+i, 30))
    return read_index(table([f'{i}.png,bright bar,{i//2}' for i in range(6)], 'image,text,group', 'd/targets.csv'), masks=False)

def test_targets():
    picture('d/a.png'); picture('d/b.png')
    df = read_index(table(['a.png,left lung,,p1', 'b.png,"a, b",test,', ',x,,', 'a.png, ,,'], 'image,text,split,group', 'd/t.csv'), masks=False)
    assert df['image'].tolist() == [str(Path('d/a.png').resolve()), str(Path('d/b.png').resolve())] and df['text'].tolist() == ['left lung', 'a, b']
    assert df['group'].tolist() == ['p1', 'b.png'] and df['split'].tolist() == ['', 'test'] and set(df['modality']) == {''}

@pytest.mark.parametrize('says,make', [
    ('no index file', lambda: 'none.csv'), ('lacks the column text; it has image', lambda: table(['a.png'], 'image')),
    ('lacks the columns image, text', lambda: table(['a.png'], 'file')), ('no row with an image and a text', lambda: table([])),
    ('no row with an image and a text', lambda: table(['a.png,  '])), ('names 1 file(s) that are not there', lambda: table(['a.png,x', 'no.png,x'])),
    ('not a readable CSV', lambda: (Path('t.csv').write_bytes(b'\xff\xfe\x00'), 't.csv')[1]), ('not a readable CSV', lambda: (Path('t.csv').write_text(''), 't.csv')[1])])
def test_targets_are_refused(says, make):
    picture('a.png')
    with pytest.raises((ValueError, FileNotFoundError), match=says.replace('(', r'\(').replace(')', r'\)')): read_index(make(), masks=False)

@pytest.mark.parametrize('says,rows,kw', [
    ('no rows', [], {}), ('lacks text', [dict(image='a.png')], {}), ('row 1: empty prompt', [dict(image='a.png', text='x'), dict(image='a.png', text=' ')], {}),
    ('row 0: a prompt is a string', [dict(image='a.png', text=float('nan'))], {}), ('row 0 has no image', [dict(image='', text='x')], {}),
    ('least must lie', [dict(image='a.png', text='x')], dict(least=70)), ('present must lie', [dict(image='a.png', text='x')], dict(present=-1)),
    ('threshold must lie', [dict(image='a.png', text='x')], dict(threshold=float('nan'))), ('area is', [dict(image='a.png', text='x')], dict(area=(.5, .1))),
    ('bs must be', [dict(image='a.png', text='x')], dict(bs=0)), ('none of the 2 rows', [dict(image='no.png', text='x'), dict(image='none.png', text='x')], {})])
def test_calls_are_refused_and_leave_nothing(says, rows, kw):
    picture('a.png')
    before = tree()
    with pytest.raises(ValueError, match=says): pseudo_labels(pd.DataFrame(rows, columns=list(rows[0]) if rows else ['image', 'text']), bright, 'deep/out', **kw)
    assert tree() == before

def test_labels(targets):
    df = pseudo_labels(targets, bright, 'out', least=.5)
    assert df['image'].tolist() == targets['image'].tolist() and df['group'].tolist() == list('001122') and set(df['split']) == {'train'}
    for r in df.itertuples():
        im = read_image(r.image)
        seg, = bright([im], [[r.text]])
        with Image.open(r.mask) as m: assert m.mode == 'L' and m.size == im.size[::-1] and set(np.unique(m)) == {0, 255}
        with Image.open(r.teacher) as m: assert m.mode.startswith('I;16') and m.size == im.size[::-1]
        assert (read_image(r.mask).x[0].bool() == seg.mask()[0]).all() and (read_image(r.teacher).x[0] - seg.prob[0]).abs().max() < 1e-5
        assert r.area == pytest.approx(.3) and r.score == pytest.approx(.9) and r.confidence == pytest.approx(expected_dice(seg, 0, seg.mask()[0]), abs=1e-6)
    assert set(df['source']) == {source_of(bright)} and len(read_index('out/index.csv')) == 6

def test_why_labels_are_left_out():
    for name,level,part in (('good', 1, .3), ('empty', .4, .3), ('speck', 1, .04), ('full', 1, 1), ('faint', .55, .3)): picture(f'{name}.png', level, part)
    Path('letter.png').write_text('Dear colleague')
    tifffile.imwrite('stack.tif', np.zeros((3, 20, 30), np.uint8), photometric='minisblack')
    names = ('good', 'empty', 'speck', 'full', 'faint')
    df = pd.DataFrame([dict(image=f'{n}.png', text='bright bar') for n in (*names, 'letter')] + [dict(image='stack.tif', text='bright bar'), dict(image='good.png', text='bar'), dict(image='gone.png', text='bright bar')])
    kept = pseudo_labels(df, bright, 'out', area=(.05, .9))
    rows = read_pseudo('out', kept=False)
    assert [Path(p).name for p in kept['image']] == ['good.png'] and rows['kept'].tolist() == [True] + [False]*8
    for reason,says in zip(rows['reason'], ('', 'empty mask', 'area 0.03333 below 0.05', 'area 1 above 0.9', 'confidence 0.', '', '', 'score 0.2 below 0.5', '')): assert reason.startswith(says) and bool(reason) == bool(says)
    for error,says in zip(rows['error'], ('', '', '', '', '', "cannot read '../letter.png'", 'has 3 slices', '', "no file '../gone.png'")): assert says in error and bool(error) == bool(says)
    assert all(Path(m).is_file() for m in rows['mask'] if m) and rows['mask'].eq('').sum() == 3
    page = pseudo_page(rows)
    assert len(page.axes) == 6 and 'empty mask' in page.axes[0].get_title()
    for f in ('out/rows.csv', 'out/index.csv', 'out/journal.jsonl'): assert os.getcwd() not in Path(f).read_text()

def test_nothing_is_kept():
    picture('a.png', .4)
    with pytest.warns(UserWarning, match="none of the 1 labels was kept, the first: empty mask"): df = pseudo_labels(pd.DataFrame([dict(image='a.png', text='x y')]), bright, 'out')
    assert df.empty and {'mask', 'teacher', 'confidence'} <= set(df) and not read_pseudo('out', kept=False)['kept'].any()

@pytest.mark.parametrize('k', [1, 2, 4, 6])
@pytest.mark.parametrize('bs', [1, 4])
def test_a_killed_run_goes_on(targets, k, bs):
    whole = pseudo_labels(targets, bright, 'whole', least=.5, source='s')
    falls = Falls(k)
    with pytest.raises(KeyboardInterrupt): pseudo_labels(targets, falls, 'out', least=.5, source='s', bs=bs)
    assert not Path('out/index.csv').exists()
    done = (k-1)//bs*bs
    falls.asked.clear()
    again = pseudo_labels(targets, falls, 'out', least=.5, source='s', bs=bs)
    assert falls.asked == [f'{i}.png' for i in range(done, 6)]
    assert Path('out/index.csv').read_bytes() == Path('whole/index.csv').read_bytes() and tree('out') == tree('whole')
    assert again['confidence'].tolist() == whole['confidence'].tolist()
    falls.asked.clear()
    pseudo_labels(targets, falls, 'out', least=.5, source='s')
    assert falls.asked == []

def test_killed_while_files_are_written(targets, monkeypatch):
    from medseg_nb.training import pseudo_labels as pl
    write, left = pl.write_prob, [3]
    def falls(*args):
        left[0] -= 1
        if left[0] == 0: raise KeyboardInterrupt
        write(*args)
    monkeypatch.setattr(pl, 'write_prob', falls)
    with pytest.raises(KeyboardInterrupt): pseudo_labels(targets, bright, 'out', least=.5)
    with open('out/journal.jsonl', 'a') as f: f.write('{"image": "half a li')
    pseudo_labels(targets, bright, 'out', least=.5)
    pseudo_labels(targets, bright, 'whole', least=.5)
    assert Path('out/index.csv').read_bytes() == Path('whole/index.csv').read_bytes() and tree('out') == tree('whole')

def test_a_full_disk_ends_the_run(targets, monkeypatch):
    from medseg_nb.training import pseudo_labels as pl
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pl, 'write_mask', full)
    with pytest.raises(OSError, match='No space left'): pseudo_labels(targets, bright, 'out')
    assert not Path('out/index.csv').exists()

def test_an_image_that_fails_is_tried_again(targets):
    falls = Falls(3, RuntimeError)
    pseudo_labels(targets, falls, 'out', least=.5, source='s', bs=1)
    rows = read_pseudo('out', kept=False)
    assert rows['error'].tolist() == ['', '', 'RuntimeError: fell', '', '', '']
    falls.asked.clear()
    assert len(pseudo_labels(targets, falls, 'out', least=.5, source='s')) == 6 and falls.asked == ['2.png']

def test_a_batch_that_fails_is_asked_one_by_one(targets):
    def one_at_most(images, prompts):
        if len(images) > 1 or images[0].meta.path.endswith('4.png'): raise MemoryError
        return bright(images, prompts)
    assert len(pseudo_labels(targets, one_at_most, 'out', least=.5)) == 5
    assert read_pseudo('out', kept=False)['error'][4] == 'MemoryError'

@pytest.mark.parametrize('wrong,says', [
    (lambda s: s[:0], 'gave 0 answers for 1 images'), (lambda s: [replace(s[0], prob=s[0].prob[:, :5])], 'expected maps'),
    (lambda s: [replace(s[0], prob=s[0].prob*float('nan'))], 'or NaN'), (lambda s: [replace(s[0], prob=s[0].prob*3)], 'outside')])
def test_answers_are_checked(wrong, says):
    picture('a.png')
    with pytest.raises(ValueError, match=says): pseudo_labels(pd.DataFrame([dict(image='a.png', text='x y')]), lambda *a: wrong(bright(*a)), 'out')
    assert tree() == ['a.png']

def test_another_run_is_refused(targets):
    pseudo_labels(targets, bright, 'out', least=.5, source='a')
    before = {p: Path('out', p).stat().st_mtime_ns for p in tree('out')}
    for kw,says in ((dict(source='b'), "begun with source 'a', and this is 'b'"), (dict(source='a', threshold=.6), 'threshold None'), (dict(source='a', post=PostProcess(keep=1)), 'post'),
                    (dict(source='a', confidence=lambda seg, j, m: 1.), 'confidence')):
        with pytest.raises(ValueError, match=says): pseudo_labels(targets, bright, 'out', least=.5, **kw)
    assert {p: Path('out', p).stat().st_mtime_ns for p in tree('out')} == before
    pseudo_labels(targets[:2], bright, 'out', least=.5, source='b', resume=False)
    assert set(read_pseudo('out')['source']) == {'b'} and len(tree('out/masks')) == len(tree('out/maps')) == 2

def test_folders_of_others_are_left_alone(targets):
    Path('mine').mkdir(); Path('mine/index.csv').write_text('image,mask,text\n')
    for resume in (True, False):
        with pytest.raises(ValueError, match='not made by pseudo_labels'): pseudo_labels(targets, bright, 'mine', resume=resume)
    Path('mine/index.csv').unlink(); Path('mine/journal.jsonl').write_text('dear diary\n{"day": 1}\n')
    with pytest.raises(ValueError, match='no journal of pseudo-labels'): pseudo_labels(targets, bright, 'mine')
    assert tree('mine') == ['journal.jsonl']

def test_limits_are_free_and_images_may_join(targets):
    falls = Falls(0)
    pseudo_labels(targets[:4], falls, 'out', least=.5, source='s')
    for n in ('report.json', 'page.png'): Path('out', n).write_text('of the run before')
    rows = pseudo_labels(targets, falls, 'out', least=.8, source='s')
    assert falls.asked == [f'{i}.png' for i in range(6)] and (rows['confidence'] >= .8).all() and 0 < len(rows) < 6 == len(read_pseudo('out', kept=False))
    assert not Path('out/report.json').exists() and not Path('out/page.png').exists()

def test_an_image_that_changed_is_done_again(targets):
    falls = Falls(0)
    pseudo_labels(targets, falls, 'out', least=.5, source='s')
    falls.asked.clear()
    picture('d/3.png', 1., .5, (23, 30)); Path(read_pseudo('out')['mask'][5]).unlink()
    rows = pseudo_labels(targets, falls, 'out', least=.5, source='s')
    assert falls.asked == ['3.png', '5.png'] and rows['area'][3] == .5
    assert len(Path('out/journal.jsonl').read_text().splitlines()) == 1 + 6 + 2 and len(_lines_after(targets, falls)) == 1 + 6

def _lines_after(targets, segmenter):
    pseudo_labels(targets, segmenter, 'out', least=.5, source='s')
    return Path('out/journal.jsonl').read_text().splitlines()

def test_folders_may_move(targets):
    pseudo_labels(targets, bright, 'd/out', least=.5, source='s')
    shutil.move('d', 'elsewhere')
    df = read_pseudo('elsewhere/out')
    assert all(Path(p).is_file() and 'elsewhere' in p for c in ('image', 'mask', 'teacher') for p in df[c]) and len(read_index('elsewhere/out/index.csv')) == 6
    shutil.move('elsewhere/out', 'alone')
    with pytest.raises(FileNotFoundError, match='6 file\\(s\\) that are not there'): read_pseudo('alone')
    with pytest.raises(FileNotFoundError, match='no index.csv'): read_pseudo('elsewhere')

def test_same_names_and_repeats():
    for d in 'ab': picture(f'{d}/1.png')
    df = pd.DataFrame([dict(image=f'{d}/1.png', text=t) for d in 'ab' for t in ('bright bar', 'Bright  bar!', 'bright bar', 'светлая полоса')])
    out = pseudo_labels(df, bright, 'out')
    assert len(out) == 6 and out['mask'].nunique() == out['teacher'].nunique() == 6
    assert out['group'].tolist() == ['../a/1.png']*3 + ['../b/1.png']*3

def test_rows_held_out_are_told(targets):
    with pytest.warns(UserWarning, match="2 of 6 rows are of split 'test' or 'val'"): df = pseudo_labels(targets.assign(split=['train']*4 + ['test', 'val']), bright, 'out', least=.5)
    assert set(df['split']) == {'train'}

def test_cleaning_leaves_the_map(targets):
    def two(images, prompts):
        segs = bright(images, prompts)
        for s in segs: s.prob = s.prob.clone(); s.prob[:, 2:4, 20:22] = .9
        return segs
    raw, clean = (pseudo_labels(targets, two, n, least=0, post=p) for n,p in (('raw', None), ('clean', PostProcess(keep=1))))
    for a,b in zip(raw.itertuples(), clean.itertuples()):
        assert (read_image(a.teacher).x == read_image(b.teacher).x).all() and (read_image(a.mask).x[0] > 0).sum() - (read_image(b.mask).x[0] > 0).sum() == 4

def test_wrappers_are_named(targets):
    helped = hybrid(bright, RandomWalkerProposer(side=32), rule=lambda seg, j, box: '0.png' in seg.meta.path or '5.png' in seg.meta.path)
    df = pseudo_labels(targets, helped, 'out', least=0, area=(0, 1))
    assert df['by'].tolist() == ['proposer'] + ['segmenter']*4 + ['proposer'] and set(df['source']) == {source_of(helped)} and df['source'][0].startswith('hybrid ')
    assert source_of(Ensemble([bright])).startswith('Ensemble(1 segmenters, entropy) ')
    assert source_of(tta(bright)) == source_of(tta(bright)) != source_of(tta(bright, how='mi')) and source_of(tta(bright, at_once=2)) == source_of(tta(bright))
    doubtful = lambda seg, j, m: expected_dice(seg, j, m)*(1 - seg.uncertainty[j][m].mean().item()) if m.any() else 0.
    assert (pseudo_labels(targets, Ensemble([bright, bright]), 'two', least=0, confidence=doubtful)['confidence'] < 1).all()

def test_weights_are_told_apart(model):
    a, b = load_segmenter(model, device='cpu', bs=2), load_segmenter(model, device='cpu', bs=4)
    assert source_of(a) == source_of(b) != source_of(load_segmenter(model, device='cpu', threshold=.3))
    next(b.model.parameters()).data += 1
    assert source_of(a) != source_of(b) and 'cpu' not in source_of(a)

@pytest.fixture(scope='session')
def model(tmp_path_factory):
    "A folder with a model of random weights whose masks are neither empty nor full."
    folder = tmp_path_factory.mktemp('model')
    with seeded(1): m = PromptedFMISeg(FMISeg(**TINY), load_encoder('tiny', pretrained=False), train_text=True)
    for h in m.net.heads.values(): h.out.weight.data *= 30
    m.net.presence[-1].bias.data += 3
    m.save_pretrained(folder, size=64)
    return folder

@pytest.fixture
def run(capsys, model):
    def _run(*args):
        code = main(['pseudo-label', *args, *(() if '--model' in args else ('--model', model))])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()
    return _run

def refused(run, says, *args):
    before = tree()
    code, out, err = run(*args)
    assert code == 2 and out == '' and len(err) == 1 and err[0].startswith('medseg: error: ') and says in err[0], (code, out, err)
    assert tree() == before

def report(out='out'): return json.loads(Path(out, 'report.json').read_text(encoding='utf-8'))

def test_verb_for_images(run):
    for n in ('scans/a.png', 'scans/My b.png'): Path(n).parent.mkdir(exist_ok=True); Image.fromarray(rng.integers(0, 255, (33, 50, 3), np.uint8)).save(n)
    code, out, err = run('scans', '--prompt', 'left lung', '--prompt', 'optic disc', '--least', '0.2', '--out', 'out')
    assert code == 0 and not err and 'of 4 labels were kept' in out
    r = report()
    assert list(r) == ['version', 'command', 'results'] and r['command'].startswith('medseg pseudo-label scans --prompt ')
    assert [(e['image'], e['prompt']) for e in r['results']] == [(f'../scans/{i}', p) for i in ('My b.png', 'a.png') for p in ('left lung', 'optic disc')]
    for e in r['results']:
        assert {'image', 'prompt', 'mask', 'probability', 'area_fraction', 'score', 'confidence', 'kept'} <= set(e) and e['kept'] == ('reason' not in e) and 'error' not in e
        mask, prob = (Image.open(Path('out', e[k])) for k in ('mask', 'probability'))
        assert mask.size == prob.size == (50, 33) and e['area_fraction'] == pytest.approx((np.asarray(mask) > 0).mean(), abs=1e-6)
    assert len(pd.read_csv('out/index.csv')) == sum(e['kept'] for e in r['results']) and Image.open('out/page.png').mode.startswith('RGB')

def test_verb_for_a_table(run, targets):
    table([f'{i}.png,bright bar,{s}' for i,s in enumerate(('train', 'train', 'rest'))], 'image,text,split', 'd/t.csv')
    assert run('--index', 'd/t.csv', '--split', 'train', '--least', '0', '--keep-components', '1', '--fill', '--out', 'out')[0] == 0
    assert [e['image'] for e in report()['results']] == ['../d/0.png', '../d/1.png']
    first = tree('out')
    assert run('--index', 'd/t.csv', '--least', '0', '--keep-components', '1', '--fill', '--out', 'out')[0] == 0
    assert len(report()['results']) == 3 and set(first) < set(tree('out'))

def test_verb_goes_on(run):
    for n in 'ac': picture(f'd/{n}.png')
    Path('d/b.png').write_text('a letter')
    code, out, err = run('d', '--prompt', 'bar', '--out', 'out', '--least', '0')
    assert code == 1 and len(err) == 1 and err[0].startswith("medseg: error: cannot read 'd/b.png'") and 'failed' in out
    assert [e.get('error', '')[:20] for e in report()['results']] == ['', "cannot read '../d/b.", ''] and 'mask' not in report()['results'][1]
    picture('d/b.png')
    assert run('d', '--prompt', 'bar', '--out', 'out', '--least', '0')[0] == 0

@pytest.mark.parametrize('says,args', [
    ('give either images', ('--out', 'out')), ('give either images', ('a.png', '--prompt', 'x', '--index', 't.csv', '--out', 'out')), ('no prompt', ('a.png', '--out', 'out')),
    ('--prompt is for images', ('--index', 't.csv', '--prompt', 'x', '--out', 'out')), ('--split is for', ('a.png', '--prompt', 'x', '--split', 'train', '--out', 'out')),
    ('empty prompt', ('a.png', '--prompt', ' ', '--out', 'out')), ('holds no word', ('a.png', '--prompt', '...', '--out', 'out')), ("no file or folder 'b.png'", ('b.png', '--prompt', 'x', '--out', 'out')),
    ("cannot read 'letter.png'", ('letter.png', '--prompt', 'x', '--out', 'deep/out')), ("Did you mean 'tiny'", ('a.png', '--prompt', 'x', '--out', 'out', '--model', 'tinny')),
    ("Did you mean 'zeroshot'", ('a.png', '--prompt', 'x', '--out', 'out', '--mode', 'zero-shot')), ('--least', ('a.png', '--prompt', 'x', '--out', 'out', '--least', '70')),
    ("cannot write to 'a.png/out'", ('a.png', '--prompt', 'x', '--out', 'a.png/out')), ('between 0 and 1', ('a.png', '--prompt', 'x', '--out', 'out', '--threshold', '2')),
    ('no index file', ('--index', 'no.csv', '--out', 'out')), ('lacks the column text', ('--index', 'bad.csv', '--out', 'out')), ('holds no word', ('--index', 'dots.csv', '--out', 'out')),
    ("unknown split 'tset'", ('--index', 't.csv', '--split', 'tset', '--out', 'out')), ('not made by pseudo_labels', ('a.png', '--prompt', 'x', '--out', 'mine'))])
def test_verb_refuses(run, says, args):
    picture('a.png'); Path('letter.png').write_text('Dear colleague'); Path('mine').mkdir()
    table(['a.png,bar,test'], 'image,text,split', 't.csv'); table(['a.png'], 'image', 'bad.csv'); table(['a.png,...'], path='dots.csv'); table([], path='mine/index.csv')
    refused(run, says, *args)

def test_verb_refuses_another_run(run):
    picture('a.png')
    call = ('a.png', '--prompt', 'bar', '--out', 'out', '--least', '0')
    assert run(*call)[0] == 0
    kept = Path('out/report.json').read_bytes()
    refused(run, '--fresh', *call, '--threshold', '0.3')
    assert Path('out/report.json').read_bytes() == kept
    assert run(*call, '--threshold', '0.3', '--fresh')[0] == 0

def test_verb_zeroshot(run):
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save('a.png')
    code, out, err = run('a.png', '--prompt', 'optic disc', '--model', 'tiny', '--mode', 'zeroshot', '--method', 'gradient', '--least', '0', '--out', 'out')
    e, = report()['results']
    assert code == 0 and 'score' not in e and 0 <= e['confidence'] <= 1

def test_verb_help(run):
    code, out, err = run('--help')
    assert code == 0 and not err and 'Example:\n    medseg pseudo-label' in out
