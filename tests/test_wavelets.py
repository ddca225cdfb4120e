"Every discrete wavelet, mode and kind of size against PyWavelets, in double precision."
import numpy as np, pytest, pywt, torch
from hypothesis import given, settings, strategies as st
from medseg_nb.wavelets import (DWT2, IDWT2, MODES, VARIANTS, FrequencySplit, dwt2, filter_bank, gray, idwt2, published_bands,
                                wavedec2, waverec2)

WAVELETS = pywt.wavelist(kind='discrete')
SIZES = [(1, 1), (1, 2), (2, 3), (5, 8), (17, 12)]

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def close(a, b, scale, tol=1e-12): return np.abs(a-b).max() <= tol*max(1, scale)

@pytest.mark.parametrize('mode', MODES)
def test_pywt(mode):
    rng = np.random.default_rng(0)
    for size in SIZES:
        if mode in ('reflect', 'antireflect') and 1 in size: continue
        x = rng.random((1, 2, *size))
        for w in WAVELETS:
            cA, ds = pywt.dwt2(x, w, mode, axes=(-2, -1))
            a, d = dwt2(torch.from_numpy(x), w, mode)
            assert a.shape == cA.shape and d.shape == (1, 2, 3, *cA.shape[-2:]), (w, size)
            scale = max(np.abs(cA).max(), *(np.abs(o).max() for o in ds))
            assert close(a.numpy(), cA, scale) and close(d.numpy(), np.stack(ds, 2), scale), (w, size)
            y = idwt2(a, d, w, mode)
            assert close(y.numpy(), pywt.idwt2((cA, ds), w, mode, axes=(-2, -1)), scale), (w, size)
            if w != 'dmey': assert close(y.numpy()[..., :size[0], :size[1]], x, scale, 1e-10), (w, size)

@pytest.mark.parametrize('mode', ('reflect', 'antireflect'))
def test_one_pixel(mode):
    with pytest.raises(ValueError, match='at least 2 pixels'): dwt2(torch.rand(1, 1, 1, 5), 'db2', mode)
    with pytest.raises(ValueError): pywt.dwt2(np.random.rand(1, 5), 'db2', mode)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([w for w in WAVELETS if w != 'dmey']), st.sampled_from(MODES), st.integers(2, 40), st.integers(2, 40),
       st.integers(1, 3), st.integers(0, 2**31))
def test_inverse_is_identity(wavelet, mode, h, w, level, seed):
    x = torch.rand(1, 2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cA, details = wavedec2(x, wavelet, mode, level)
    y = waverec2(cA, details, wavelet, mode, (h, w))
    scale = max(o.abs().max().item() for o in (cA, *details, x))
    assert (y-x).abs().max() <= 1e-9*max(1, scale)

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(WAVELETS), st.sampled_from(MODES), st.integers(8, 40), st.integers(8, 40), st.integers(1, 2))
def test_split_adds_up(wavelet, mode, h, w, level):
    x = torch.rand(2, 3, h, w)
    lf, hf = FrequencySplit(wavelet, level=level, mode=mode)(x)
    assert lf.shape == hf.shape == x.shape and (lf+hf-x).abs().max() <= 1e-6*max(1, lf.abs().max().item())

@pytest.mark.filterwarnings('ignore:Level value')
@pytest.mark.parametrize('wavelet', ('haar', 'db3', 'bior2.4', 'dmey'))
@pytest.mark.parametrize('mode', ('symmetric', 'periodization'))
def test_wavedec2(wavelet, mode):
    x = np.random.default_rng(1).random((2, 1, 45, 38))
    ref = pywt.wavedec2(x, wavelet, mode, 3, axes=(-2, -1))
    cA, details = DWT2(wavelet, 3, mode)(torch.from_numpy(x))
    assert close(cA.numpy(), ref[0], 10) and all(close(d.numpy(), np.stack(r, 2), 10) for d,r in zip(details, ref[1:]))
    if wavelet != 'dmey': assert np.abs(IDWT2(wavelet, mode)(cA, details, (45, 38)).numpy()-x).max() < 1e-9

def test_published_literal():
    from PIL import Image
    rng = np.random.default_rng(0)
    for size in ((64, 64), (33, 50), (7, 2)):
        u8 = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        grey = np.array(Image.fromarray(u8).convert('L'))
        scale = lambda a: (a-a.min())/(a.max()-a.min())*255
        cA, ds = pywt.dwt2(grey, 'haar')
        x = torch.from_numpy(u8/255).float().permute(2, 0, 1)[None]
        assert (gray(x)[0, 0].numpy() == grey).all()
        lf, hf = published_bands(x)
        assert (lf[0, 0].numpy() == scale(cA).astype(np.uint8)).all()
        assert (hf[0, 0].numpy() == scale(sum(scale(d) for d in ds)).astype(np.uint8)).all()

def test_gray_all_grey_levels():
    x = (torch.arange(256)/255).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert gray(x).flatten().tolist() == list(range(256))

@pytest.mark.parametrize('variant', VARIANTS)
def test_compile_ready(variant):
    "The forward has no data-dependent control flow: it can be exported whole."
    net = FrequencySplit('db2', variant)
    prog = torch.export.export(net, (torch.rand(1, 3, 16, 20),))
    x = torch.rand(1, 3, 16, 20)
    for a,b in zip(prog.module()(x), net(x)): assert torch.allclose(a, b, atol=1e-5)

def test_names():
    for w in WAVELETS: assert filter_bank(w).shape[0] == 4 and filter_bank(w).shape[1] % 2 == 0
