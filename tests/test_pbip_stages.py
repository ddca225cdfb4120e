"The stages of PBIP from files: what they refuse, and what they leave when a slide fails."
import json
from pathlib import Path
import numpy as np, pytest
pytest.importorskip('openslide')
from medseg_nb.cli_parts import main
import medseg_nb.cli
from medseg_nb.wsi.files import write_pyramid

YAML = """
class_order: [benign, tumor]
split_csv: split.csv
labels_csv: labels.csv
wsi_dir: slides
mask_dir: masks
save_dir: work
patch_size: 64
mpp: 0.5
tissue: null
k_list: 1
samples_per_wsi: 9
model: {backbone: tiny}
training: {epochs: 1, batch_size: 4, tiles_per_slide: 4, validation_tiles: 4, scheduler: {warmup_epochs: 0}, loss_weights: {contrastive: 0}}
"""

@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        rng = np.random.default_rng(i)
        write_pyramid(f'slides/s{i}.tif', (rng.integers(130, 255, (200, 200, 3)) if i % 2 else rng.integers(60, 230, (25, 25, 3)).repeat(8, 0).repeat(8, 1)).astype(np.uint8), mpp=.5)
        write_pyramid(f'masks/s{i}.tif', np.full((200, 200), i % 2, np.uint8), mpp=.5)
    Path('split.csv').write_text('train,val,test\ns0,s2,s4\ns1,s3,s5\n')
    Path('labels.csv').write_text('image_name,label\n' + ''.join(f's{i},{i % 2}\n' for i in range(6)))
    Path('pbip.yaml').write_text(YAML)
    return tmp_path

def call(capsys, *args):
    code = main(args)
    return code, capsys.readouterr().err

def test_all_stages_and_a_bad_slide(project, capsys):
    for verb in ('coords', 'features', 'prototypes', 'train', 'validate'): assert call(capsys, 'pbip', verb, '--config', 'pbip.yaml')[0] == 0, verb
    for f in ('prototype_coordinates/tumor.npy', 'image_features/medclip_exemplars.json', 'image_features/label_fea_pro.safetensors', 'image_features/contact_sheet.png',
              'checkpoints/best/config.json', 'history.csv', 'results/metrics.json', 'results/confusion_matrix.csv'): assert Path('work', f).is_file(), f
    a = np.load('work/prototype_coordinates/tumor.npy', allow_pickle=False)
    assert {'x', 'y', 'tile_level', 'tile_size_resized', 'tile_size', 'tile_size_lv0', 'resize_factor', 'wsi_name'} <= set(a.dtype.names) and not a.dtype.hasobject
    said = json.loads(Path('work/image_features/label_fea_pro.json').read_text())
    assert (said['k_list'], said['class_order'], said['cumsum_k']) == ([1, 1], ['benign', 'tumor'], [0, 1, 2])
    Path('cut.svs').write_bytes(Path('slides/s4.tif').read_bytes()[:2000])
    code, err = call(capsys, 'pbip', 'infer', '--config', 'pbip.yaml', 'slides/s4.tif', 'cut.svs', 'slides/s5.tif')
    rows = json.loads(Path('work/report.json').read_text())['results']
    assert code == 1 and ['error' in r for r in rows] == [False, True, False] and 'cut.svs' in rows[1]['error']
    for r in rows[::2]: assert Path('work', r['labels']).is_file()

@pytest.mark.parametrize('says,change', [
    ("unknown key 'patchsize'. Did you mean 'patch_size'", ('patch_size', 'patchsize')),
    ("class 'necrosis' has no slide", ('[benign, tumor]', '[benign, tumor, necrosis]')),
    ("neither a class nor its number", ('[benign, tumor]', '[benign]')),
    ('no split file', ('split.csv', 'none.csv')), ('no folder', ('wsi_dir: slides', 'wsi_dir: nowhere')),
    ('is not readable YAML', ('class_order: [', 'class_order: [[')), ('finer', ('mpp: 0.5', 'mpp: 0.1'))])
def test_refused(project, capsys, says, change):
    assert change[0] in YAML
    Path('pbip.yaml').write_text(YAML.replace(*change))
    code, err = call(capsys, 'pbip', 'coords', '--config', 'pbip.yaml')
    assert code == 2 and says in err and err.count('\n') == 1 and not Path('work').exists()

def test_bad_coordinates(project, capsys):
    Path('coords').mkdir()
    for i in range(6): np.save(f'coords/s{i}.npy', np.array([[0, 0], [64, 64]]))
    Path('pbip.yaml').write_text(YAML + 'coordinates_dir: coords\n')
    assert call(capsys, 'pbip', 'coords', '--config', 'pbip.yaml')[0] == 0
    np.save('coords/s1.npy', np.array([[0, 0], [5000, 0]]))
    code, err = call(capsys, 'pbip', 'coords', '--config', 'pbip.yaml')
    assert code == 2 and 'outside' in err and 's1' in err
    np.save('coords/s1.npy', np.array([[0, print]], dtype=object), allow_pickle=True)
    code, err = call(capsys, 'pbip', 'coords', '--config', 'pbip.yaml')
    assert code == 2 and 's1' in err
    Path('coords/s1.npy').write_bytes(b'')
    code, err = call(capsys, 'pbip', 'coords', '--config', 'pbip.yaml')
    assert code == 2 and 'empty' in err

def test_stages_out_of_order(project, capsys):
    for verb,says in (('features', "no file"), ('prototypes', 'no features'), ('train', 'no prototypes'), ('validate', 'config.json')):
        code, err = call(capsys, 'pbip', verb, '--config', 'pbip.yaml')
        assert code == 2 and says in err, (verb, err)
