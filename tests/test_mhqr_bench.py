"Benchmarks in every layout, and runs that are killed."
import json, os, signal, subprocess, sys, textwrap
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from medseg_nb.mhqr.bench import run_ablation, run_bench
from medseg_nb.mhqr.datasets import list_benchmarks, read_benchmark

rng = np.random.default_rng(0)

def put(path, a, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = Image.fromarray(np.asarray(a).astype(np.uint8))
    if palette: im.putpalette(list(range(256))*3)
    im.save(path)

def picture(path, size=(4, 6)):
    a = rng.integers(0, 256, (*size, 3))
    put(path, a)
    return a

def voc(base, ids=('b', 'a')):
    maps = {i: rng.choice([0, 3, 20, 255], (4, 6)) for i in ids}
    for i,m in maps.items():
        picture(base/'JPEGImages'/f'{i}.jpg')
        put(base/'SegmentationClass'/f'{i}.png', m, palette=True)
    (base/'ImageSets/Segmentation').mkdir(parents=True)
    (base/'ImageSets/Segmentation/val.txt').write_text('\n'.join(ids) + '\n')
    return maps

@pytest.mark.parametrize('inner', ['', 'VOC2012', 'VOCdevkit/VOC2012'])
def test_voc(tmp_path, inner):
    maps = voc(tmp_path/inner)
    with_back, without = read_benchmark('voc21', tmp_path), read_benchmark('voc20', str(tmp_path))
    assert with_back.items['id'].tolist() == ['b', 'a'] and with_back.background == (0,) and without.background == ()
    for i,m in enumerate(maps.values()):
        assert with_back[i][1].tolist() == m.tolist() and with_back[i][1].dtype == torch.int64
        assert without[i][1].tolist() == np.where((m == 0) | (m == 255), 255, m-1).tolist()
        x = np.asarray(Image.open(with_back.items['image'][i]))
        assert np.allclose(with_back[i][0].permute(1, 2, 0).numpy()*255, x, atol=1e-3)
    assert [len(read_benchmark('voc21', tmp_path, n=n)) for n in (1, 2, 9)] == [1, 2, 2]
    assert len([y for _,y in with_back]) == 2, 'iteration ends'

@pytest.mark.parametrize('images', ['images/val2017', 'val2017'])
@pytest.mark.parametrize('labels', ['stuffthingmaps/val2017', 'annotations/val2017'])
def test_coco(tmp_path, images, labels):
    picture(tmp_path/images/'000000000139.jpg', (1, 5))
    put(tmp_path/labels/'000000000139.png', [[0, 12, 91, 181, 255]])
    stuff, things = (read_benchmark(n, tmp_path) for n in ('coco_stuff', 'coco_object'))
    assert stuff[0][1].tolist() == [[0, 11, 80, 170, 255]] and things[0][1].tolist() == [[1, 12, 0, 0, 0]]
    assert stuff.names[11] == 'stop sign' == things.names[12] and stuff.names[80] in stuff.stuff and stuff.names[79] not in stuff.stuff
    put(tmp_path/labels/'000000000139.png', [[0, 11, 91, 181, 255]])
    with pytest.raises(ValueError, match=r"000000000139.png' holds \[11\]"): stuff[0]

@pytest.mark.parametrize('form,values,want', [('_labelTrainIds', [0, 79, 80, 170, 255], {'coco_stuff': [0, 79, 80, 170, 255], 'coco_object': [1, 80, 0, 0, 0]}),
                                              ('_instanceTrainIds', [0, 1, 80, 0, 0], {'coco_object': [0, 1, 80, 0, 0]})])
def test_coco_converted(tmp_path, form, values, want):
    picture(tmp_path/'images/val2017/7.jpg', (1, 5))
    put(tmp_path/f'annotations/val2017/7{form}.png', [values])
    for name,o in want.items(): assert read_benchmark(name, tmp_path)[0][1].tolist() == [o]

def test_cityscapes(tmp_path):
    for city,i in (('ulm', 'ulm_000001_000019'), ('bonn', 'bonn_000002_000019')):
        put(tmp_path/f'leftImg8bit/train/{city}/{i}_leftImg8bit.png', np.zeros((1, 3, 3)))
        put(tmp_path/f'gtFine/train/{city}/{i}_gtFine_labelIds.png', [[7, 33, 9]])
    b = read_benchmark('cityscapes', tmp_path, 'train')
    assert b.items['id'].tolist() == ['bonn_000002_000019', 'ulm_000001_000019'] and b[1][1].tolist() == [[0, 18, 255]]
    assert 'sky' in b.stuff and 'rider' not in b.stuff

def test_ade(tmp_path):
    base = tmp_path/'ADEChallengeData2016'
    picture(base/'images/validation/ADE_val_00000001.jpg', (1, 4))
    put(base/'annotations/validation/ADE_val_00000001.png', [[0, 1, 150, 22]])
    b = read_benchmark('ade20k', tmp_path)
    assert b[0][1].tolist() == [[255, 0, 149, 21]] and b.names[21] == 'water' and len(b.stuff) == 50
    names = ['wall', 'building, edifice', *(f'thing {i}, wall' for i in range(148))]
    (base/'objectInfo150.txt').write_text('Idx\tRatio\tTrain\tVal\tName\n' + ''.join(f'{i}\t.1\t1\t1\t{n} \n' for i,n in enumerate(names, 1)))
    b = read_benchmark('ade20k', base)
    assert b.names[:3] == ['wall', 'building', 'thing 0'] and b.words[1:3] == [['building', 'edifice'], ['thing 0']] and len(b.stuff) == 50
    put(base/'annotations/validation/ADE_val_00000001.png', [[0, 1, 151, 22]])
    with pytest.raises(ValueError, match=r'holds \[151\]'): b[0]
    (base/'objectInfo150.txt').write_text('Idx\tName\n1\twall\n')
    with pytest.raises(ValueError, match='150 different classes, got 1'): read_benchmark('ade20k', base)

@pytest.mark.parametrize('name', [n for n in list_benchmarks().index if n != 'natural_coco'])
def test_an_empty_folder_is_told_what_it_lacks(tmp_path, name):
    with pytest.raises(FileNotFoundError) as e: read_benchmark(name, tmp_path)
    assert list_benchmarks().loc[name, 'files'] in str(e.value) and str(tmp_path) in str(e.value)
    with pytest.raises(FileNotFoundError, match='no folder'): read_benchmark(name, tmp_path/'nowhere')

def test_what_is_missing_is_named(tmp_path):
    voc(tmp_path)
    (tmp_path/'SegmentationClass/a.png').unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 label files are not there, the first: '.*a\.png'"): read_benchmark('voc21', tmp_path)
    (tmp_path/'SegmentationClass/b.png').write_bytes(b'no picture')
    (tmp_path/'ImageSets/Segmentation/val.txt').write_text('b')
    with pytest.raises(ValueError, match=r"b\.png' cannot be read"): read_benchmark('voc21', tmp_path)[0]
    (tmp_path/'ImageSets/Segmentation/val.txt').write_text('')
    with pytest.raises(FileNotFoundError, match='no image'): read_benchmark('voc21', tmp_path)

def by_colour(image, names):
    prob = torch.full((len(names), *image.shape[1:]), .01)
    prob[0], prob[3], prob[20] = image
    return SimpleNamespace(prob=prob, dense=SimpleNamespace(prob=prob.flip(1)))

KILLED = '''
    import os, signal, sys
    sys.path.insert(0, {here!r})
    from medseg_nb.mhqr.bench import run_bench
    from medseg_nb.mhqr.datasets import read_benchmark
    from test_mhqr_bench import by_colour
    seen = []
    def predict(image, names):
        seen.append(1)
        if len(seen) == 4: os.kill(os.getpid(), signal.SIGKILL)
        return by_colour(image, names)
    run_bench(predict, read_benchmark('voc21', {root!r}), {out!r})
'''

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
def test_a_killed_run_goes_on(tmp_path):
    root, out, ids = tmp_path/'voc', tmp_path/'out', [f'i{i}' for i in range(6)]
    voc(root, ids)
    code = textwrap.dedent(KILLED.format(here=os.path.dirname(os.path.abspath(__file__)), root=str(root), out=str(out)))
    assert subprocess.run([sys.executable, '-c', code], timeout=300).returncode == -signal.SIGKILL
    assert not (out/'report.json').exists()
    with open(out/'rows.jsonl', 'a') as f: f.write('\n{"key": "i3|1')
    seen, bench = [], read_benchmark('voc21', root)
    def predict(image, names): seen.append(1); return by_colour(image, names)
    report, whole = run_bench(predict, bench, out), run_bench(by_colour, bench)
    assert len(seen) == 3 and report.table().equals(whole.table()) and report.classes().equals(whole.classes())
    made = json.loads((out/'report.json').read_text())
    assert [r['id'] for r in made['results']] == ids and not [p for p in out.iterdir() if p.name.startswith('.')]
    assert run_bench(predict, bench, out).table().equals(whole.table()) and len(seen) == 3
    picture(root/'JPEGImages/i0.jpg', (4, 6)); put(root/'SegmentationClass/i0.png', np.tile([0, 3, 20], (4, 2)))
    run_bench(predict, bench, out)
    assert len(seen) == 4, 'an image that was exchanged is done again'
    (out/'after'/'i2.png').unlink()
    run_bench(predict, bench, out)
    assert len(seen) == 5, 'a label map that is gone is made again'
    run_bench(predict, bench, out, fresh=True)
    assert len(seen) == 11

def test_a_fresh_run_takes_nothing_that_is_not_its_own(tmp_path):
    voc(tmp_path/'voc')
    (tmp_path/'out/after').mkdir(parents=True); (tmp_path/'out/after/mine.txt').write_text('keep')
    (tmp_path/'out/rows.jsonl').write_text('{"key": "of another kind"}')
    bench = read_benchmark('voc21', tmp_path/'voc')
    with pytest.raises(ValueError, match='holds a run with other settings'): run_bench(by_colour, bench, tmp_path/'out')
    (tmp_path/'out/rows.jsonl').unlink()
    run_bench(by_colour, bench, tmp_path/'out', fresh=True)
    assert (tmp_path/'out/after/mine.txt').read_text() == 'keep'

def test_a_run_without_folder_leaves_nothing(tmp_path, monkeypatch):
    voc(tmp_path/'voc')
    (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here')
    assert len(run_bench(by_colour, read_benchmark('voc21', tmp_path/'voc')).ok) == 2
    assert list((tmp_path/'here').iterdir()) == []

def test_an_unreadable_image_does_not_lose_the_others(tmp_path):
    voc(tmp_path/'voc')
    (tmp_path/'voc/JPEGImages/a.jpg').write_bytes(b'no picture')
    report = run_bench(by_colour, read_benchmark('voc21', tmp_path/'voc'), tmp_path/'out')
    assert [r['id'] for r in report.failed] == ['a'] and len(report.ok) == 1
    made = json.loads((tmp_path/'out/report.json').read_text())['results']
    assert 'labels' in made[0] and 'a.jpg' in made[1]['error'] and made[1]['image'] == '../voc/JPEGImages/a.jpg' and str(tmp_path) not in made[1]['error']

def test_an_ablation_goes_on_and_keeps_what_worked(tmp_path):
    voc(tmp_path/'voc')
    bench, seen = read_benchmark('voc21', tmp_path/'voc'), []
    def make(a=1, net=None):
        if a == 3: raise ValueError('a must not be 3')
        def predict(image, names): seen.append(a); return by_colour(image, names)
        return predict
    grid = {'one / two': dict(a=1), 'three': dict(a=3)}
    table, reports = run_ablation(make, bench, grid, tmp_path/'out', base=dict(net='x'))
    again, _ = run_ablation(make, bench, grid, tmp_path/'out', base=dict(net='x'))
    assert seen == [1, 1] and table.equals(again) and table.loc['three', 'error'] == 'a must not be 3' and list(reports) == ['one / two']
    made = json.loads((tmp_path/'out/report.json').read_text())['results']
    assert [r['setting'] for r in made] == list(grid) and (tmp_path/'out'/made[0]['folder']/'report.json').is_file()
    with pytest.raises(ValueError, match='none of the 2 settings gave a result'): run_ablation(make, bench, grid, tmp_path/'out', base=dict(net='y'))
