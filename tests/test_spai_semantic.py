"What the lessons 51 to 51b do not show: odd input, other processes, mixed precision, tampered folders."
import copy, json, subprocess, sys
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from PIL import Image
from medseg_nb.core import seeded
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.spai.caption import from_flags, prompts_for, semantic_loss, synthetic_prompt
from medseg_nb.spai.semantic import APPROACHES, HOW, WHERE, SemanticContext, SemanticFusionModule, compute_local_semantic_context
from medseg_nb.spai.semantic_detector import SemanticDetector, load_any, load_semantic, save_semantic, semantic_detector
from medseg_nb.spai.spectral import SpectralDetector, tiny_config

small = {**tiny_config(), 'patch': 32, 'radius': 3, 'vit': dict(model='vit_base_patch16_224', patch_size=16, embed_dim=32, depth=2, num_heads=2), 'proj_dim': 16}
ways = [dict(approach=a, how=h, where=w) for a in APPROACHES for h in HOW for w in WHERE]
per_way = pytest.mark.parametrize('kw', ways, ids=lambda kw: '-'.join(kw.values()))
captions = ['left lung', 'a histology section', 'retinal vessels']

@pytest.fixture(scope='module')
def enc(): return load_encoder('tiny').freeze()

@pytest.fixture(scope='module')
def images():
    with seeded(0): return [torch.rand(3, *s) for s in ((70, 40), (32, 32), (20, 50))]

def detector(enc, **kw):
    with seeded(1): return SemanticDetector(SpectralDetector(**small), enc, kw, 'tiny').eval()

def shake(model):
    with seeded(2), torch.no_grad():
        for p in model.trainable(): p.add_(.1*torch.randn_like(p))
    return model

@per_way
@torch.no_grad()
def test_batch_is_one_by_one(enc, images, kw):
    model = shake(detector(enc, **kw))
    both = model(images, captions)
    one = torch.cat([model([x], [t]) for x,t in zip(images, captions)])
    torch.testing.assert_close(both, one, atol=1e-4, rtol=1e-4)
    ctx = model.context(images, captions, local=True)
    torch.testing.assert_close(model(images, context=ctx), both)
    order = [2, 0, 1]
    torch.testing.assert_close(model([images[i] for i in order], context=ctx[order]), both[order], atol=1e-4, rtol=1e-4)

@per_way
@torch.no_grad()
def test_start_is_the_spectral_model_in_mixed_precision_too(enc, images, kw):
    model = detector(enc, **kw)
    ctx, fusion = model.context(images, captions, local=True), model.fusion
    with torch.autocast('cpu', torch.bfloat16):
        fused = model(images, context=ctx)
        model.spectral.fusion = None
        assert torch.equal(fused, model.spectral(images))

@per_way
def test_only_the_detector_learns(enc, images, kw):
    model = shake(detector(enc, **kw)).train()
    before = {k: v.clone() for k,v in enc.state_dict().items()}
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    model(images, captions).sum().backward()
    opt.step()
    assert all(p.grad is None for p in [*enc.parameters(), *model.spectral.vit.parameters()])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.fusion.parameters())
    assert all(torch.equal(v, before[k]) for k,v in enc.state_dict().items())

@torch.no_grad()
def test_patches_have_no_order(enc):
    with seeded(3): f, z = SemanticFusionModule(24, 128, approach='local', where='after'), F.normalize(torch.randn(2, 6, 128), dim=-1)
    with seeded(4):
        for p in f.parameters(): p.copy_(torch.randn_like(p))
    ctx, perm = SemanticContext(z[:, 0], z[:, 1], z), torch.tensor([3, 0, 5, 1, 2, 4])
    other = SemanticContext(ctx.image, ctx.text, z[:, perm])
    v = torch.randn(2, 24)
    scale = f.after(v, ctx).abs().max()
    torch.testing.assert_close(f.after(v, ctx)/scale, f.after(v, other)/scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(f.semantic_attention(ctx)[:, perm], f.semantic_attention(other))

def test_rows_of_a_context():
    ctx = SemanticContext(torch.eye(4), local=torch.rand(4, 2, 4), mask=torch.ones(4, 2, dtype=torch.bool))
    for i,n in ((0, 1), (-1, 1), (np.int64(2), 1), (torch.tensor(2), 1), (slice(1, 3), 2), ([0, 3], 2), (torch.tensor([1, 1, 0]), 3), (torch.tensor([True, False, True, False]), 2)):
        o = ctx[i]
        assert (len(o), len(o.local), len(o.mask), o.text) == (n, n, n, None)
    assert ctx.to(torch.float64).image.dtype == torch.float64
    for bad in (dict(local=torch.rand(3, 2, 4)), dict(local=torch.rand(4, 2, 5)), dict(mask=torch.ones(4, 2)), dict(text=torch.rand(4))):
        with pytest.raises(ValueError, match='expected'): SemanticContext(torch.eye(4), **bad)

def test_other_kinds_of_image(enc, images):
    model = detector(enc, approach='local')
    a = (images[0].permute(1, 2, 0).numpy()*255).astype(np.uint8)
    kinds = [a, Image.fromarray(a), torch.from_numpy(a).permute(2, 0, 1), torch.from_numpy(a).permute(2, 0, 1).float()/255]
    with torch.no_grad(): out = model(kinds, ['left lung']*4)
    torch.testing.assert_close(out, out[:1].expand(4), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='image 1'): model([images[0], images[1]*2], captions[:2])
    with pytest.raises(ValueError, match='NaN'): model([images[0]*float('nan')], captions[:1])
    for bad in ([], [torch.rand(2, 32, 32)], [torch.rand(1, 3, 32, 32)]):
        with pytest.raises(ValueError): model(bad, captions[:len(bad)])

def test_patches_that_are_none(enc):
    for bad in ([], torch.rand(2, 3, 32, 32), [torch.rand(2, 3, 32, 32), torch.rand(3, 32, 32)]):
        with pytest.raises(ValueError, match='expected patches'): compute_local_semantic_context(enc, bad)

def test_a_copy_has_its_own_encoder(enc, images):
    model = detector(enc)
    twin = copy.deepcopy(model)
    assert twin.encoder is not enc and twin.encoder.frozen and not twin.encoder.training
    with torch.no_grad(): assert torch.equal(twin(images, captions), model(images, captions))

def test_a_folder_in_another_process(enc, images, tmp_path):
    model = shake(detector(enc, approach='local', how='concat'))
    with torch.no_grad(): want = model(images, captions)
    save_semantic(model, tmp_path/'d', calibration=dict(a=1.5))
    torch.save(images, tmp_path/'x.pt')
    code = ('import sys, torch; from medseg_nb.spai.semantic_detector import load_any; torch.set_num_threads(1); '
            'x = torch.load(sys.argv[2], weights_only=True); m = load_any(sys.argv[1]); '
            f'print(m.info, m(x, {captions!r}).tolist())')
    r = subprocess.run([sys.executable, '-c', code, tmp_path/'d', tmp_path/'x.pt'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    info, _, logits = r.stdout.strip().partition('} ')
    torch.testing.assert_close(torch.tensor(json.loads(logits)), want, atol=1e-5, rtol=1e-5)
    assert '1.5' in info

@pytest.mark.parametrize('change,say', [
    (lambda c: c['args']['fusion'].update(approach='both'), 'global, local'), (lambda c: c['args']['fusion'].update(dim=7), 'a fusion of 7'),
    (lambda c: c['args'].pop('fusion'), 'lacks fusion'), (lambda c: c.pop('fingerprint'), 'lacks fingerprint'), (lambda c: c['args'].update(encoder=None), 'pass encoder='),
    (lambda c: c['args'].update(encoder='tinny'), "Did you mean 'tiny'"), (lambda c: c['args']['fusion'].update(how='film'), 'does not fit SemanticDetector'),
    (lambda c: c['args']['spectral']['vit'].update(pretrained=True), 'sizes only'), (lambda c: c.update(fingerprint='0'), 'another encoder'), (lambda c: c.update(cls='FMISeg'), 'FMISeg'),
    (lambda c: c['args']['fusion'].update(colour='red'), 'colour')])
def test_a_tampered_folder(enc, tmp_path, change, say):
    save_semantic(detector(enc), tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    change(config)
    (tmp_path/'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=say): load_any(tmp_path)

def test_a_config_that_is_no_json(enc, tmp_path):
    save_semantic(detector(enc), tmp_path)
    (tmp_path/'config.json').write_text('{')
    for load in (load_any, load_semantic):
        with pytest.raises(ValueError, match='not JSON'): load(tmp_path)

def test_a_configuration_makes_the_same_sizes(enc):
    for kw in ways:
        model = detector(enc, **kw, hidden=8, vectors=False)
        again = semantic_detector(json.loads(json.dumps(model.config)), enc)
        assert {k: v.shape for k,v in again.state_dict().items()} == {k: v.shape for k,v in model.state_dict().items()}

@pytest.mark.parametrize('texts,say', [(None, 'reads captions'), ('left lung', '1 texts'), (['a', 'b', None], 'text of image 2'), (['a', 'b', ' \n'], 'text of image 2'),
                                       (['a', 'b', 3], 'text of image 2'), (['a']*4, '4 texts'), ([], '0 texts'), (7, 'list of captions')])
def test_captions_that_are_none(enc, images, texts, say):
    with pytest.raises(ValueError, match=say): detector(enc)(images, texts)

def test_captions_of_odd_tables():
    df = pd.DataFrame(dict(report=[np.nan, '  two\n lines ', 5], modality=['CT', None, 'MR'], label=[1, 0, 1]), index=['x', 'y', 'z'])
    assert prompts_for(df) == ['a CT slice', 'two lines', 'an MR image']
    assert prompts_for(df.astype(object)) == prompts_for(df) and prompts_for(df.iloc[:0]) == []
    with pytest.raises(ValueError, match="row y "): prompts_for(df.drop(columns='report'))
    assert prompts_for(pd.DataFrame(dict(text=['left lung'], caption=['a lung'], label=['generated']))) == ['left lung']
    for said in ('generated', 'FAKE', 'not real', 'ai-generated image', 'deepfake'): assert said.lower() not in synthetic_prompt('CT', said).lower()

def test_losses_in_half_and_on_a_batch_of_fakes():
    s = torch.tensor([.1, .9], requires_grad=True)
    semantic_loss(s, torch.ones(2), 'real_hinge').backward()
    assert s.grad.tolist() == [0, 0]
    assert semantic_loss(s.detach().bfloat16(), torch.tensor([0, 1]), 'real_hinge', 1., .3).dtype == torch.bfloat16
    assert semantic_loss(s.detach(), torch.tensor([False, True]), 'real_hinge', 1., .3).item() == pytest.approx(.2)

def test_flags(tmp_path):
    (tmp_path/'p.txt').write_text(' \n\n')
    with pytest.raises(ValueError, match='no caption in it'): from_flags({'DATA.TEXT_PROMPTS': str(tmp_path/'p.txt')})
    assert from_flags({'MODEL.USE_SEMANTIC_CONTEXT': True, 'MODEL.CLIP_PATH': 'biomedclip'})['encoder'] == 'biomedclip'
    assert from_flags(dict(MODEL=dict(USE_SEMANTIC_CONTEXT=True), LOSS=dict(SEMANTIC_WEIGHT=0)))['loss']['weight'] == 0
    for bad in ({'LOSS.SEMANTIC_WEIGHT': True}, {'LOSS.SEMANTIC_WEIGHT': float('nan')}, {'MODEL.SEMANTIC_APPROACH': 3}, {'LOSS': .5}, {'TRAIN.LOSS': 'bce'}):
        with pytest.raises(ValueError, match=next(iter(bad)).split('.')[0]): from_flags(bad)
