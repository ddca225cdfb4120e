"Wording, episodes, types and phantoms: properties that hold for any input."
import random
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import TensorImage
from hypothesis import given, settings, strategies as st
from medseg_nb import data, packs
from medseg_nb.augment import random_light
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.core import seeded
from medseg_nb.data import (JointAugment, Prompts, TensorMasks, Tokenize, byte_cache, dihedral, get_pack, list_packs, load_square, make_episodes,
                            prompt_dls, read_index, split_groups)
from medseg_nb.phantoms import KINDS, ellipse, make_phantom_pack, phantom
from medseg_nb.wording import SYNONYMS, TEMPLATES, mirror_prompt, paraphrase, realm

WORDS = st.sampled_from(['left', 'right', 'Left', 'Right', 'LEFT', 'RIGHT', 'lung', 'upright', 'bright', 'leftmost', 'right-sided', 'both', ',', '. ', '-', '_', '3'])
QUICK = settings(max_examples=200, deadline=None, derandomize=True)

@pytest.fixture(scope='module')
def pack(tmp_path_factory): return make_phantom_pack(tmp_path_factory.mktemp('pack'), n=10, size=32)

@QUICK
@given(st.one_of(st.text(), st.lists(WORDS).map(' '.join), st.lists(WORDS).map(''.join)))
def test_mirror_is_an_involution_after_the_first(text):
    "The first one may change odd capitals, as in 'lEFT'."
    once = mirror_prompt(text)
    assert mirror_prompt(mirror_prompt(once)) == once

@QUICK
@given(st.lists(WORDS))
def test_mirror_gives_usual_words_back(words):
    text = ' '.join(words)
    assert mirror_prompt(mirror_prompt(text)) == text
    sides = lambda t: [w.lower() for w in t.split() if w.lower() in ('left', 'right')]
    assert sides(mirror_prompt(text)) == [dict(left='right', right='left')[w] for w in sides(text)]

@QUICK
@given(st.sampled_from(sorted(SYNONYMS)), st.integers(0, 2**32))
def test_paraphrase_commutes_with_the_mirror(text, seed):
    said = mirror_prompt(paraphrase(text, random.Random(seed), 1.))
    other = mirror_prompt(text)
    assert any(said.lower() in (t.format(s).replace('the the', 'the').replace('the all', 'all').lower()) for s in [other, *SYNONYMS[other]] for t in TEMPLATES)

@QUICK
@given(st.text(max_size=20))
def test_realm_of_anything(modality): assert realm(realm(modality)) in (realm(modality), realm(realm(realm(modality))))

@QUICK
@given(st.integers(0, 7), st.integers(2, 6))
def test_dihedral_is_a_symmetry(k, n):
    x = torch.arange(n*n).view(1, n, n)
    y = dihedral(x, k)
    assert sorted(y.flatten().tolist()) == list(range(n*n)) and (k == 0 or not y.equal(x))
    turned_back = [j for j in range(8) if dihedral(y, j).equal(x)]
    assert len(turned_back) == 1

@QUICK
@given(st.integers(2, 30), st.floats(.05, .9), st.integers(0, 99))
def test_groups_stay_together(n, valid, seed):
    df = pd.DataFrame(dict(group=[f'{i//3}' for i in range(3*n)]))
    df['split'] = split_groups(df, valid, seed)
    assert df.groupby('group')['split'].nunique().max() == 1 and 'val' in set(df['split'])

@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0, 1), st.booleans(), st.floats(.1, 1))
def test_episodes_keep_words_and_masks_together(pack, seed, prompts, negatives, flips, near):
    df = read_index(pack)
    own = df.groupby('image').apply(lambda g: dict(zip(g['mask'], g['text'])), include_groups=False)
    for r in make_episodes(df, 20, prompts, negatives, words=0., flips=flips, near=near, seed=seed).query('not valid').itertuples():
        y, x, side = r.window
        assert min(y, x) >= 0 and near <= side and max(y, x)+side <= 1+1e-9
        assert len(r.texts) == len(r.masks) == prompts and r.masks[0]
        for t,m in zip(r.texts, r.masks):
            t = mirror_prompt(t) if r.k % 2 else t
            assert own[r.image][m].lower() in t.lower() if m else not any(o.lower() in t.lower() for o in own[r.image].values())

def test_tokens_come_back_as_words():
    enc = load_encoder('tiny', pretrained=False)
    tok = Tokenize(enc, 16)
    for t in ('left lung', 'the optic disc', 'cell nuclei', 'retinal haemorrhages', 'pituitary adenomas'):
        [back] = tok.decode(tok(Prompts([t])))
        assert back == t and '##' not in back

@pytest.mark.parametrize('kind', KINDS)
def test_batches_of_phantoms(pack, kind):
    df = read_index(pack)
    with seeded(0):
        dls = prompt_dls(make_episodes(df[df['modality'] == KINDS[kind]]), load_encoder('tiny', pretrained=False), size=32, bs=2, device='cpu')
        x,ids,y = dls.one_batch()
        assert type(x) is TensorImage and type(y) is TensorMasks and x.shape[-2:] == y.shape[-2:] == (32, 32) and 0 <= y.min() <= y.max() <= 1
        dls.show_batch(); dls.valid.show_batch(max_n=1)
    plt.close('all')

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.floats(0, 2))
def test_light_stays_in_range(seed, amount):
    with seeded(seed): y = random_light(torch.rand(3, 3, 8, 8), amount)
    assert y.shape == (3, 3, 8, 8) and 0 <= y.min() and y.max() <= 1

def test_no_augmentation_is_the_identity():
    x, y = torch.rand(4, 3, 16, 16), torch.rand(4, 2, 16, 16)
    a, _, b = JointAugment(p=0., light=0.)((TensorImage(x), None, TensorMasks(y)), split_idx=0)
    assert (a-x).abs().max() < 2e-4 and (b.as_subclass(torch.Tensor)-y).abs().max() < 1e-5

def test_packs_are_found_by_the_environment(pack, monkeypatch):
    monkeypatch.setenv('MEDSEG_DATA', str(pack.parent.parent))
    assert get_pack(pack.parent.name) == pack.parent and list_packs().loc[pack.parent.name, 'here']
    monkeypatch.setenv('MEDSEG_DATA', str(pack.parent/'nowhere')); monkeypatch.setenv('XDG_CACHE_HOME', str(pack.parent.parent.parent))
    with pytest.raises(ValueError, match='unknown pack'): get_pack(pack.parent.name)

def test_a_known_pack_that_is_missing_is_no_unknown_one(pack, monkeypatch):
    "Whether there are other packs or none."
    for root in (pack.parent/'nowhere', pack.parent.parent):
        monkeypatch.setattr(packs, 'data_roots', lambda: [root])
        with pytest.raises(FileNotFoundError, match='MEDSEG_DATA') as e: get_pack('cxr_lungs')
        assert all(s in str(e.value) for s in packs.KNOWN_PACKS['cxr_lungs'].source.split()) and str(root) in str(e.value)
        with pytest.raises(ValueError, match="Did you mean 'cxr_lungs'"): get_pack('cxr-lungs')

@QUICK
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=30), st.integers(0, 30))
def test_byte_cache_gives_what_the_function_gives(calls, limit):
    "Whatever is asked in whatever order, and never holds more than its limit."
    f = lambda key, n: torch.full((n,), key, dtype=torch.uint8)
    cached = byte_cache(limit)(f)
    for key,n in calls:
        assert cached(key, n).equal(f(key, n)) and cached(key, n=n).equal(f(key, n))
        assert cached.nbytes == sum(o.nbytes for o in cached.kept.values()) <= limit

def test_encoders_that_cannot_be_batched_are_refused():
    class Other: tokenize = None
    with pytest.raises(ValueError, match='Other has no tokenizer, pad_id'): Tokenize(Other())

def test_words_are_importable_from_data():
    assert data.mirror_prompt is mirror_prompt and data.paraphrase is paraphrase and data.SYNONYMS is SYNONYMS and data.realm is realm

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(.15, .6), st.floats(.15, .6), st.floats(0, 3.2), st.floats(-.2, .2), st.floats(-.2, .2))
def test_area_of_an_ellipse(ry, rx, angle, cy, cx):
    assert abs((ellipse(256, (cy, cx), (ry, rx), angle) < 0).mean()*4/(np.pi*ry*rx) - 1) < .02

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(list(KINDS)), st.integers(16, 64), st.integers(0, 2**31))
def test_phantoms(kind, size, seed):
    x, masks = phantom(kind, size, seed)
    assert x.shape == (3, size, size) and 0 <= x.min() and x.max() <= 1 and all(m.shape == (size, size) and m.any() and not m.all() for m in masks.values())
    if kind == 'chest':
        at = {t: m.nonzero()[:, 1].float().mean() for t,m in masks.items()}
        assert at['right lung'] < at['left lung'] and (masks['both lungs'] == (masks['left lung'] | masks['right lung'])).all()

def test_phantom_pack_round_trip(pack):
    df = read_index(pack)
    assert set(df['split']) == {'train', 'val', 'test'} and df['id'].is_unique
    for r in df.iloc[::9].itertuples():
        kind,i = r.id.split('_')[:2]
        x, masks = phantom(kind, 32, [0, list(KINDS).index(kind), int(i)])
        assert (load_square(r.image, 32)/255 - x).abs().max() < .003
        assert ((load_square(r.mask, 32, mask=True)[0] > 127) == masks[r.text]).all()
