"Generated counterparts, pairs and perturbations: what is no lesson, such as odd sizes, broken files and leaking patients."
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from PIL import Image
from medseg_nb.spai.generators import GENERATORS, list_generators, load_generator, save_generator, train_autoencoder
from medseg_nb.spai.pairs import assign_splits, audit_pairs, build_pairs, common_image, real_images
from medseg_nb.spai.perturb import PERTURBATIONS, perturb, robustness_table

torch.set_num_threads(1)

def picture(seed, h=80, w=80, grey=False):
    "A smooth random image with some texture, (H, W, 3) uint8."
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=g), (h, w), mode='bicubic') + .05*torch.randn(1, 3, h, w, generator=g)
    x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1) if grey else x
    return (x[0].clamp(0, 1)*255).byte().permute(1, 2, 0).numpy()

def tensor(*args, **kwargs): return torch.tensor(picture(*args, **kwargs)).permute(2, 0, 1)[None].float()/255

@pytest.fixture(scope='module')
def fitted():
    train = torch.cat([tensor(i) for i in range(3)])
    small = dict(autoencoder=dict(width=8, latent=4), vq=dict(codes=16, stages=1))
    gens = {n: load_generator(n, **small.get(n, {})) for n in list_generators()}
    return {n: g.fit(train, **(dict(steps=5) if n == 'autoencoder' else dict(n=400))) if g.fits else g for n,g in gens.items()}

@pytest.fixture
def index(tmp_path):
    "An index of 12 images of 6 patients, one of them grey, no splits."
    home = tmp_path/'pics'; home.mkdir()
    for i in range(12): Image.fromarray(picture(i, 70+i, 90, grey=i == 3)).save(home/f'{i:02d}.png')
    pd.DataFrame(dict(image=[f'{i:02d}.png' for i in range(12)], text='a picture', group=[f'p{i//2}' for i in range(12)], split='')).to_csv(home/'index.csv', index=False)
    return home/'index.csv'

def build(index, out, **kwargs):
    return build_pairs(index, out, **(dict(generators=['transposed', 'denoise', 'resynthesis'], unseen=['resynthesis'], size=64) | kwargs))

@pytest.mark.parametrize('name', list(GENERATORS))
@settings(max_examples=6, deadline=None)
@given(h=st.integers(32, 70), w=st.integers(32, 70), seed=st.integers(0, 2**40), grey=st.booleans())
def test_any_size_and_seed(fitted, name, h, w, seed, grey):
    x = tensor(1, h, w, grey)
    a, b = (fitted[name](x, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert a.shape == x.shape and a.equal(b) and a.isfinite().all() and 0 <= a.min() and a.max() <= 1
    assert not grey or (a == a[:, :1]).all()

@pytest.mark.parametrize('name', list(GENERATORS))
@pytest.mark.parametrize('value', [0., 1.])
def test_black_and_white_stay_in_range(fitted, name, value):
    y = fitted[name](torch.full((2, 3, 40, 40), value))
    assert y.isfinite().all() and 0 <= y.min() and y.max() <= 1

@pytest.mark.parametrize('name', list(GENERATORS))
def test_a_batch_is_its_images(fitted, name):
    if name in ('denoise', 'resynthesis'): pytest.skip('its noise goes over the batch')
    x = torch.cat([tensor(1), tensor(2)])
    assert torch.allclose(fitted[name](x)[1:], fitted[name](x[1:]), atol=1e-5)

def test_generators_leave_no_gradient_and_input_alone(fitted):
    x = tensor(4).requires_grad_()
    before = x.detach().clone()
    for g in fitted.values(): assert not g(x).requires_grad
    assert x.detach().equal(before)

@pytest.mark.parametrize('name', list(GENERATORS))
def test_saved_and_read_back(fitted, name, tmp_path):
    save_generator(fitted[name], tmp_path)
    assert load_generator(tmp_path)(tensor(5)).equal(fitted[name](tensor(5)))

def test_training_leaves_the_random_state():
    state = torch.get_rng_state()
    train_autoencoder(tensor(0), steps=2)
    assert torch.get_rng_state().equal(state)

def test_real_image_is_not_changed_by_the_path(index, tmp_path):
    path = build(index, tmp_path/'out')
    df = pd.read_csv(path)
    real = df[df['label'] == 0].iloc[0]
    x = common_image(index.parent/f"{real['pair'].split('_')[-1]}.png", 64)
    with Image.open(path.parent/real['image']) as im: assert (np.asarray(im) == (x*255).round().byte().permute(1, 2, 0).numpy()).all()

@pytest.mark.parametrize('codec,ext', [('png', '.png'), ('jpeg', '.jpg')])
def test_files_differ_in_pixels_only(index, tmp_path, codec, ext):
    path = build(index, tmp_path/'out', codec=codec)
    df, audit = pd.read_csv(path), audit_pairs(path)
    assert (audit['container'] == .5).all() and set(audit.index) == {'transposed', 'denoise', 'resynthesis'}
    assert audit['d_brightness'].max() < 2
    assert {Path(p).suffix for p in df['image']} == {ext}
    if codec == 'png': assert (audit['colour'] == .5).all()

def test_patients_and_unseen_generators(index, tmp_path):
    df = pd.read_csv(build(index, tmp_path/'out'))
    assert list(df.columns) == ['image', 'label', 'generator', 'source', 'pair', 'group', 'split', 'text']
    assert df.groupby('group')['split'].nunique().max() == 1 and df['group'].str.startswith('pics/').all()
    assert set(df.loc[df['generator'] == 'resynthesis', 'split']) == {'test'}
    assert df.groupby('pair')['split'].nunique().max() == 1 and (df.groupby('pair')['label'].agg(lambda o: (o == 0).sum()) == 1).all()
    assert set(df['split']) == {'train', 'val', 'test'} and ((df['generator'] == 'real') == (df['label'] == 0)).all()

def test_stopped_run_gives_the_same_set(index, tmp_path):
    whole = build(index, tmp_path/'a').parent
    def stop(todo):
        for i,o in enumerate(todo):
            if i == 4: raise KeyboardInterrupt
            yield o
    with pytest.raises(KeyboardInterrupt): build(index, tmp_path/'b', progress=stop)
    assert not (tmp_path/'b'/'pairs.csv').exists()
    again = build(index, tmp_path/'b').parent
    files = sorted(p.relative_to(whole) for p in whole.rglob('*') if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob('*') if p.is_file())
    assert all((whole/p).read_bytes() == (again/p).read_bytes() for p in files)

@pytest.mark.parametrize('change', [dict(seed=1), dict(size=60), dict(codec='jpeg'), dict(unseen=[]), dict(per_image=1), dict(fractions=(.5, .25, .25)),
                                    dict(generators=dict(transposed=dict(uneven=.02), denoise={}, resynthesis={}))])
def test_other_settings_are_refused(index, tmp_path, change):
    build(index, tmp_path/'out')
    with pytest.raises(ValueError, match=f'other settings.*{next(iter(change))}'): build(index, tmp_path/'out', **change)

def test_other_images_are_refused(index, tmp_path):
    build(index, tmp_path/'out')
    Image.fromarray(picture(99)).save(index.parent/'00.png')
    with pytest.raises(ValueError, match='other images'): build(index, tmp_path/'out')

def test_arguments_with_tuples_can_be_gone_on_with(index, tmp_path):
    for _ in range(2): build(index, tmp_path/'out', generators=dict(denoise=dict(sigmas=(.02, .01))), unseen=[])

def test_same_names_in_two_folders(tmp_path):
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    for i,f in enumerate('ab'): Image.fromarray(picture(i)).save(tmp_path/f/'x.png')
    pd.DataFrame(dict(image=['a/x.png', 'b/x.png'], split='train')).to_csv(tmp_path/'index.csv', index=False)
    df = real_images(tmp_path/'index.csv')
    assert df['pair'].is_unique and set(df['text']) == {''} and df['group'].nunique() == 2

def test_a_group_keeps_the_split_that_some_of_it_has():
    df = pd.DataFrame(dict(source='s', group=['a', 'a', 'b'], split=['unlabelled', 'val', 'demo']))
    assert assign_splits(df).tolist()[:2] == ['val', 'val']

def test_lost_image_and_index_without_images(index, tmp_path):
    (index.parent/'05.png').unlink()
    with pytest.raises(FileNotFoundError, match='05.png'): build(index, tmp_path/'out')
    pd.DataFrame(dict(picture=['x.png'])).to_csv(tmp_path/'index.csv', index=False)
    with pytest.raises(ValueError, match='column image'): real_images(tmp_path/'index.csv')

def test_small_image_is_refused_by_name(index, tmp_path):
    with pytest.raises(ValueError, match='would leave the trace'): build(index, tmp_path/'out', size=80)

@pytest.mark.parametrize('name', list(PERTURBATIONS))
@settings(max_examples=5, deadline=None)
@given(h=st.integers(9, 50), w=st.integers(9, 50), i=st.integers(0, 4))
def test_perturb_any_size(name, h, w, i):
    x, level = tensor(2, h, w)[0], PERTURBATIONS[name][i % len(PERTURBATIONS[name])]
    y = perturb(x, name, level)
    assert y.shape == x.shape and y.equal(perturb(x, name, level)) and 0 <= y.min() and y.max() <= 1

def test_robustness_table_takes_images_of_any_sizes():
    images = [tensor(i, 40+i, 50)[0] for i in range(4)]
    df = robustness_table(lambda o: torch.tensor([x.mean() for x in o]), images, [0, 1, 0, 1], dict(blur=[1], jpeg=[70]), bs=3)
    assert list(df.index) == [('none', 0), ('blur', 1), ('jpeg', 70)] and df['auc'].between(0, 1).all() and df['change'].iloc[0] == 0
