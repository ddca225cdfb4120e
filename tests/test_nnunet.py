"Datasets for nnU-Net that are whole or not there, overlapping targets, and the whole way on a CPU where nnunetv2 is installed."
import importlib.util, json, os, signal, subprocess, sys, time
from pathlib import Path
import nibabel as nib, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from medseg_nb.data import read_index
from medseg_nb.io import read_image, read_images
from medseg_nb.phantoms import make_phantom_pack
from medseg_nb.training import nnunet, nnunet_run
from medseg_nb.training.nnunet import grouped_folds, write_dataset

os.environ.setdefault('OMP_NUM_THREADS', '1') # For nnU-Net's own processes: small images on several threads are many times slower
needs = pytest.mark.skipif(importlib.util.find_spec('nnunetv2') is None, reason='nnunetv2 is not installed: pip install "medseg_nb[nnunet]"')

@pytest.fixture(scope='module')
def lesions(tmp_path_factory): return read_index(make_phantom_pack(tmp_path_factory.mktemp('pack'), n=20, kinds=['lesion'], size=64))

def files(folder): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*') if p.is_file())

def test_an_error_half_way_leaves_nothing(lesions, tmp_path, monkeypatch):
    write, done = nnunet._write_case, []
    def breaks(*args):
        if len(done) == 3: raise OSError('no space left on device')
        done.append(write(*args))
    monkeypatch.setattr(nnunet, '_write_case', breaks)
    with pytest.raises(OSError, match='no space'): write_dataset(lesions, tmp_path, 1, 'Lesions')
    assert len(done) == 3 and files(tmp_path) == [] and list((tmp_path/'nnUNet_raw').iterdir()) == []
    monkeypatch.undo()
    assert write_dataset(lesions, tmp_path, 1, 'Lesions').name == 'Dataset001_Lesions'

def test_overlapping_targets_come_back_from_their_regions(tmp_path):
    rng, rows, prompts = np.random.default_rng(0), [], ['a', 'b', 'c', 'd']
    for i in range(6):
        masks = rng.uniform(size=(4, 8, 9)) < [[[.6]], [[.3]], [[.2]], [[.5]]]
        if i == 2: masks[1] = False
        Image.fromarray(rng.integers(0, 255, (8, 9, 3), np.uint8)).save(tmp_path/f'{i}.png')
        for p,m in zip(prompts, masks):
            Image.fromarray(m.astype(np.uint8)*255).save(tmp_path/f'{i}_{p}.png')
            rows.append(dict(image=f'{i}.png', mask=f'{i}_{p}.png', text=p, split='test' if i == 5 else 'train', group=i))
    pd.DataFrame(rows).to_csv(tmp_path/'index.csv', index=False)
    df = read_index(tmp_path/'index.csv')
    folder = write_dataset(df, tmp_path/'runs', 1, 'Regions', regions=True)
    info = json.loads((folder/'dataset.json').read_text())
    used = sorted({o for v in info['labels'].values() for o in (v if isinstance(v, list) else [v])})
    assert used == list(range(len(used))) and len(info['regions_class_order']) == 4 and info['numTraining'] == 5
    for c in pd.read_csv(folder/'cases.csv').itertuples():
        y = np.array(Image.open(folder/('labelsTs' if c.split == 'test' else 'labelsTr')/f'{c.case}.png'))
        for p in prompts:
            mask, = df[(df['image'] == c.image) & (df['text'] == p)]['mask']
            assert np.array_equal(np.isin(y, info['labels'][p]), np.array(Image.open(mask)) > 0)

def test_names_that_repeat_stay_apart(tmp_path):
    rows = []
    for d in 'ab':
        (tmp_path/d).mkdir()
        Image.fromarray(np.full((6, 6), 50 if d == 'a' else 200, np.uint8)).save(tmp_path/d/'scan.1.png')
        Image.fromarray(np.eye(6, dtype=np.uint8)*255).save(tmp_path/d/'mask.png')
        rows.append(dict(image=f'{d}/scan.1.png', mask=f'{d}/mask.png', text='x', group=d))
    pd.DataFrame(rows).to_csv(tmp_path/'index.csv', index=False)
    folder = write_dataset(read_index(tmp_path/'index.csv'), tmp_path/'runs', 1, 'Same')
    assert [np.array(Image.open(p)).mean() for p in sorted((folder/'imagesTr').iterdir())] == [50, 200]
    assert len(json.loads((folder/'splits_final.json').read_text())) == 2

@pytest.mark.parametrize('groups, folds', [(2, 5), (7, 3), (20, 5)])
def test_no_group_is_on_both_sides(groups, folds):
    rng = np.random.default_rng(groups)
    cases = [dict(case=str(i), group=f'g{g}', split='') for i,g in enumerate([*range(groups), *rng.integers(groups, size=30)])]
    of = {c['case']: c['group'] for c in cases}
    splits = grouped_folds(cases, folds)
    assert len(splits) == min(groups, folds) and sorted(c for s in splits for c in s['val']) == sorted(of)
    for s in splits: assert s['train'] and s['val'] and not {of[c] for c in s['train']} & {of[c] for c in s['val']}

def test_the_package_imports_without_nnunetv2():
    code = "import sys; sys.modules['nnunetv2'] = None\nfrom medseg_nb.training.nnunet_run import _call\nfrom pathlib import Path\n_call('.', 'plan', Path('log'), False, 1, {})"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr.strip().splitlines()[-1] == 'ImportError: this needs the package \'nnunetv2\': pip install "medseg_nb[nnunet]"'

SMALL = dict(epochs=2, iterations=20, val_iterations=2, device='cpu', processes=1, validate=False, seed=0)

def overlap(a, b): return (2*(a & b).sum()/(a.sum() + b.sum())).item()

@needs
@pytest.mark.slow
def test_the_whole_way_with_pictures_and_targets_that_overlap(tmp_path):
    df = read_index(make_phantom_pack(tmp_path/'pack', n=20, kinds=['chest'], size=64))
    before = {k: v for k,v in os.environ.items() if k.startswith('nnUNet')}
    write_dataset(df, tmp_path, 1, 'Chests', regions=True)
    few = {'2d': {'batch_size': 4, 'architecture': {'arch_kwargs': {'features_per_stage': [16, 32, 64, 64, 64]}}}}
    planned = nnunet_run.plan(tmp_path, 1, verify=False, processes=1, changes=few)
    assert planned['configurations']['2d']['patch_size'] == [64, 64]
    run = nnunet_run.train(tmp_path, 1, **SMALL | dict(iterations=60))
    assert run.name == 'nnUNetTrainerNoMirroring__nnUNetPlans__2d' and len(nnunet_run.history(run)) == 2
    with pytest.raises(FileExistsError, match='resume=True'): nnunet_run.train(tmp_path, 1, **SMALL)
    segment = nnunet_run.load_nnunet(nnunet_run.save_nnunet(run, tmp_path/'model'), device='cpu')
    assert sorted(segment.prompts) == ['both lungs', 'left lung', 'right lung']
    test = df[df['split'] == 'test']
    rows = nnunet_run.predict(segment, list(test['image'].unique()), tmp_path/'out', prompts=['left lung', 'right lung', 'both lungs'])
    found = [read_image(tmp_path/'out'/r['mask']).x[0] > .5 for r in rows]
    scores = [overlap(f, read_image(m).x[0] > .5) for f,m in zip(found, test['mask'])]
    assert [r['prompt'] for r in rows] == list(test['text']) and {tuple(f.shape) for f in found} == {(64, 64)} and np.mean(scores) > .8, scores
    with pytest.raises(ValueError, match='Options: both lungs'): segment(read_image(test['image'].iloc[0]), 'liver')
    assert {k: v for k,v in os.environ.items() if k.startswith('nnUNet')} == before

@needs
@pytest.mark.slow
def test_the_whole_way_with_volumes(tmp_path):
    rng, rows, shape = np.random.default_rng(0), [], (20, 24, 16)
    affine = nib.affines.from_matvec(np.array([[0, 0, -2.], [1.2, .1, 0], [.1, -1.2, 0]]), [5, 6, 7])
    for i in range(5):
        at = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1)
        inside = np.linalg.norm(at - [8 + i, 14, 7], axis=-1) < 5
        nib.save(nib.Nifti1Image((400*inside + rng.normal(0, 50, shape)).astype(np.int16), affine), tmp_path/f'{i}.nii.gz')
        nib.save(nib.Nifti1Image(inside.astype(np.uint8), affine), tmp_path/f'{i}_ball.nii.gz')
        rows.append(dict(image=f'{i}.nii.gz', mask=f'{i}_ball.nii.gz', text='ball', split=['test', 'val', 'train'][min(i, 2)], group=i, modality='CT'))
    pd.DataFrame(rows).to_csv(tmp_path/'index.csv', index=False)
    df = read_index(tmp_path/'index.csv')
    write_dataset(df, tmp_path, 1, 'Balls')
    few = {'3d_fullres': {'architecture': {'arch_kwargs': {'features_per_stage': [8, 16, 32]}}}}
    nnunet_run.plan(tmp_path, 1, ['3d_fullres'], verify=False, processes=1, changes=few)
    run = nnunet_run.train(tmp_path, 1, '3d_fullres', **SMALL | dict(iterations=60))
    row, = nnunet_run.predict(run, df['image'][0], tmp_path/'out', device='cpu')
    found, drawn = nib.load(tmp_path/'out'/row['mask']), nib.load(df['mask'][0])
    assert np.array_equal(found.affine, drawn.affine) and found.shape == shape
    assert overlap(*(np.asarray(o.dataobj) > 0 for o in (found, drawn))) > .8
    segs = nnunet_run.load_nnunet(run, device='cpu')(read_images(df['image'][0]), 'ball')
    assert len(segs) == 16 and all(np.array_equal(s.meta.affine, drawn.affine) for s in segs)
    with pytest.raises(ValueError, match='reads NIfTI'): nnunet_run.load_nnunet(run, device='cpu')(torch.zeros(3, 20, 24), 'ball')

def test_an_interrupted_call_takes_its_workers_along(tmp_path, monkeypatch):
    fake, pid = tmp_path/'python', tmp_path/'pid'
    fake.write_text(f"#!/bin/sh\nsleep 60 &\necho $$ > {pid}\necho started\nwait\n"); fake.chmod(0o755)
    monkeypatch.setattr(nnunet_run, 'optional_import', lambda *args: None); monkeypatch.setattr(nnunet_run.sys, 'executable', str(fake))
    def stop(line): raise KeyboardInterrupt
    monkeypatch.setattr(nnunet_run, 'print', lambda *args, **kwargs: stop(args), raising=False)
    with pytest.raises(KeyboardInterrupt): nnunet_run._call(tmp_path, 'train', tmp_path/'log', True, 1, {})
    group, end = int(pid.read_text()), time.time() + 10
    while time.time() < end:
        try: os.killpg(group, 0)
        except ProcessLookupError: return
        time.sleep(.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail('a worker outlived the call')
