"The embedded detector, and what a training refuses before it begins."
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from skimage import data
from medseg_nb.cli_parts import main
from medseg_nb.core import as_image
from medseg_nb.spai.checkpoint import load_detector, save_detector
from medseg_nb.spai.detect import load_detector_for_use
from medseg_nb.spai.learner import new_detector, train_spai
from medseg_nb.spai.spectral import SpectralDetector, tiny_config
from medseg_nb.spai.views import Views
import medseg_nb.cli

def test_embedded_detector():
    d = load_detector_for_use('tiny', device='cpu')
    assert d.calibrated and 0 < d.threshold < 1 and d.spectral.config == {**d.spectral.config, **tiny_config()}
    x = as_image(data.immunohistochemistry()[::2, ::2]).x
    soft = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x[None], 2), x.shape[1:], mode='bicubic')[0].clamp(0, 1)
    real, fake = d([x, soft])
    assert fake.logit > real.logit and len(real.grid) == 4

def test_tiny_is_no_silent_default(tmp_path, capsys):
    Image.fromarray(data.cell()).save(tmp_path/'cell.png')
    assert main(['detect', tmp_path/'cell.png', '--out', tmp_path/'out', '--device', 'cpu']) == 0
    assert 'brought to 256 pixels' in capsys.readouterr().out and (tmp_path/'out/cell_spectral.png').is_file()

@pytest.mark.parametrize('kw', [dict(n=0), dict(p=1.5)])
def test_views_refuse(kw):
    with pytest.raises(ValueError, match='expected n of at least 1 and p in'): Views(**kw)

@pytest.mark.parametrize('h,w', [(40, 200), (128, 128), (129, 300)])
def test_views_of_any_size(h, w):
    x = torch.rand(3, h, w, generator=torch.Generator().manual_seed(0))
    for scale in (None, (.2, 1.)):
        v = Views(n=2, side=128, scale=scale)(x, 3)
        assert v.shape == (2, 3, 128, 128) and 0 <= v.min() and v.max() <= 1 and v.equal(Views(n=2, side=128, scale=scale)(x, 3))

def test_backbone_from_a_folder(tmp_path):
    old, new = load_detector('tiny'), new_detector('tiny', str(_saved(tmp_path)))
    for a,b in zip(old.vit.state_dict().values(), new.vit.state_dict().values()): assert a.equal(b)
    with pytest.raises(ValueError, match='another than that of'): new_detector('full', str(tmp_path/'own'))

def test_backbone_with_a_vit_of_its_own(tmp_path):
    config = tiny_config()
    config['vit'] = {**config['vit'], 'init_values': 1.}
    save_detector(SpectralDetector(**config), tmp_path/'scaled')
    assert new_detector('tiny', str(tmp_path/'scaled')).config['vit']['init_values'] == 1.

def _saved(tmp_path):
    save_detector(load_detector('tiny'), tmp_path/'own')
    return tmp_path/'own'

def test_a_pair_in_one_split_only(tmp_path):
    rows = [dict(image=f'{k}.png', label=k, generator=('real', 'x')[k], source='s', pair='p', group='g', split=('train', 'val')[k], text='') for k in (0, 1)]
    for r in rows: Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path/r['image'])
    pd.DataFrame(rows).to_csv(tmp_path/'pairs.csv', index=False)
    with pytest.raises(ValueError, match="in more than one split: 'g' in train and val"): train_spai(tmp_path/'pairs.csv', tmp_path/'out')
    assert not (tmp_path/'out').exists()
