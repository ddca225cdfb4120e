"Cache, training and readers of Talk2MedSAM: what changes, what is cut short, what must not be accepted."
import json, signal, subprocess, sys, textwrap, time
import nibabel as nib, numpy as np, pandas as pd, pytest, torch
from pathlib import Path
from PIL import Image
from hypothesis import given, settings, strategies as st
from medseg_nb.core import seeded
from medseg_nb.data import read_index
from medseg_nb.phantoms import make_phantom_pack
from medseg_nb.sam.pretrained import medsam_pixels, sam_pixels
from medseg_nb.talk2medsam.cache import EmbeddingCache, cache_key, low_mask, square_box, tensor_digest, weights_digest
from medseg_nb.talk2medsam.learner import (AdapterTraining, check_leaks, contrastive_loss, jitter_boxes, talk2medsam_dls, train_talk2medsam,
                                           training_boxes, training_texts)
from medseg_nb.talk2medsam.model import Talk2MedSAM, talk2medsam
from medseg_nb.talk2medsam.readers import (Volume, dicom_volume, group_splits, nifti_mask, nifti_volume, read_busbra, read_case, read_nsclc, slices_25d)

torch.set_num_threads(1)
SIDE, QUICK = 16, settings(max_examples=40, deadline=None, derandomize=True)

class Counting:
    "An encoder that is a mean over blocks, and counts."
    def __init__(self, scale=1.): self.scale, self.n = scale, 0
    def __call__(self, x):
        self.n += len(x)
        return torch.nn.functional.adaptive_avg_pool2d(x, 4)*self.scale

def net(scale): m = torch.nn.Linear(1, 1); m.weight.data.fill_(scale); m.bias.data.zero_(); return m
KEY = cache_key(net(1.), SIDE)

@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
        m = np.zeros((20, 30), np.uint8); m[4:10, i:i+9] = 255
        Image.fromarray(m).save(tmp_path/f'm{i}.png')
    return pd.DataFrame(dict(image=[str(tmp_path/f'{i}.png') for i in range(4)], mask=[str(tmp_path/f'm{i}.png') for i in range(4)], text='a'))

# The cache

def test_second_build_computes_nothing(images, tmp_path):
    f = Counting()
    a = EmbeddingCache(tmp_path/'c').build(f, images, KEY)
    assert f.n == 4 and a.computed == 4
    assert EmbeddingCache(tmp_path/'c').build(f, images, KEY).computed == 0 and f.n == 4

def test_only_the_changed_image_is_computed(images, tmp_path):
    f, cache = Counting(), EmbeddingCache(tmp_path/'c')
    old = cache.build(f, images, KEY).embedding(2)
    a = np.array(Image.open(images['image'][2])); a[0, 0] ^= 255; Image.fromarray(a).save(images['image'][2])
    assert cache.build(f, images, KEY).computed == 1 and not cache.embedding(2).equal(old)

def test_an_image_is_known_by_its_pixels(images, tmp_path):
    "Same size and date, other pixels: another image. Other name and compression, same pixels: the same."
    import os, shutil
    f, cache, p = Counting(), EmbeddingCache(tmp_path/'c'), Path(images['image'][0])
    cache.build(f, images, KEY)
    Image.open(p).save(tmp_path/'again.png', compress_level=0)
    assert cache.build(f, [tmp_path/'again.png'], KEY).computed == 0
    Image.fromarray(255 - np.array(Image.open(p))).save(tmp_path/'tif.tif'); stat = p.stat()
    Image.open(tmp_path/'tif.tif').save(p); os.utime(p, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.build(f, images, KEY).computed == 1

@pytest.mark.parametrize('other', [cache_key(net(2.), SIDE), cache_key(net(1.), 2*SIDE), cache_key(net(1.), SIDE, sam_pixels)], ids=['weights', 'side', 'pixels'])
def test_another_key_is_another_embedding(images, tmp_path, other):
    f, cache = Counting(), EmbeddingCache(tmp_path/'c')
    cache.build(f, images, KEY)
    assert cache.build(f, images, other, pixels=sam_pixels if other['pixels'] == 'sam_pixels' else medsam_pixels).computed == 4
    assert cache.build(f, images, KEY).computed == 0

def test_preprocessing_is_known_by_what_it_does():
    def medsam_pixels(x, side): return sam_pixels(x, side)
    assert cache_key(net(1.), SIDE, medsam_pixels)['probe'] != KEY['probe'] and cache_key(net(1.), SIDE, medsam_pixels)['pixels'] == 'medsam_pixels'

def test_weights_bit_by_bit():
    a, b = net(1.), net(1.)
    b.weight.data = torch.nextafter(b.weight.data, torch.tensor(2.))
    assert weights_digest(a) == weights_digest(net(1.)) != weights_digest(b)

@pytest.mark.parametrize('spoil', [lambda b: b[:-1], lambda b: b[:60], lambda b: b'', lambda b: b'garbage', lambda b: b.replace(b"'<f2'", b"'<f4'")], ids=['cut', 'head', 'empty', 'foreign', 'type'])
def test_spoiled_file_is_said_and_rebuilt(images, tmp_path, spoil):
    f, cache = Counting(), EmbeddingCache(tmp_path/'c')
    good = cache.build(f, images, KEY).embedding(1)
    p = cache._file(cache.rows[1]['embedding']); p.write_bytes(spoil(p.read_bytes()))
    with pytest.raises(ValueError, match='has lost a row.*Build again'): EmbeddingCache(tmp_path/'c')[1]
    assert cache.build(f, images, KEY).computed == 1 and cache.embedding(1).equal(good)

def test_lost_mask_is_written_again(images, tmp_path):
    cache = EmbeddingCache(tmp_path/'c').build(Counting(), images, KEY)
    good = cache[3].mask
    cache._file(cache.rows[3]['mask']).unlink()
    with pytest.raises(ValueError, match='has lost a row'): cache[3]
    assert cache.build(Counting(), images, KEY)[3].mask.equal(good)

def test_pickle_in_the_place_of_a_row_is_not_run(images, tmp_path):
    class Evil:
        def __reduce__(self): return open, (str(tmp_path/'harm'), 'w')
    cache = EmbeddingCache(tmp_path/'c').build(Counting(), images, KEY)
    np.save(cache._file(cache.rows[0]['embedding']), np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(ValueError, match='has lost a row'): cache[0]
    assert not (tmp_path/'harm').exists()

def test_index_that_is_none(images, tmp_path):
    EmbeddingCache(tmp_path/'c').build(Counting(), images, KEY)
    for text in ('{', '[]', '{"rows": [{}], "shape": [1], "key": {}}'):
        (tmp_path/'c'/'index.json').write_text(text)
        with pytest.raises(ValueError, match='no index of an embedding cache'): EmbeddingCache(tmp_path/'c')

def test_killed_build_goes_on(images, tmp_path):
    "The process is killed in the middle of the third image."
    code = f"""
        import torch, time, pandas as pd
        from medseg_nb.talk2medsam.cache import EmbeddingCache
        n = 0
        def slow(x):
            global n; n += 1
            if n == 3: print('now', flush=True); time.sleep(600)
            return torch.nn.functional.adaptive_avg_pool2d(x, 4)
        EmbeddingCache({str(tmp_path/'c')!r}).build(slow, {list(images['image'])!r}, {KEY!r})"""
    p = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert p.stdout.readline().strip() == b'now'
    p.send_signal(signal.SIGKILL); p.wait()
    cache = EmbeddingCache(tmp_path/'c')
    assert len(cache) == 0 and cache.build(Counting(), images, KEY).computed == 2
    whole = EmbeddingCache(tmp_path/'w').build(Counting(), images, KEY)
    assert all(cache.embedding(i).equal(whole.embedding(i)) for i in range(4))

def test_an_epoch_opens_no_image(images, tmp_path):
    EmbeddingCache(tmp_path/'c').build(Counting(), images, KEY)
    for p in [*images['image'], *images['mask']]: Path(p).unlink()
    cache = EmbeddingCache(tmp_path/'c')
    assert [tuple(cache[i].embedding.shape) for i in range(4)] == [(3, 4, 4)]*4 and cache[0].mask.shape == (16, 16)

def test_unreadable_image_is_named(images, tmp_path):
    Path(images['image'][1]).write_text('no picture')
    with pytest.raises(ValueError, match='1.png'): EmbeddingCache(tmp_path/'c').build(Counting(), images, KEY)

@QUICK
@given(st.integers(5, 60), st.integers(5, 60), st.data())
def test_box_is_that_of_the_enlarged_mask(h, w, data):
    y0, x0 = data.draw(st.integers(0, h-1)), data.draw(st.integers(0, w-1))
    y1, x1 = data.draw(st.integers(y0, h-1)), data.draw(st.integers(x0, w-1))
    m = torch.zeros(h, w, dtype=torch.bool); m[y0:y1+1, x0:x1+1] = True
    side = h*w
    big = m.repeat_interleave(w, 0).repeat_interleave(h, 1)
    want = [int(v) for v in (big.any(0).nonzero().min(), big.any(1).nonzero().min(), big.any(0).nonzero().max(), big.any(1).nonzero().max())]
    assert torch.allclose(square_box(m, side), torch.tensor(want).float(), atol=.01*side/100 + .05)
    assert abs(low_mask(m, (h, w)).float().sum()/255 - m.sum()) < 1e-3

# Training

@pytest.fixture(scope='module')
def pack(tmp_path_factory):
    d = tmp_path_factory.mktemp('pack')
    with seeded(0): make_phantom_pack(d, 12, kinds=['chest'], size=64, seed=0, splits=dict(train=.5, val=.25, test=.25))
    df = read_index(d/'index.csv')
    return df[df['text'].isin(['left lung', 'right lung'])].reset_index(drop=True)

@pytest.fixture(scope='module')
def model():
    with seeded(0): return talk2medsam('tiny', 'hierarchical', 'tiny', pretrained=False)

@pytest.fixture(scope='module')
def cache(pack, model, tmp_path_factory):
    return EmbeddingCache(tmp_path_factory.mktemp('cache')).build(model.embed, pack, cache_key(model.sam.vision_encoder, model.size))

def test_leakage_is_refused_by_name(pack, model, tmp_path):
    df = pack.copy()
    stranger = df.loc[df['split'] == 'train', 'group'].iloc[0]
    df.loc[df['split'] == 'test', 'group'] = stranger
    with pytest.raises(ValueError, match='in test and train') as e: train_talk2medsam(df, tmp_path/'m', model, tmp_path/'c', device='cpu')
    assert f"'{stranger}'" in str(e.value) and not (tmp_path/'m').exists() and not (tmp_path/'c').exists()
    check_leaks(pack)

def test_leakage_can_be_allowed_aloud(pack, model, cache, tmp_path):
    df = pack.assign(group='one')
    with pytest.raises(ValueError, match='1 group'): check_leaks(df)
    train_talk2medsam(df, tmp_path/'m', model, cache.folder, epochs=1, leaks=True, progress=None, device='cpu')
    assert json.loads((tmp_path/'m'/'report.json').read_text())['splits']['train']['groups'] == 1

def test_report_and_folder(pack, model, cache, tmp_path):
    before = weights_digest(model)
    done = train_talk2medsam(pack, tmp_path/'m', model, cache.folder, epochs=1, progress=None, device='cpu')
    r = json.loads((tmp_path/'m'/'report.json').read_text())
    assert weights_digest(model) == before and weights_digest(done.sam) == weights_digest(model.sam)
    assert set(r['dice']) == {'train', 'val', 'test'} and r['cache']['computed'] == 0 and r['settings']['text'] == 'own'
    assert sum(s['rows'] for s in r['splits'].values()) == len(pack)
    again = Talk2MedSAM.from_pretrained(tmp_path/'m', sam=model.sam)
    assert weights_digest(again.adapter) == weights_digest(done.adapter) and not (tmp_path/'m'/'adapter.resume').exists()

def test_without_validation_a_fifth_of_the_groups(pack, model, cache, tmp_path):
    train_talk2medsam(pack.assign(split=pack['split'].replace('val', 'train')), tmp_path/'m', model, cache.folder, epochs=1, progress=None, device='cpu')
    assert json.loads((tmp_path/'m'/'report.json').read_text())['splits']['val']['groups'] >= 1

@pytest.mark.parametrize('bad,says', [(dict(boxes='truht'), "Did you mean 'truth'"), (dict(text='nonne'), "Did you mean 'none'"), (dict(preset='sed'), "Did you mean 'seed'")])
def test_unknown_choices(pack, model, tmp_path, bad, says):
    with pytest.raises(ValueError, match=says): train_talk2medsam(pack, tmp_path/'m', model, tmp_path/'c', device='cpu', **bad)
    assert not (tmp_path/'c').exists()

def test_saliency_needs_maps(pack, model, cache, tmp_path):
    with pytest.raises(ValueError, match='a column prior'): talk2medsam_dls(pack, cache, model, 'saliency', device='cpu')

def test_empty_mask_gets_the_whole_square(pack, model, tmp_path):
    Image.new('L', (64, 64)).save(tmp_path/'empty.png')
    df = pack[:2].assign(mask=str(tmp_path/'empty.png'))
    c = EmbeddingCache(tmp_path/'c').build(model.embed, df, cache_key(model.sam.vision_encoder, model.size))
    assert training_boxes(df, c, 'truth').tolist() == [[0., 0., 255., 255.]]*2

def test_frozen_stays_frozen_and_in_eval(cache, pack, model):
    dls = talk2medsam_dls(pack, cache, model, device='cpu')
    net = AdapterTraining(model, dls.bank).train()
    assert net.training and not model.sam.training and not model.encoder.training
    assert {id(p) for p in net.parameters()}.isdisjoint({id(p) for p in [*model.sam.parameters(), *model.encoder.parameters()]})
    net(*dls.one_batch()[:4])[0].sum().backward()
    assert all(p.grad is None for p in model.sam.parameters()) and any(p.grad is not None for p in model.adapter.parameters())
    assert not model.adapter._forward_hooks

@QUICK
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 999))
def test_contrastive_is_its_loops(n, k, seed):
    with seeded(seed): z, t, y = torch.randn(n, 6).double(), torch.randn(n, 6).double(), torch.randint(0, k, (n,))
    s = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for b in t]) for a in z])/.07
    want = 0.
    for i in range(n):
        p = [j for j in range(n) if y[j] == y[i]]
        want -= sum((s[i, j] - s[i].logsumexp(0)) + (s[j, i] - s[:, i].logsumexp(0)) for j in p)/len(p)/2/n
    assert abs(contrastive_loss(z, t, y) - want) < 1e-8*max(1, abs(want))

@QUICK
@given(st.integers(0, 99), st.floats(0, 1))
def test_jittered_boxes_are_boxes(seed, amount):
    with seeded(seed): b = torch.rand(20, 2, 2).sort(1).values.flatten(1)*255
    j = jitter_boxes(b, amount, 256)
    assert (j[:, :2] <= j[:, 2:]).all() and j.min() >= 0 and j.max() <= 255 and (amount or j.equal(b))

def test_controls_keep_the_splits_apart(pack):
    a, b = training_texts(pack, 'own')[0], training_texts(pack, 'shuffled', 5)[0]
    for s in ('train', 'val', 'test'):
        i = np.flatnonzero(pack['split'] == s)
        assert sorted(a[j] for j in i) == sorted(b[j] for j in i)
    assert len(set(training_texts(pack, 'none')[0])) == 1

# The readers

def write_busbra(root, cases=5):
    for d in ('Images', 'Masks'): (root/d).mkdir(parents=True)
    rows, folds = [], []
    for c in range(1, cases+1):
        for s in 'lr':
            Image.new('L', (12, 9), c*20).save(root/'Images'/f'bus_{c:04}-{s}.png'); Image.new('L', (12, 9)).save(root/'Masks'/f'mask_{c:04}-{s}.png')
            rows.append(dict(ID=f'bus_{c:04}-{s}', Case=c, Histology='x', Pathology='benign', BIRADS=2 + c % 4, Device='d', Width=12, Height=9, Side=s, BBOX='[]'))
            folds.append(dict(ID=f'bus_{c:04}-{s}', Pathology='benign', kFold=c, valid_1=float(c == 2) if c != 1 else np.nan))
    pd.DataFrame(rows).to_csv(root/'bus_data.csv', index=False); pd.DataFrame(folds).to_csv(root/'5-fold-cv.csv', index=False)

def test_busbra_round_trip(tmp_path):
    write_busbra(tmp_path/'b')
    df = read_busbra(tmp_path/'b', fold=1)
    assert df.groupby('split')['group'].unique().map(list).to_dict() == dict(test=['case 1'], train=['case 3', 'case 4', 'case 5'], val=['case 2'])
    df.to_csv(tmp_path/'index.csv', index=False)
    check_leaks(read_index(tmp_path/'index.csv'))
    assert read_busbra(tmp_path/'b', texts={k: f't{k}' for k in (2, 3, 4, 5)})['text'].tolist() == [f't{2 + c % 4}' for c in range(1, 6) for _ in 'lr']

def test_busbra_partition_through_a_patient(tmp_path):
    write_busbra(tmp_path/'b')
    p = tmp_path/'b'/'5-fold-cv.csv'; d = pd.read_csv(p); d.loc[0, 'kFold'] = 3; d.to_csv(p, index=False)
    with pytest.raises(ValueError, match=r"1 patient\(s\) on more than one side \(fold\): case 1"): read_busbra(tmp_path/'b')

@pytest.mark.parametrize('gone,says', [('bus_data.csv', 'no BUS-BRA file'), ('5-fold-cv.csv', 'no partition file'), ('Images/bus_0002-l.png', '1 images not there.*bus_0002-l'), ('Masks/mask_0002-l.png', '1 masks not there')])
def test_busbra_missing_files(tmp_path, gone, says):
    write_busbra(tmp_path/'b'); (tmp_path/'b'/gone).unlink()
    with pytest.raises(FileNotFoundError, match=says): read_busbra(tmp_path/'b', fold=1)

def write_case(folder, v, m, affine=None):
    folder.mkdir(parents=True)
    affine = np.diag([-.7, -.7, 2., 1.]) if affine is None else affine
    for n,a in (('ct', v), ('mask', m.astype(np.uint8))): nib.save(nib.Nifti1Image(np.ascontiguousarray(a.transpose(2, 1, 0)), affine), folder/f'{n}.nii.gz')

@pytest.fixture
def lung(tmp_path):
    rng = np.random.default_rng(0)
    v, m = rng.integers(-1000, 400, (6, 16, 20)).astype(np.int16), np.zeros((6, 16, 20), bool)
    m[2:4, 5:9, 3:8] = True
    for i in range(3): write_case(tmp_path/'n'/f'R01-00{i}', v + i, m if i else m & False)
    pd.DataFrame({'Case ID': [f'R01-00{i}' for i in range(4)], 'Pathological T stage': ['T1a', 'T2a', 'T4', 'T3'], 'Histology': 'Adenocarcinoma'}).to_csv(tmp_path/'n'/'c.csv', index=False)
    return tmp_path/'n', v, m

def test_nsclc_round_trip(lung, tmp_path):
    root, v, m = lung
    df = read_nsclc(root, tmp_path/'out', window=(-300, 1400))
    assert df['group'].tolist() == ['R01-001']*2 + ['R01-002']*2 and df['slice'].tolist() == [2, 3]*2
    x = np.array(Image.open(df['image'][0]))
    assert np.abs(x.transpose(2, 0, 1).astype(float) - ((v[1:4] + 1. + 1000)/1400*255).clip(0, 255)).max() <= .5
    assert (np.array(Image.open(df['mask'][0])) == m[2]*255).all()
    r = json.loads((tmp_path/'out'/'report.json').read_text())
    assert r['skipped'] == {'R01-000': 'the segmentation is empty', 'R01-003': 'no folder'} and r['empty_slices'] == 8
    assert len(read_index(tmp_path/'out'/'index.csv')) == 4

def test_nsclc_goes_on_after_a_case(lung, tmp_path):
    root, v, m = lung
    whole = read_nsclc(root, tmp_path/'out')
    (tmp_path/'out'/'cases'/'R01-002.json').unlink(); (tmp_path/'out'/'index.csv').unlink()
    kept = Path(whole['image'][0]).stat().st_mtime_ns
    assert read_nsclc(root, tmp_path/'out').equals(whole) and Path(whole['image'][0]).stat().st_mtime_ns == kept

def test_nsclc_contradiction(lung, tmp_path):
    root, v, m = lung
    write_case(root/'R01-003', v, m); nib.save(nib.Nifti1Image(m[:, :8].astype(np.uint8).transpose(2, 1, 0), np.diag([-.7, -.7, 2., 1.])), root/'R01-003'/'mask.nii.gz')
    with pytest.raises(ValueError, match='case R01-003.*slices, rows and columns'): read_nsclc(root, tmp_path/'out')
    assert len(read_nsclc(root, tmp_path/'out', strict=False)) == 4
    assert 'R01-003' in json.loads((tmp_path/'out'/'report.json').read_text())['skipped']

@QUICK
@given(st.permutations('xyz'), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_any_order_of_axes_is_one_volume(order, flips):
    import tempfile
    v = np.arange(3*4*5, dtype=np.int16).reshape(3, 4, 5)
    base = nib.Nifti1Image(np.ascontiguousarray(v.transpose(2, 1, 0)), np.diag([-.7, -.8, 2., 1.]))
    codes = [dict(x='LR', y='AP', z='SI')[o][f] for o,f in zip(order, flips)]
    turn = nib.orientations.ornt_transform(nib.io_orientation(base.affine), nib.orientations.axcodes2ornt(codes))
    with tempfile.TemporaryDirectory() as d:
        nib.save(base.as_reoriented(turn), f'{d}/a.nii'); got = nifti_volume(f'{d}/a.nii')
        assert (got.values == v).all() and np.allclose(got.spacing, (2, .8, .7)) and np.allclose(got.origin, 0, atol=1e-5)
        assert nifti_mask(f'{d}/a.nii', got).sum() == (v > 0).sum()

def test_slices_are_lazy_and_bounded():
    class Touch(np.ndarray): pass
    v = np.arange(4.).reshape(4, 1, 1).view(Touch)
    assert [slices_25d(v, i).ravel().tolist() for i in range(4)] == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]
    for i in (-1, 4):
        with pytest.raises(IndexError): slices_25d(v, i)

@QUICK
@given(st.integers(3, 40), st.floats(.05, .4), st.floats(.05, .4), st.integers(0, 99))
def test_groups_lie_in_one_split(n, val, test, seed):
    df = group_splits(pd.DataFrame(dict(group=[str(i//2) for i in range(2*n)])), val, test, seed)
    assert df.groupby('group')['split'].nunique().max() == 1 and set(df['split']) == {'train', 'val', 'test'}
