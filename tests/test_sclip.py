"Dense features and open vocabulary: bad input, batches against single windows, many and few classes, a model that is left as it was."
import json
from pathlib import Path
import open_clip, pytest, torch, torch.nn.functional as F
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.clip.open_vocabulary import DensePredictor, as_classes, class_prob, label_map, predict_dense, read_classes
from medseg_nb.clip.sclip import ATTENTION, dense_scores, dense_tokens, placement, window_starts

@pytest.fixture(scope='module')
def enc(): return load_encoder('tiny')

@pytest.fixture(scope='module')
def image(): return torch.rand(3, 150, 230, generator=torch.Generator().manual_seed(0))

@pytest.fixture
def random_clip(tmp_path):
    "A maker of small open_clip models."
    def make(name, **vision):
        text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
        (tmp_path/f'{name}.json').write_text(json.dumps(dict(embed_dim=16, vision_cfg=vision, text_cfg=text)))
        open_clip.add_model_config(tmp_path)
        torch.manual_seed(0)
        return load_encoder(f'open_clip:{name}', pretrained=False)
    return make

def state(model): return {k: v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

def same(a, b): return all(torch.equal(v, b[0][k]) for k,v in a[0].items()) and a[1:] == b[1:]

@pytest.mark.parametrize('mode', ATTENTION)
def test_batched_is_one_by_one_and_deterministic(enc, image, mode):
    t = enc.encode_text(['left lung', 'heart', 'bone']).pooled
    for windows in ('tokens', 'exact', None):
        a, b, c = (dense_scores(enc, image, t, mode, windows, bs=bs) for bs in (7, 7, 1))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert a[0].shape == (3, *image.shape[1:]) and a[0].isfinite().all()
        assert torch.allclose(a[0], c[0], atol=1e-5) and torch.allclose(a[1], c[1], atol=1e-5)
        assert torch.allclose(a[1].norm(dim=0), torch.ones(a[1].shape[1:]), atol=1e-5)
    many = dense_tokens(enc, torch.stack([image[:, :144, :224], image[:, -144:, -224:]]), mode)
    assert torch.allclose(many[1:], dense_tokens(enc, image[None, :, -144:, -224:], mode), atol=1e-5)

@pytest.mark.parametrize('mode', ATTENTION)
def test_timm_and_open_clip_towers_agree(random_clip, mode):
    "One set of weights in open_clip's own tower and in timm's."
    size = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    own = random_clip('own', **size)
    timm = random_clip('by-timm', timm_model_name='test_vit', timm_pool='', timm_proj='linear', image_size=32)
    import timm as lib
    trunk = lib.create_model('vit_base_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, pre_norm=True,
                             norm_layer=lambda d, **kw: torch.nn.LayerNorm(d, eps=1e-5)).eval()
    v = own.model.visual
    new = dict(cls_token=v.class_embedding[None, None], pos_embed=v.positional_embedding[None])
    new['patch_embed.proj.weight'] = v.conv1.weight
    for a,b in (('norm_pre', v.ln_pre), ('norm', v.ln_post)): new |= {f'{a}.{k}': p for k,p in b.state_dict().items()}
    names = dict(norm1='ln_1', norm2='ln_2', **{'attn.proj': 'attn.out_proj', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj'})
    for i,b in enumerate(v.transformer.resblocks):
        s = b.state_dict()
        new |= {f'blocks.{i}.{t}.{k}': s[f'{o}.{k}'] for t,o in names.items() for k in ('weight', 'bias')}
        new |= {f'blocks.{i}.attn.qkv.{k}': s[f'attn.in_proj_{k}'] for k in ('weight', 'bias')}
    trunk.load_state_dict(new)
    timm.model.visual.trunk = trunk
    x = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(1))
    a, b = (dense_tokens(e, x, mode, project=False) for e in (own, timm))
    assert torch.allclose(a, b, atol=1e-4)

@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('mlp', [True, False])
def test_parts_of_the_block(enc, image, residual, mlp):
    x = image[None, :, :144, :224]
    f = dense_tokens(enc, x, 'vanilla', residual, mlp)
    assert torch.allclose(f, dense_tokens(enc, x, 'vanilla'), atol=1e-5) == (residual and mlp)
    assert torch.equal(dense_tokens(enc, x, 'qq'), dense_tokens(enc, x, 'qq', False, False))

def test_half_and_double(enc, image):
    t, want = enc.encode_text(['heart']).pooled, dense_scores(enc, image, enc.encode_text(['heart']).pooled)[0]
    double = load_encoder('tiny').double()
    assert torch.allclose(dense_scores(double, image, t.double())[0], want, atol=1e-4)

def test_the_model_is_left_as_it_was(enc, image):
    before, x = state(enc), image[None, :, :144, :224]
    dense_tokens(enc, x, 'naclip')
    assert same(before, state(enc))
    for bad in (dict(mode='cssa'), dict(std=0)):
        with pytest.raises(ValueError): dense_tokens(enc, x, **bad)
    hook = enc.visual.trunk.blocks[1].register_forward_hook(lambda *a: 1/0)
    try:
        with pytest.raises(ZeroDivisionError): dense_tokens(enc, x)
    finally: hook.remove()
    assert same(before, state(enc))
    enc.train()
    try:
        train = state(enc)
        f = dense_tokens(enc, x)
        hook = enc.visual.trunk.blocks[1].register_forward_hook(lambda *a: 1/0)
        try:
            with pytest.raises(ZeroDivisionError): dense_tokens(enc, x)
        finally: hook.remove()
        assert same(train, state(enc))
    finally: enc.eval()
    assert torch.equal(f, dense_tokens(enc, x)) and same(before, state(enc))

@pytest.mark.parametrize('call, words', [
    (dict(mode='cssa'), "Did you mean 'csa'"), (dict(windows='token'), "Did you mean 'tokens'"), (dict(windows='exact', stride=300), 'at most the window'),
    (dict(stride=100), 'multiple of the patch'), (dict(window=100), 'no multiple'), (dict(short=100), 'less than a window'), (dict(bs=0), 'bs must be'),
    (dict(short=1.5), 'short must be an integer'), (dict(windows=None, window=224), 'whole image at once'), (dict(shrot=300), "Did you mean 'short'"),
    (dict(prob_thresh=.1), 'none of lung, heart is'), (dict(area_thresh=1.), 'area_thresh lies in'), (dict(logit_scale=float('inf')), 'logit_scale'),
    (dict(logit_scale=float('nan')), 'logit_scale'), (dict(modality='chest x-rai'), 'unknown modality'), (dict(templates=[]), 'one {} for the word'),
    (dict(templates=['a {} {}']), 'one {} for the word'), (dict(templates='{}', modality='ct'), 'not both')])
def test_bad_calls(enc, image, call, words):
    with pytest.raises(ValueError) as e: predict_dense(enc, image, ['lung', 'heart'], **call)
    assert words in str(e.value)

@pytest.mark.parametrize('x', [torch.rand(2, 3, 64, 64), torch.rand(2, 64, 64), torch.full((3, 64, 64), torch.nan), torch.rand(3, 64, 64)*255, 'x.png'])
def test_bad_images(enc, x):
    with pytest.raises(ValueError): predict_dense(enc, x, ['lung', 'heart'])

def test_bad_batches(enc):
    for x in (torch.rand(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.rand(1, 3, 33, 32), torch.rand(1, 3, 0, 32), 3):
        with pytest.raises(ValueError): dense_tokens(enc, x)

def test_towers_without_patches(random_clip, image):
    resnet = random_clip('resnet', image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)
    with pytest.raises(ValueError, match='vision transformer, got ModifiedResNet'): dense_scores(resnet, image)
    with pytest.raises(ValueError, match='vision transformer, got ModifiedResNet'): DensePredictor(resnet)
    convnext = random_clip('convnext', timm_model_name='test_convnext', timm_pool='', timm_proj='linear', image_size=64)
    with pytest.raises(ValueError, match='vision transformer, got ConvNeXt'): dense_scores(convnext, image)
    custom = random_clip('custom', image_size=32, patch_size=8, width=32, layers=1, head_width=16, block_type='custom')
    with pytest.raises(ValueError, match='is not the plain one'): dense_scores(custom, image)

@pytest.mark.parametrize('text, words', [
    ('', 'names no class'), ('# a\n  # b\n', 'names no class'), ('a\nb\nA\n', "line 3: 'A' stands already on line 1"), ('a, b, a\n', 'line 1'),
    ('a\n\nb,\n', "line 3: an empty synonym"), (', b\n', 'line 1: an empty synonym'), ('-\n', 'line 1: no name'), ('background: \n', 'line 1: no name'),
    ('background: a\nbackground\n', 'write one of the two')])
def test_bad_class_files(tmp_path, text, words):
    path = tmp_path/'classes.txt'
    path.write_text(text, encoding='utf-8')
    with pytest.raises(ValueError) as e: read_classes(path)
    assert words in str(e.value)

def test_class_files(tmp_path):
    path = tmp_path/'classes.txt'
    many = [f'thing {i}, other name of {i}' for i in range(200)]
    path.write_bytes(('\ufeff' + '\r\n'.join(['background: sky,  wall # two', 'background:tree', *many, '-  sea , Ozean'])).encode())
    c = read_classes(path)
    assert c.names == ['background', *(f'thing {i}' for i in range(200)), 'sea'] and c.background == (0, 201)
    assert c.words[0] == ['sky', 'wall', 'tree'] and c.words[-1] == ['sea', 'Ozean'] and as_classes(c) is c

@pytest.mark.parametrize('bad', [1, None, [1], ['a', None], 'a', Path('a')])
def test_bad_lists(bad):
    with pytest.raises((ValueError, TypeError)): as_classes(bad)

def test_200_classes_and_one(enc, image):
    names = [f'thing {i}' for i in range(200)]
    pred = predict_dense(enc, image, names, templates=['{}'], windows=None)
    assert pred.prob.shape == (200, 150, 230) and torch.allclose(pred.prob.sum(0), torch.ones(150, 230), atol=1e-4)
    assert pred.text.shape == (200, enc.dim) and pred.names == names and pred.background == ()
    labels = label_map(pred)
    assert labels.dtype == torch.long and labels.max() < 200
    one = predict_dense(enc, image, ['lung, lung field'], windows=None)
    assert (one.prob == 1).all() and not label_map(one).any()
    only = predict_dense(enc, image, ['background'], windows=None, prob_thresh=.9, area_thresh=.9)
    assert (only.prob == 1).all()

@pytest.mark.parametrize('thresh', [0., .02, .3, .99])
@pytest.mark.parametrize('background', [(), (0,), (1, 4)])
def test_thresholds_keep_probabilities(thresh, background):
    g = torch.Generator().manual_seed(3)
    scores, owner = 2*torch.rand(9, 12, 15, generator=g) - 1, torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4])
    for scale in (1., 40., 1000.):
        p = class_prob(scores, owner, 5, background, scale, area_thresh=thresh, prob_thresh=thresh if background else 0.)
        assert p.isfinite().all() and torch.allclose(p.sum(0), torch.ones(12, 15), atol=1e-5)

def test_text_cache_follows_the_weights(image):
    enc = load_encoder('tiny')
    predict = DensePredictor(enc, windows=None, templates=['{}'])
    a = predict(image, ['lung', 'heart'])
    assert torch.equal(a.prob, predict(image, ['lung', 'heart']).prob)
    with torch.no_grad(): enc.text.proj[2].weight.mul_(torch.linspace(-1, 1, enc.dim)[:, None])
    b = predict(image, ['lung', 'heart'])
    assert not torch.allclose(a.text, b.text) and torch.allclose(b.text, enc.encode_text(['lung', 'heart']).pooled, atol=1e-5)

@pytest.mark.parametrize('size', [(20, 900), (900, 20), (224, 224), (2, 2), (337, 450)])
def test_any_shape(enc, size):
    x = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    for windows in ('tokens', 'exact', None):
        pred = predict_dense(enc, x, ['lung', 'heart'], windows=windows, templates=['{}'], longest=600)
        assert pred.prob.shape == (2, *size) and torch.allclose(pred.prob.sum(0), torch.ones(size), atol=1e-5)
        assert pred.features.ndim == 3 and pred.features.shape[0] == enc.dim

@pytest.mark.parametrize('n, window, stride', [(10, 4, 3), (10, 10, 5), (11, 4, 4), (7, 3, 1)])
def test_placement_against_interpolate(n, window, stride):
    starts, cells = window_starts(n, window, stride), 2
    assert starts[0] == 0 and starts[-1] == n-window and (starts.diff() <= stride).all()
    maps = torch.rand(len(starts), 1, cells)
    total, count = torch.zeros(n), torch.zeros(n)
    for s,m in zip(starts.tolist(), maps):
        total[s:s+window] += F.interpolate(m[None], window, mode='linear', align_corners=False)[0, 0]; count[s:s+window] += 1
    assert torch.allclose(maps.flatten() @ placement(starts, window, n, cells), total/count, atol=1e-6)
    with pytest.raises(ValueError, match='window'): window_starts(3, 4, 1)
