"Bad input and round trips of medseg_nb.io"
import warnings
import nibabel as nib, numpy as np, pydicom, pytest, tifffile, torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_windowing
from medseg_nb.io import _upright, find_images, read_image, read_images, to_picture, to_voxels

DICOM_DIR = Path(get_testdata_file('CT_small.dcm')).parent
rng = np.random.default_rng(0)

def one_line(e): return '\n' not in str(e.value) and str(e.value)

@pytest.mark.parametrize('mode,dtype,peak', [('L', np.uint8, 255), ('I;16', np.uint16, 65535), ('RGB', np.uint8, 255)])
def test_png(tmp_path, mode, dtype, peak):
    a = rng.integers(0, peak+1, (7, 9) + ((3,) if mode == 'RGB' else ())).astype(dtype)
    Image.fromarray(a).save(tmp_path/'a.png')
    x = read_image(tmp_path/'a.png').x.numpy()
    np.testing.assert_allclose(x.transpose(1, 2, 0) if a.ndim == 3 else x[0], a/peak, atol=1e-6)

@pytest.mark.parametrize('mode', ['1', 'P', 'LA', 'RGBA', 'PA'])
def test_modes(tmp_path, mode):
    rgb = Image.fromarray(rng.integers(0, 256, (7, 9, 3)).astype(np.uint8))
    im = rgb.convert('P').convert(mode) if mode == 'PA' else rgb.convert(mode)
    if mode == 'PA': im = rgb.convert('P'); im.info['transparency'] = 0
    im.save(tmp_path/'a.png')
    want = im.convert('L' if mode in ('1', 'LA') else 'RGB')
    want = np.asarray(want if mode not in ('P', 'PA') else im.convert('RGBA').convert('RGB'))/255
    x = read_image(tmp_path/'a.png').x.numpy()
    np.testing.assert_allclose(x.transpose(1, 2, 0) if want.ndim == 3 else x[0], want, atol=1e-6)

def test_cmyk_jpeg(tmp_path):
    Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(tmp_path/'a.jpg')
    r,g,b = read_image(tmp_path/'a.jpg').x[:, 4, 4]
    assert r > .9 and g < .1 and b < .1

@pytest.mark.parametrize('o', range(1, 9))
def test_orientation(tmp_path, o):
    a = rng.integers(0, 256, (6, 10)).astype(np.uint8)
    im = Image.fromarray(a); exif = im.getexif(); exif[274] = o
    im.save(tmp_path/'a.png', exif=exif)
    tifffile.imwrite(tmp_path/'a.tif', a, extratags=[(274, 3, 1, o, True)])
    want = _upright(a[None], o)[0]/255
    for f in ('a.png', 'a.tif'): np.testing.assert_allclose(read_image(tmp_path/f).x[0], want, atol=1e-6)

@pytest.mark.parametrize('kw', [dict(), dict(compression='zlib'), dict(photometric='miniswhite')])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32, np.int16])
def test_tiff(tmp_path, dtype, kw):
    if kw.get('photometric') and not np.issubdtype(dtype, np.unsignedinteger): pytest.skip()
    a = (rng.random((3, 8, 9))*200 - (50 if dtype in (np.float32, np.int16) else 0)).astype(dtype)
    tifffile.imwrite(tmp_path/'a.tif', a, **(dict(photometric='minisblack') | kw))
    x = torch.stack([o.x[0] for o in read_images(tmp_path/'a.tif')]).numpy()
    f = a.astype(float)
    want = f/np.iinfo(dtype).max if np.issubdtype(dtype, np.unsignedinteger) else (f-f.min())/(f.max()-f.min())
    np.testing.assert_allclose(x, 1-want if 'photometric' in kw else want, atol=1e-5)

def test_tiff_colour_and_floats(tmp_path):
    a = rng.integers(0, 65536, (8, 9, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path/'a.tif', a, photometric='rgb'); tifffile.imwrite(tmp_path/'p.tif', a.transpose(2, 0, 1), photometric='rgb', planarconfig='separate')
    for f in ('a.tif', 'p.tif'): np.testing.assert_allclose(read_image(tmp_path/f).x.permute(1, 2, 0), a/65535, atol=1e-6)
    f = (rng.random((8, 9))*.3).astype(np.float32); tifffile.imwrite(tmp_path/'f.tif', f)
    np.testing.assert_array_equal(read_image(tmp_path/'f.tif').x[0], f)
    tifffile.imwrite(tmp_path/'n.tif', np.full((8, 9), np.nan, np.float32))
    with pytest.raises(ValueError, match='72 of 72 values are NaN'): read_image(tmp_path/'n.tif')
    tifffile.imwrite(tmp_path/'4d.tif', np.zeros((2, 3, 8, 9), np.uint8), photometric='minisblack')
    with pytest.raises(ValueError, match='only one axis'): read_image(tmp_path/'4d.tif')

@pytest.mark.parametrize('comp', ['tiff_lzw', 'jpeg', 'packbits', 'tiff_deflate'])
def test_tiff_compressions(tmp_path, comp):
    a = np.kron(rng.integers(0, 256, (2, 2, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    Image.fromarray(a).save(tmp_path/'a.tif', compression=comp)
    np.testing.assert_allclose(read_image(tmp_path/'a.tif').x.permute(1, 2, 0), a/255, atol=.2 if comp == 'jpeg' else 1e-6)

def test_tiff_palette_lzw16(tmp_path):
    im = Image.fromarray(rng.integers(0, 256, (8, 9, 3)).astype(np.uint8)).convert('P'); im.save(tmp_path/'p.tif')
    np.testing.assert_allclose(read_image(tmp_path/'p.tif').x.permute(1, 2, 0), np.asarray(im.convert('RGB'))/255, atol=.005)
    a = rng.integers(0, 65536, (8, 9)).astype(np.uint16); Image.fromarray(a).save(tmp_path/'w.tif', compression='tiff_lzw')
    np.testing.assert_allclose(read_image(tmp_path/'w.tif').x[0], a/65535, atol=1e-6)

def test_every_example_dicom_reads_or_says_why():
    done = 0
    for f in sorted(DICOM_DIR.glob('*.dcm')):
        with warnings.catch_warnings():
            warnings.simplefilter('error' if f.name != 'badVR.dcm' else 'ignore')
            try: ims = read_images(f)
            except ValueError as e: assert '\n' not in str(e) and f.name in str(e)
            else:
                done += 1
                for im in ims: assert im.x.shape == (3, *im.size) and 0 <= im.x.min() and im.x.max() <= 1 and torch.isfinite(im.x).all()
    assert done > 40

def _save_dicom(tmp_path, **tags):
    ds = pydicom.dcmread(get_testdata_file('CT_small.dcm'))
    for k,v in tags.items(): setattr(ds, k, v)
    ds.save_as(tmp_path/'a.dcm'); return tmp_path/'a.dcm', ds

@pytest.mark.parametrize('fn', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
def test_dicom_window_of_the_file(tmp_path, fn):
    p, ds = _save_dicom(tmp_path, WindowCenter=[40, 50], WindowWidth=[400, 350], VOILUTFunction=fn)
    hu = ds.pixel_array.astype(float)*ds.RescaleSlope + ds.RescaleIntercept
    lo, hi = -2.**15 - 1024, 2.**15 - 1 - 1024
    im = read_image(p)
    assert im.meta.window == (40., 400.)
    np.testing.assert_allclose(im.x[0], (apply_windowing(ds.pixel_array.astype(np.int16)-1024, ds) - lo)/(hi-lo), atol=2e-5)

def test_dicom_monochrome1_and_series(tmp_path):
    p, ds = _save_dicom(tmp_path, WindowCenter=40, WindowWidth=400)
    x = read_image(p).x
    p, ds = _save_dicom(tmp_path, WindowCenter=40, WindowWidth=400, PhotometricInterpretation='MONOCHROME1')
    torch.testing.assert_close(read_image(p).x, 1-x)
    p.rename(tmp_path/'IM0001')
    assert find_images(tmp_path) == [tmp_path/'IM0001'] and read_image(tmp_path/'IM0001').meta.modality == 'CT'

def test_dicom_frames_and_colour():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ims = read_images(get_testdata_file('examples_ybr_color.dcm', download=False))
    assert len(ims) == 30 and ims[3].meta.index == 3
    with pytest.raises(ValueError, match='grey values'): read_image(get_testdata_file('ExplVR_BigEnd.dcm'), window=(1, 2))

def _nifti(path, a, **kw): nib.save(nib.Nifti1Image(a, np.diag([2., 3, 4, 1]) if 'affine' not in kw else kw['affine']), path); return path

@pytest.mark.parametrize('name,make,says', [
    ('missing.png', None, 'no file'),
    ('empty.dcm', lambda p: p.touch(), '0 bytes'),
    ('folder.png', lambda p: p.mkdir(), 'is a folder'),
    ('text.png', lambda p: p.write_text('hello'), 'cannot identify'),
    ('text.tif', lambda p: p.write_text('hello'), 'not a TIFF'),
    ('text.dcm', lambda p: p.write_text('hello'), 'DICOM'),
    ('text.nii', lambda p: p.write_text('hello'), 'NIfTI'),
    ('text.nii.gz', lambda p: p.write_text('hello'), 'NIfTI'),
    ('a.xyz', lambda p: p.write_text('hello'), "'.xyz'. Supported: .png"),
    ('noext', lambda p: p.write_text('hello'), "Supported: .png"),
    ('dot.png', lambda p: Image.new('L', (1, 1)).save(p), '1x1 pixels'),
    ('line.png', lambda p: Image.new('L', (9, 1)).save(p), '1x9 pixels'),
    ('nan.nii', lambda p: _nifti(p, np.full((4, 4, 4), np.nan, np.float32)), '64 of 64'),
    ('inf.nii', lambda p: _nifti(p, np.full((4, 4, 4), np.inf, np.float32)), '64 of 64'),
    ('4d.nii', lambda p: _nifti(p, np.zeros((4, 4, 4, 2), np.float32)), 'frame=0 to 1'),
    ('5d.nii', lambda p: _nifti(p, np.zeros((4, 4, 4, 1, 1), np.float32)), '5-D'),
    ('c.nii', lambda p: _nifti(p, np.zeros((4, 4, 4), np.complex64)), 'real numbers'),
    ('thin.nii', lambda p: _nifti(p, np.zeros((1, 4, 4), np.float32)), '4x1 pixels')])
def test_bad_files(tmp_path, name, make, says):
    if make: make(tmp_path/name)
    for read in (read_image, read_images):
        with pytest.raises((ValueError, FileNotFoundError), match='.*') as e: read(tmp_path/name)
        assert says in one_line(e) and name in str(e.value)

@pytest.mark.parametrize('cut', [4, 100, 200, .5, .9])
@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.tif', 'a.dcm', 'a.nii', 'a.nii.gz'])
def test_truncated(tmp_path, name, cut):
    a = rng.integers(0, 256, (64, 80)).astype(np.uint8)
    if name.endswith('dcm'): raw = Path(get_testdata_file('CT_small.dcm')).read_bytes()
    else:
        if 'nii' in name: _nifti(tmp_path/name, rng.random((9, 8, 7)))
        elif name == 'a.tif': tifffile.imwrite(tmp_path/name, a)
        else: Image.fromarray(a).save(tmp_path/name)
        raw = (tmp_path/name).read_bytes()
    (tmp_path/name).write_bytes(raw[:cut if cut > 1 else int(len(raw)*cut)])
    with pytest.raises(ValueError) as e: read_image(tmp_path/name)
    assert one_line(e)

def test_not_a_path():
    with pytest.raises(ValueError, match='got ndarray'): read_image(np.zeros((3, 3)))

def test_nifti_units_and_frame(tmp_path):
    img = nib.Nifti1Image(np.arange(2*3*4*5).reshape(2, 3, 4, 5).astype(np.int16), np.diag([.002, .003, .004, 1])); img.header.set_xyzt_units('meter')
    nib.save(img, tmp_path/'v.nii')
    ims = read_images(tmp_path/'v.nii', frame=2, window=(60, 120))
    np.testing.assert_allclose(ims[0].meta.spacing, (3, 2), atol=1e-5)
    np.testing.assert_allclose(to_voxels(ims[1].x[0].numpy(), ims[1].meta.affine), img.get_fdata()[:, :, 1, 2]/120, atol=1e-6)
    with pytest.raises(ValueError, match='0 to 4 exist'): read_images(tmp_path/'v.nii', frame=5)

def test_constant_volume(tmp_path):
    _nifti(tmp_path/'c.nii', np.full((4, 5, 6), 200, np.uint8))
    assert all(o.x.max() == 0 for o in read_images(tmp_path/'c.nii'))

@given(st.integers(0, 10**6), st.tuples(*[st.integers(1, 5)]*3))
@settings(max_examples=60, deadline=None)
def test_picture_is_invertible(seed, shape):
    r = np.random.default_rng(seed)
    aff, v = np.eye(4), r.random(shape); aff[:3] = r.normal(size=(3, 4))
    np.testing.assert_array_equal(to_voxels(to_picture(v, aff), aff), v)

def test_find_images(tmp_path):
    (tmp_path/'d').mkdir(); (tmp_path/'d'/'b.PNG').touch(); (tmp_path/'a.nii.gz').touch(); (tmp_path/'.h.png').touch(); (tmp_path/'x.txt').touch()
    assert [p.name for p in find_images(tmp_path)] == ['a.nii.gz', 'b.PNG']
    assert find_images([tmp_path/'x.txt', tmp_path/'x.txt']) == [tmp_path/'x.txt']
    with pytest.raises(ValueError, match='empty list'): find_images([])
