"Scores of a detector: what must hold for any scores, and tables that are bad."
import json
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from medseg_nb.calibration import reliability
from medseg_nb.spai import controls, scores

few = settings(max_examples=60, deadline=None)
cases = st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=4, max_size=40).filter(lambda o: 0 < sum(y for y,_ in o) < len(o))

def arrays(case): return np.array([y for y,_ in case]), np.array([s for _,s in case], float)

@few
@given(cases)
def test_areas_are_those_of_sklearn(case):
    y, s = arrays(case)
    assert np.isclose(scores.auc(y, s), roc_auc_score(y, s)) and np.isclose(scores.average_precision(y, s), average_precision_score(y, s))
    assert np.isclose(scores.auc(y, s) + scores.auc(y, -s), 1) and np.isclose(scores.auc(y, np.exp(s)), scores.auc(y, s))

@few
@given(cases, st.integers(0, 5))
def test_weights_are_repeats(case, seed):
    y, s = arrays(case)
    w = np.random.default_rng(seed).integers(0, 3, len(y))
    found = scores._aucs(y, s, w[None].astype(float))[0]
    if 0 < (w*y).sum() < w.sum(): assert np.isclose(found, roc_auc_score(np.repeat(y, w), np.repeat(s, w)))
    else: assert np.isnan(found)

@few
@given(cases, st.sampled_from([0., .1, .34, .9]))
def test_thresholds_keep_their_word(case, fpr):
    y, s = arrays(case)
    cuts = np.r_[s, s.min()-1]
    at = lambda t: scores.operating_point(y, s, t)
    best = max(at(t)['tpr']-at(t)['fpr'] for t in cuts)
    o = at(scores.choose_threshold(y, s))
    assert np.isclose(o['tpr']-o['fpr'], max(best, 0))
    f = at(scores.choose_threshold(y, s, 'fpr', fpr))
    assert f['fpr'] <= fpr + 1e-9 and np.isclose(f['tpr'], max(at(t)['tpr'] for t in cuts if at(t)['fpr'] <= fpr + 1e-9))

@few
@given(cases)
def test_calibration_keeps_the_order(case):
    y, s = arrays(case)
    if len(set(s)) == 1: return
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = scores.fit_calibration(y, s)
    p = c(np.sort(s))
    assert c.a >= 0 and (np.diff(p) >= 0).all() and (0 < p).all() and (p < 1).all()
    assert 0 <= scores.ece(y, c(s)) <= 1 and scores.Calibration.from_dict(json.loads(json.dumps(c.to_dict()))) == c

@few
@given(cases, st.integers(1, 12))
def test_ece_is_that_of_the_reliability_diagram(case, n):
    y, s = arrays(case)
    p = (s+4)/8
    assert np.isclose(scores.ece(y, p, n), reliability(torch.tensor(p), torch.tensor(y), n).ece)

def test_wrong_way_round_is_said():
    with pytest.warns(UserWarning, match='above generated'): c = scores.fit_calibration([0, 0, 1, 1, 1], [3, 4, 1, 0, 2])
    assert c.a == 0 and np.isclose(c(5.), c(-5.)) and np.isclose(c(0.), (3*.8 + 2*.25)/5, atol=1e-6)

def table(n=30, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        for k,up in dict(real=0, a=1, b=3).items():
            rows.append(dict(image=f'{k}{i}.png', label=int(k != 'real'), generator=k, source='xy'[i % 2], score=rng.normal()+up, group=f'p{i//2}', split=('val', 'test', 'test')[i % 3], text='t'))
    return pd.DataFrame(rows)

def test_interval_covers():
    "The interval of patients holds the true AUC about as often as it says."
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        g = np.repeat(np.arange(40), 4); y = np.tile([0, 0, 1, 1], 40)
        s = np.repeat(rng.normal(size=40), 4) + rng.normal(size=160) + y # Images of a patient are alike
        low, high = scores.auc_interval(y, s, g, 200, seed)[1:]
        hits += low <= .6914 <= high # Phi(1/2) for pairs of two patients or one: difference N(1, 2 or 4)
    assert hits >= 50

def test_order_of_rows_is_nothing():
    df = table()
    a, b = (scores.evaluate_scores(d, n=50) for d in (df, df.sample(frac=1, random_state=1)))
    pd.testing.assert_frame_equal(a.table()[['auc', 'matched', 'pooled', 'ap', 'tpr']], b.table()[['auc', 'matched', 'pooled', 'ap', 'tpr']])

def test_report_is_whole(tmp_path):
    r = scores.evaluate_scores(table(), n=50)
    r.save(tmp_path/'out')
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'scores.csv', 'generators.csv', 'sources.csv', 'evaluation.json'}
    s = json.loads((tmp_path/'out/evaluation.json').read_text())
    back = pd.read_csv(tmp_path/'out/generators.csv', index_col=0)
    assert np.isclose(back.loc['mean all', 'auc'], s['auc']['all']['auc']) and set(s['fpr_by_source']) == {'x', 'y'}
    assert np.isclose(s['operating_point']['fpr'], (r.rows[r.rows.label == 0].probability > s['threshold']).mean())

def test_one_patient_has_no_interval():
    df = table().assign(group='one')
    r = scores.evaluate_scores(df, n=20)
    assert r.table()['low'].isna().all() and r.summary['auc']['all']['low'] is None

def test_source_without_generated_images():
    df = table()
    df = df[(df.generator == 'real') | (df.source == 'x')]
    t, m = (scores.source_table(df[df.split == 'test'], matched=o, seen=[]) for o in (False, True))
    assert t[['x', 'y']].notna().to_numpy().all() and 'y' not in m.columns

@pytest.mark.parametrize('says,change', [('lacks group', lambda d: d.drop(columns='group')), ('are NaN', lambda d: d.assign(score=np.nan)), ('0 real and 1 generated', lambda d: d.assign(label=d.label+1)),
                                         ('contradict', lambda d: d.assign(generator='real')), ('both real and generated', lambda d: d[d.label == 1])])
def test_bad_tables(says, change):
    with pytest.raises(ValueError, match=says): scores.evaluate_scores(change(table()))

def test_captions_move_in_pairs():
    df = table().assign(pair=lambda d: d['image'].str[4:-4].where(d.generator == 'real', d['image'].str[1:-4]), text=lambda d: 'caption ' + d['pair'])
    new = controls.permuted_captions(df, 3)
    assert (new.text != df.text).all() and (new.groupby('pair').text.nunique() == 1).all() and new.drop(columns='text').equals(df.drop(columns='text'))
    for k,rows in df.groupby('split'): assert sorted(new.text[rows.index]) == sorted(rows.text)

@pytest.mark.parametrize('c', [1e-3, 1.])
def test_probe_is_logistic_regression(c):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 10))*5+1, np.arange(60) % 2
    p = controls.fit_probe(x, y, c)
    z = (x-p.mean)/p.std
    assert np.allclose(p(x), LogisticRegression(C=c, tol=1e-10, max_iter=9999).fit(z, y).decision_function(z), atol=1e-4)
    assert np.isfinite(controls.clip_probe(np.c_[x, np.ones(60)], y, np.c_[x, np.ones(60)])).all()

@pytest.mark.parametrize('size', [(16, 300), (17, 17), (65, 64), (200, 130)])
def test_formulas_on_any_size(size):
    x = [torch.rand(3, *size, generator=torch.Generator().manual_seed(0)), torch.zeros(3, *size)]
    for f in (controls.nyquist_score, controls.high_band_energy): assert f(x).shape == (2,) and np.isfinite(f(x)).all()
