"What lesson 50c does not show: detectors and generators of later lessons, odd images, other number formats."
import pytest, torch
from hypothesis import given, settings, strategies as st
from medseg_nb.core import seeded
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.spai.semantic_detector import SemanticDetector
from medseg_nb.spai.spectral import FrozenViT, SpectralDetector, tiny_config
from medseg_nb.spai.whiten import _ranks, patch_statistics, whiten_vit, whitening

torch.set_num_threads(1)
vit = dict(model='vit_base_patch16_224', patch_size=16, embed_dim=32, depth=2, num_heads=2)
small = {**tiny_config(), 'patch': 32, 'radius': 3, 'vit': vit, 'proj_dim': 16}

@pytest.fixture(scope='module')
def images():
    with seeded(0): return [torch.rand(3, *s) for s in ((70, 40), (32, 32), (200, 90))]

def test_semantic_detector(images):
    with seeded(1): spectral = SpectralDetector(**small)
    model = SemanticDetector(spectral, load_encoder('tiny'), {}, 'tiny')
    held, head = {n: p.clone() for n,p in model.encoder.named_parameters()}, [p.clone() for p in model.trainable()]
    assert whiten_vit(model, images) is model
    t = torch.cat([spectral.vit.vit.patch_embed((x[None, :, :32, :32]-spectral.vit.mean)/spectral.vit.std) for x in images])
    assert .5 < t.std() < 2
    assert all(torch.equal(p, held[n]) for n,p in model.encoder.named_parameters()) and all(map(torch.equal, head, model.trainable()))
    assert not any(p.requires_grad for p in spectral.vit.parameters()) and not spectral.vit.training

def test_published_is_refused_through_the_semantic_detector(images):
    model = SemanticDetector(SpectralDetector(**small, published=True), load_encoder('tiny'), {}, 'tiny')
    with pytest.raises(ValueError, match='published=True'): whiten_vit(model, images)

def test_a_refusal_changes_nothing(images):
    vit = FrozenViT(**small['vit'], img_size=32)
    before = {n: p.clone() for n,p in vit.named_parameters()}
    for kw in (dict(images=images[1:2]), dict(images=[images[0]*torch.nan]), dict(images=images, eps=-1), dict(images=images, pick='low')):
        with pytest.raises(ValueError): whiten_vit(vit, **kw)
    assert all(torch.equal(p, before[n]) for n,p in vit.named_parameters())

def test_bytes_and_grey_images(images):
    vit = FrozenViT(**small['vit'], img_size=32)
    arrays = [(x*255).round().byte().permute(1, 2, 0).numpy() for x in images]
    rounded = [(x*255).round()/255 for x in images]
    for a,b in zip(patch_statistics(arrays, vit), patch_statistics(rounded, vit)): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    mean, cov = patch_statistics([a[..., 0] for a in arrays], vit)
    with pytest.raises(ValueError, match='directions only'): whitening(mean, cov, 257)

def test_bfloat16(images):
    vit = FrozenViT(**small['vit'], img_size=32).bfloat16()
    assert whiten_vit(vit, images).vit.patch_embed.proj.weight.dtype == torch.bfloat16
    assert vit(torch.stack([x[:, :32, :32] for x in images])).isfinite().all()

@settings(deadline=None)
@given(st.integers(1, 3000), st.data())
def test_ranks_are_distinct_and_span_all(r, draw):
    k = draw.draw(st.integers(1, r))
    i = _ranks(r, k, 'spread').tolist()
    assert i == sorted(set(i)) and len(i) == k and i[0] == 0 and (k == 1 or i[-1] == r-1)
    assert _ranks(r, k, 'top').tolist() == list(range(k))

@settings(deadline=None, max_examples=20)
@given(st.integers(2, 24), st.integers(0, 9), st.floats(1e-6, 1))
def test_whitened_variance(n, seed, eps):
    x = torch.randn(4*n, n, generator=torch.Generator().manual_seed(seed)).double()
    W, b, w = whitening(x.mean(0), torch.cov(x.T), n, eps)
    y = x@W.T + b
    torch.testing.assert_close(torch.cov(y.T), torch.diag(w/(w+eps)), atol=1e-8, rtol=0)
    torch.testing.assert_close(y.mean(0), torch.zeros(n).double(), atol=1e-8, rtol=0)
