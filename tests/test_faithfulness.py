"Does it use the text: bad input, broken segmenters, determinism, one's own protocols, the null case."
import json, zlib
from pathlib import Path
import pandas as pd, pytest, torch
from PIL import Image
from medseg_nb.core import Segmentation, as_image
from medseg_nb.data import read_index
from medseg_nb.evaluation.attribution import CLINICAL, PRESETS, WRONG, attribution, attribution_ratio, attribution_table, clinical_prompt
from medseg_nb.evaluation.faithfulness import compare, faithfulness
from medseg_nb.evaluation.protocols import PROTOCOLS, Edit, edit_table, protocol
from medseg_nb.phantoms import make_phantom_pack
from medseg_nb.segment import check_segmenter, load_segmenter

@pytest.fixture(scope='module')
def df(tmp_path_factory):
    return read_index(make_phantom_pack(tmp_path_factory.mktemp('pack'), n=8, kinds=['chest', 'fundus'], size=32, splits=dict(test=1)))

def find(im, p):
    g, at = im.x.mean(0), torch.arange(im.size[1]).expand(im.size)/im.size[1]
    z = torch.where(g < .4, 2., -2.) if 'lung' in p else torch.where(g > .5, 2., -2.)
    if 'left' in p: z = torch.where(at > .5, z, -2.)
    if 'right' in p: z = torch.where(at < .5, z, -2.)
    return z

def reader(images, prompts, boxes=None):
    return [Segmentation(torch.stack([find(im, p) for p in ps]).sigmoid(), ps) for im,ps in zip(images, prompts)]

def deaf(images, prompts, boxes=None):
    "A different mask for each image, the same for each prompt."
    out = []
    for im,ps in zip(images, prompts):
        m = (im.x.mean(0) > im.x.mean()).float()
        out.append(Segmentation(m.expand(len(ps), -1, -1), ps, torch.full((len(ps),), .5)))
    return out

def test_toys_keep_the_contract(df):
    for s in (reader, deaf): check_segmenter(lambda i, p, boxes=None: s([as_image(o) for o in i], p), [torch.rand(3, 20, 30)], [['left lung', 'optic disc']])

@pytest.mark.parametrize('change, says', [
    (lambda d: d.drop(columns='mask'), 'lacks mask'), (lambda d: d.drop(columns='text'), 'lacks text'), (lambda d: d[:0], 'no rows'),
    (lambda d: d.assign(text=''), 'empty prompt'), (lambda d: d.assign(mask=['', *d['mask'][1:]]), 'have no mask')])
def test_bad_index(df, change, says):
    with pytest.raises(ValueError, match=says): faithfulness(reader, change(df))

def test_unknown_protocol(df):
    with pytest.raises(ValueError, match="Did you mean 'negation'"): faithfulness(reader, df, ['negations'])
    with pytest.raises(ValueError, match='no protocol'): faithfulness(reader, df, [])
    with pytest.raises(ValueError, match="'place' needs a text with a word of place"): faithfulness(reader, df, 'place')

@pytest.mark.parametrize('bad, says', [
    (lambda i, p, boxes=None: None, 'got NoneType'), (lambda i, p, boxes=None: tuple(reader(i, p)), 'got tuple'),
    (lambda i, p, boxes=None: reader(i, p)[1:], 'a list of'), (lambda i, p, boxes=None: [s.prob for s in reader(i, p)], 'Tensor'),
    (lambda i, p, boxes=None: reader(i, [q[:1] for q in p]), 'must return maps'),
    (lambda i, p, boxes=None: [Segmentation(s.prob[:, ::2], s.prompts) for s in reader(i, p)], 'must return maps')])
def test_broken_contract_ends_it(df, bad, says):
    with pytest.raises(TypeError, match=says): faithfulness(bad, df, ['side', 'wording'])

def test_refusal_costs_its_own_rows(df):
    def picky(images, prompts, boxes=None):
        if any('no ' in p for ps in prompts for p in ps): raise ValueError("I do not do 'no'")
        return reader(images, prompts)
    r = faithfulness(picky, df, ['negation', 'side'])
    bad = r.rows[r.rows['error'] != '']
    assert set(bad['variant']) == {'no ...', 'there is no ...'} and set(bad['error']) == {"I do not do 'no'"}
    t = r.table()
    assert t.loc[('negation', 'no ...'), 'n'] == 0 and t.loc[('negation', 'no ...'), 'failed'] == len(df) and t.loc['side', 'told'].eq(1).all()
    json.dumps(r.summary(), allow_nan=False)

def test_deterministic(df):
    a, b = (faithfulness(reader, df, bs=bs, show=0) for bs in (1, 5))
    pd.testing.assert_frame_equal(a.rows, b.rows)
    assert a.summary() == b.summary()
    c = faithfulness(reader, df, ['absent', 'wording'], seed=1, show=0)
    assert c.rows['prompt'].tolist() != a.rows[a.rows['protocol'].isin(['absent', 'wording'])]['prompt'].tolist()

def test_own_protocol(df):
    def shout(df, rng, mark='!'):
        for i,t in enumerate(df['text']): yield Edit(i, 'shout', t + mark, 'same')
    r = faithfulness(reader, df, {'mine': shout, 'with options': (shout, dict(mark='??'))})
    assert r.table()['told'].tolist() == [1, 1] and r.rows['prompt'].str.endswith('??').sum() == len(df)
    try:
        protocol('shout', needs='a voice')(shout)
        assert 'shout' in set(edit_table(df)['protocol'])
    finally: del PROTOCOLS['shout']

def test_absent_sides_are_not_edited(df):
    t = edit_table(df, 'side')
    assert set(t['text']) == {'left lung', 'right lung'} and len(t) == 16
    assert edit_table(df[~df['text'].str.contains('left|right')], 'side').empty

def test_reader_reads(df):
    t = faithfulness(reader, df, show=0).table()
    assert t.loc['side', 'told'].eq(1).all() and t.loc[('shuffled', 'permuted'), 'p'] == .01
    assert t.loc[('wording', 'word order'), 'told'] == 1 and t.loc[('negation', 'image without ...'), 'told'] == 0

def test_deaf_is_not_found_to_read(df):
    r = faithfulness(deaf, df, show=0, baseline=deaf)
    t = r.table()
    text = t[~t.index.get_level_values(0).isin(['image', 'absent'])]
    assert (text['p'] == 1).all() and (text['drop'] == 0).all() and (text['iou'].dropna() == 1).all()
    assert t.loc['side', 'told'].eq(0).all() and t.loc['negation', 'told'].eq(0).all() and t.loc['wording', 'told'].eq(1).all()
    s = r.summary()
    assert s['targets']['switched'] <= .5 and s['absent']['auc'] == .5 and s['wording']['dice_std'] == 0
    assert attribution_table(r)['ratio'].isna().all()

def test_noise_is_not_found_to_read(df):
    "A segmenter whose mask depends on the words by chance only: p is small as rarely as it should be."
    def noisy(images, prompts, boxes=None):
        maps = [torch.stack([torch.rand(im.size, generator=torch.Generator().manual_seed(zlib.crc32(f'{p} {im.x.sum():.2f}'.encode())))
                             for p in ps]) for im,ps in zip(images, prompts)]
        return [Segmentation(m, ps) for m,ps in zip(maps, prompts)]
    t = faithfulness(noisy, df, ['swap', 'shuffled', 'constant', 'side'], show=0).table()
    assert (t['p'] > .01).sum() >= len(t)-1 and t['drop'].abs().max() < .05

def test_files(df, tmp_path):
    r = faithfulness(reader, df, ['side', 'absent', 'image'], show=2, baseline=deaf)
    r.save(tmp_path/'out')
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['faithfulness.csv', 'page.png', 'report.json', 'rows.csv']
    assert Image.open(tmp_path/'out/page.png').size[0] > 300
    rows = pd.read_csv(tmp_path/'out/rows.csv')
    assert len(rows) == len(r.rows) + len(df) and ((tmp_path/'out'/rows['image'][0]).resolve() == Path(df['image'].iloc[0]).resolve())
    assert str(tmp_path) not in (tmp_path/'out/rows.csv').read_text() + (tmp_path/'out/report.json').read_text()
    s = json.loads((tmp_path/'out/report.json').read_text())
    assert s['n'] == len(df) and set(s['protocols']) == {'baseline', 'side', 'absent', 'image'}

def test_nothing_half_written(df, tmp_path, monkeypatch):
    r = faithfulness(reader, df, 'side', show=1)
    monkeypatch.setattr(type(r), 'page', lambda self: 1/0)
    with pytest.raises(ZeroDivisionError): r.save(tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_boxes(df):
    def boxed(images, prompts, boxes=None):
        out = [torch.zeros(len(ps), *im.size) for im,ps in zip(images, prompts)]
        for o,bs in zip(out, boxes or []):
            for m,b in zip(o, bs.round().int().tolist()): m[b[1]:b[3]+1, b[0]:b[2]+1] = 1
        return [Segmentation(o, ps) for o,ps in zip(out, prompts)]
    t = faithfulness(boxed, df, ['box', 'swap'], boxes=True, show=0).table()
    assert t.loc['box', 'iou'].is_monotonic_decreasing and t.loc[('box', 'no box'), 'dice'] == 0 and t.loc[('swap', 'class'), 'drop'] == 0
    assert 'box' in faithfulness(boxed, df, ['box', 'swap'], show=0).skipped

def test_one_row(df):
    r = faithfulness(reader, df[:1], show=1)
    assert r.summary()['n_patients'] == 1 and {'swap', 'shuffled', 'targets'} <= set(r.skipped)
    r.page(); repr(r); r._repr_html_()

def test_compare(df):
    t = compare(dict(deaf=deaf, reader=reader), df, reference='reader')
    assert t.loc['reader', 'gain'] == 0 and t.loc['deaf', 'gain'] == pytest.approx(t.loc['deaf', 'dice'] - t.loc['reader', 'dice'])
    with pytest.raises(ValueError, match='no segmenter'): compare({}, df)

def test_attribution_of_arrays():
    assert attribution(.9, .8, .7) == pytest.approx(.5)
    with pytest.raises(ValueError, match='N values'): attribution_ratio([], [], [])
    a = attribution_ratio([.9]*4, [.8]*4, [.7]*4, list('aabb'))
    assert a.ratio == pytest.approx(.5) and a.low == pytest.approx(.5) and a.patients == 2
    assert not attribution_ratio([.9]*4, [.8]*4, [.89]*4).defined and attribution_ratio([.9]*4, [.8]*4, [.89]*4, min_gain=.005).defined

def test_presets_map_to_other_known_classes():
    for c,m in WRONG.items():
        assert set(m) == set(CLINICAL[c]) and set(m.values()) <= set(CLINICAL[c]) and all(k != v for k,v in m.items())
    sentences = [s for d in CLINICAL.values() for s in d.values()]
    assert len(set(sentences)) == len(sentences) and not any(a in b for a in sentences for b in sentences if a != b)
    rows = pd.DataFrame([dict(image=f'{t} {h}', t_stage=t, histology=h) for t in CLINICAL['t_stage'] for h in CLINICAL['histology']])
    rows['text'] = [clinical_prompt(r) for r in rows.to_dict('records')]
    both = edit_table(rows, {'both wrong': PRESETS['both wrong']})
    want = [clinical_prompt(dict(t_stage=WRONG['t_stage'][t], histology=WRONG['histology'][h])) for t,h in zip(rows['t_stage'], rows['histology'])]
    assert both['prompt'].tolist() == want
    assert both['expected'].tolist() == ['smaller' if t in ('T2b', 'T3', 'T4') else 'larger' for t in rows['t_stage']]

def test_presets_run(df):
    d = df[df['text'] == 'both lungs'].assign(birads=[2, 3, 4, 5]*2)
    d['text'] = ['lung, ' + clinical_prompt(r) for r in d[['birads']].to_dict('records')]
    r = faithfulness(reader, d, PRESETS, show=0)
    assert set(r.rows['protocol']) == {'wrong bi-rads'} and set(r.skipped) == {'wrong t-stage', 'wrong histology', 'both wrong'}
    assert (r.rows['drop'] == 0).all() and r.rows['prompt'].str.startswith('lung, ').all()

def test_hooks_and_nulls(df):
    def s(images, prompts, boxes=None): return reader(images, prompts)
    s.gates, s.null_prompts = (lambda: {'coarse': (torch.zeros(1, 1), torch.tensor(.5))}), {'zero vector': '<zero>'}
    s.text_gradient = lambda images, prompts: [torch.arange(len(p)).float() for p in prompts]
    r = faithfulness(s, df, 'empty', show=0)
    assert r.nulls == {'empty text': '', 'zero vector': '<zero>'} and set(r.rows['variant']) == set(r.nulls)
    assert r.hooks == dict(gates={'coarse': dict(raw=0, open=.5)}, text_gradient=dict(mean=0, least=0, n=4))

def test_wrong_edits(df):
    with pytest.raises(ValueError, match="unknown expectation 'bigger'"): faithfulness(reader, df, dict(a=lambda df, rng: [Edit(0, 'x', 'y', 'bigger')]))
    with pytest.raises(ValueError, match="unknown view"): faithfulness(reader, df, dict(a=lambda df, rng: [Edit(0, 'x', 'y', view='dark')]))

def test_only_edits_of_text_are_attributed(df):
    r = faithfulness(reader, df, baseline=deaf, show=0)
    assert set(attribution_table(r).index.get_level_values(0)) == {'swap', 'shuffled', 'empty', 'constant', 'negation', 'side', 'targets'}

def test_embedded_segmenter(df):
    r = faithfulness(load_segmenter('tiny', device='cpu'), df[:2], ['side', 'empty'], show=1)
    assert r.nulls == {"the word 'image'": 'image'} and (r.rows['error'] == '').all() and len(r.page().axes) == 4
