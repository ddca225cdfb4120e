"Bad input and round trips of medseg_nb.save"
import json
import nibabel as nib, numpy as np, pytest, tifffile, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from medseg_nb.core import Segmentation
from medseg_nb.io import read_images
from medseg_nb.save import prompt_slugs, save_segmentation, stem_slug
from medseg_nb.show import overlay

rng = np.random.default_rng(0)

@pytest.mark.parametrize('shape', [(5, 6), (5, 6, 1), (5, 6, 4), (5, 6, 4, 1)])
@pytest.mark.parametrize('cls', [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_round_trip(tmp_path, shape, cls):
    aff = nib.affines.from_matvec(nib.eulerangles.euler2mat(.1, .2, .3) @ np.diag([-1.3, 2.1, 3.7]), [-7.7, 3.1, 9.9])
    img = cls(rng.integers(-1000, 1000, shape).astype(np.int16), aff); img.set_qform(aff, 1); img.set_sform(None, 0)
    img.header['descrip'] = b'NAME'
    nib.save(img, tmp_path/'v.nii.gz'); old = nib.load(tmp_path/'v.nii.gz')
    ims = read_images(tmp_path/'v.nii.gz', window=(0, 1000))
    segs = [Segmentation(o.x[:1], ['high']) for o in ims]
    for s,o in zip(segs, ims): s.meta = o.meta
    row, = save_segmentation(segs, tmp_path/'out', overlay=False)
    new, prob = (nib.load(tmp_path/'out'/row[k]) for k in ('mask', 'probability'))
    assert type(new) is cls and (new.affine == old.affine).all() and new.header['descrip'] == b''
    for n in ('qform_code', 'sform_code', 'xyzt_units'): assert new.header[n] == old.header[n]
    v = np.asarray(old.dataobj).reshape(*shape, *[1]*(3-len(shape)))[..., 0 if len(shape) == 4 else slice(None)]
    np.testing.assert_array_equal(np.asarray(new.dataobj), v > 0)
    np.testing.assert_allclose(prob.get_fdata(), np.clip((v+500)/1000, 0, 1), atol=1e-6)
    assert new.get_data_dtype() == np.uint8 and prob.get_data_dtype() == np.float32

@given(st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_slugs(prompts):
    slugs = prompt_slugs(prompts)
    assert len(set(slugs)) == len(prompts) and all(s and set(s) <= set('abcdefghijklmnopqrstuvwxyz0123456789-') and len(s) < 80 for s in slugs)
    stems = [stem_slug(p) for p in prompts]
    assert len(set(stems)) == len(set(prompts)) and all(s[0] != '.' and '/' not in s and len(s) < 100 for s in stems)

def _seg(h=12, w=15, **kw): return Segmentation(torch.rand(2, h, w), ['Left lung', 'left-lung'], image=torch.rand(3, h, w), **kw)

def test_save_in_memory(tmp_path):
    rows = _seg(score=torch.tensor([.25, .5])).save(tmp_path/'a'/'b', stem='x/../y', overlay=lambda x, m: np.zeros((12, 15, 3), np.uint8))
    assert len({r['mask'] for r in rows}) == 2 and [r['score'] for r in rows] == [.25, .5]
    for r in rows:
        for k in ('mask', 'probability', 'overlay'): assert '/' not in r[k] and Image.open(tmp_path/'a'/'b'/r[k]).size == (15, 12)
    assert json.loads(json.dumps(rows)) == rows
    with pytest.raises(ValueError, match='overlay must return'): _seg().save(tmp_path, overlay=lambda x, m: np.zeros((2, 2, 3), np.uint8))

def test_save_default_overlay_and_uncertainty(tmp_path):
    s = _seg(uncertainty=torch.rand(2, 12, 15))
    r = s.save(tmp_path)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path/r['overlay'])), overlay(s.image, s.mask()[0]))
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path/r['uncertainty']))/65535, s.uncertainty[0], atol=1e-5)

def test_save_pages(tmp_path):
    tifffile.imwrite(tmp_path/'v.tif', rng.integers(0, 256, (3, 8, 9)).astype(np.uint8), photometric='minisblack')
    ims = read_images(tmp_path/'v.tif')
    row, = save_segmentation([Segmentation(o.x[:1], ['a'], meta=o.meta) for o in ims], tmp_path/'out', overlay=False)
    assert row['image'] == '../v.tif' and tifffile.imread(tmp_path/'out'/row['mask']).shape == (3, 8, 9)
    back = read_images(tmp_path/'out'/row['probability'])
    for a,b in zip(back, ims): torch.testing.assert_close(a.x, b.x.contiguous(), atol=1e-5, rtol=0)
    row, = save_segmentation(Segmentation(ims[1].x[:1], ['a'], meta=ims[1].meta), tmp_path/'out', overlay=False)
    assert row['mask'] == 'v_001_a_mask.png'

def test_save_refuses(tmp_path):
    bad = Segmentation(torch.full((1, 4, 4), torch.nan), ['a'])
    with pytest.raises(ValueError, match='without NaN'): bad.save(tmp_path, overlay=False)
    with pytest.raises(ValueError, match='same prompts'): save_segmentation([_seg(), bad], tmp_path, overlay=False)
    with pytest.raises(ValueError, match='got str'): save_segmentation(['a'], tmp_path)
