"Saliency: a killed run and its successor, and towers that are not the plain one."
import filecmp, json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, open_clip, pandas as pd, pytest, torch
from PIL import Image
import medseg_nb
from medseg_nb.clip.biomedclip import ClipEncoder, load_encoder
from medseg_nb.clip.m2ib import VisionTail, _TextTail, _text_blocks, frozen, gradient, m2ib, m2ib_text, nib
from medseg_nb.clip.saliency import precompute_saliency, saliency_maps
from medseg_nb.clip.text import read_tokenizer
from medseg_nb.core import seeded
from medseg_nb.io import read_image

def make_encoder(**vit):
    tok = read_tokenizer(Path(medseg_nb.__file__).parent/'weights/tiny_clip/vocab.txt', 32)
    bert = dict(vocab_size=1904, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)
    vit = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, **vit)
    with seeded(0): return ClipEncoder(tok, embed_dim=16, image_size=32, context_length=32, vit=vit, bert=bert, mean=[.5]*3, std=[.25]*3).eval()

def make_index(folder, n):
    "`n` images with two prompts each."
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (24+i % 7, 30, 3), np.uint8)).save(folder/f'{i:03d}.png')
        rows += [(str(folder/f'{i:03d}.png'), t) for t in ('left lung', 'optic disc')]
    return pd.DataFrame(rows, columns=['image', 'text'])

def run(folder, out, pause=0.):
    def slowly(batches):
        for b in batches:
            yield b
            time.sleep(pause)
    torch.set_num_threads(1)
    return precompute_saliency(make_encoder(), pd.read_csv(folder/'index.csv'), out, size=20, bs=4, progress=slowly, steps=3, samples=2)

def maps(folder): return [p for p in folder.rglob('*.png') if p.name[0] != '.']

@pytest.fixture(scope='module')
def encoder(): return make_encoder()

@pytest.fixture(scope='module')
def x():
    with seeded(1): return torch.rand(2, 3, 32, 32)

def test_killed_run_resumes_to_the_same_files(tmp_path):
    images, whole, killed = (tmp_path/n for n in ('images', 'whole', 'killed'))
    images.mkdir(); killed.mkdir()
    make_index(images, 100).to_csv(images/'index.csv', index=False)
    done = run(images, whole)
    assert len(maps(whole)) == 200 and done['prior'].map(os.path.isfile).all() and done['prior'].nunique() == 200
    child = subprocess.Popen([sys.executable, __file__, images, killed])
    try:
        end = time.monotonic() + 240
        while len(maps(killed)) < 60 and child.poll() is None and time.monotonic() < end: time.sleep(.01)
    finally:
        child.send_signal(signal.SIGKILL)
        code = child.wait()
    some = maps(killed)
    assert code == -signal.SIGKILL and 60 <= len(some) < 200 and not list(killed.rglob('manifest.json'))
    lost = sorted(some)[0]
    lost.unlink(); lost.with_name('.' + lost.name).write_bytes(b'half of a file')
    run(images, killed)
    names = lambda d: sorted(p.relative_to(d) for p in d.rglob('*') if p.is_file())
    assert names(whole) == names(killed) and len(names(whole)) == 201
    assert filecmp.cmpfiles(whole, killed, names(whole), shallow=False)[0] == names(whole)

def test_what_is_there_is_not_computed_again(tmp_path, encoder, monkeypatch):
    index = make_index(tmp_path, 5)
    first = precompute_saliency(encoder, index, tmp_path/'maps', 'nib')
    monkeypatch.setattr('medseg_nb.clip.saliency.saliency_maps', lambda *a, **k: pytest.fail('computed again'))
    again = precompute_saliency(encoder, index[::-1], tmp_path/'maps', 'nib', bs=2)
    assert list(again['prior'][::-1]) == list(first['prior'])
    with pytest.raises(pytest.fail.Exception): precompute_saliency(encoder, index, tmp_path/'maps', 'nib', steps=3)

def test_a_growing_index_keeps_its_manifest(tmp_path, encoder):
    index = make_index(tmp_path, 3)
    for n in (2, 6): df = precompute_saliency(encoder, index[:n], tmp_path/'maps', 'gradient')
    other = precompute_saliency(encoder, index[2:4], tmp_path/'maps', 'gradient')
    manifest = json.loads(next((tmp_path/'maps').rglob('manifest.json')).read_text())
    assert sorted(manifest['maps']) == sorted(Path(p).name for p in df['prior']) and list(other['prior']) == list(df['prior'][2:4])

def test_same_image_under_two_names_is_one_map(tmp_path, encoder):
    index = make_index(tmp_path, 1)
    (tmp_path/'copy.png').write_bytes((tmp_path/'000.png').read_bytes())
    df = precompute_saliency(encoder, pd.concat([index, index.assign(image=str(tmp_path/'copy.png'))]), tmp_path/'maps', 'gradient')
    assert df['prior'].nunique() == 2 and len(maps(tmp_path/'maps')) == 2

def test_bad_rows_do_not_stop_the_others(tmp_path, encoder):
    index = make_index(tmp_path, 3)
    (tmp_path/'001.png').write_bytes(b'no image')
    index.loc[0, 'text'], index.loc[5, 'image'] = '  ', str(tmp_path/'gone.png')
    df = precompute_saliency(encoder, index, tmp_path/'maps', 'gradient', size=None)
    assert [bool(e) for e in df['prior_error']] == [True, False, True, True, False, True]
    assert [bool(p) for p in df['prior']] == [not e for e in df['prior_error']]
    assert read_image(df['prior'][1]).size == read_image(df['image'][1]).size
    errors = json.loads(next((tmp_path/'maps').rglob('manifest.json')).read_text())['errors']
    assert len(errors) == 4 and not any(str(tmp_path) in json.dumps(e) for e in errors)

@pytest.mark.parametrize('vit', [{}, dict(init_values=.1), dict(qk_norm=True), dict(reg_tokens=3), dict(global_pool='avg'), dict(pre_norm=True),
                                 dict(class_token=False, global_pool='avg'), dict(qkv_bias=False)], ids=str)
def test_any_timm_vit(vit, x):
    enc = make_encoder(**vit)
    for k in range(3):
        tail = VisionTail(enc, k)
        with torch.no_grad(): torch.testing.assert_close(tail(tail.hidden(x)), enc.encode_image(x), atol=1e-6, rtol=0)
    assert tail.grid(torch.zeros(2, tail.shape[0])).shape == (2, 4, 4)
    assert all(m.shape == (1, 4, 4) and m.isfinite().all() and m.std() > 0 for m in m2ib(enc, x, 'left lung', steps=3, samples=2))

@pytest.mark.parametrize('cfg', [{}, dict(attentional_pool=True), dict(pool_type='avg'), dict(final_ln_after_pool=True), dict(ls_init_value=.1)], ids=str)
def test_any_open_clip_vit(cfg, x, tmp_path):
    cfg = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=4, width=64, patch_size=8, head_width=32, **cfg),
               text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=3))
    (tmp_path/'saliency-test.json').write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path)
    with seeded(2): enc = load_encoder('open_clip:saliency-test', pretrained=False)
    tail = VisionTail(enc)
    with torch.no_grad(): torch.testing.assert_close(tail(tail.hidden(x)), enc.encode_image(x), atol=1e-6, rtol=0)
    assert nib(enc, x, 'left lung')[0].shape == (1, 4, 4)
    words = _TextTail(enc, _text_blocks(enc)[0], ['left lung', 'right lung'])
    with torch.no_grad(): torch.testing.assert_close(words(words.hidden()), enc.encode_text(['left lung', 'right lung']).pooled, atol=1e-6, rtol=0)
    assert [w for w,_ in m2ib_text(enc, x[:1], 'left lung', steps=3, samples=2)[0][0]] == ['left', 'lung']

def test_words_alone_and_among_others(encoder, x):
    asked = ['left lung', 'optic disc', 'the left lung of a child', 'lung']
    many = m2ib_text(encoder, x, asked, steps=4, samples=2, chunk=3)
    for i in range(2):
        for p,got in zip(asked, many[i]):
            one = m2ib_text(encoder, x[i:i+1], p, steps=4, samples=2)[0][0]
            assert [w for w,_ in got] == [w for w,_ in one] == [encoder.tokenizer.id_to_token(t) for t in encoder.tokenizer.encode(p).ids[1:-1]]
            assert np.allclose([s for _,s in got], [s for _,s in one], atol=1e-3)

def test_encoder_is_left_as_it_was(x):
    enc = make_encoder().train()
    enc.visual.eval(); enc.logit_scale.requires_grad_(False)
    before = [m.training for m in enc.modules()], [p.requires_grad for p in enc.parameters()]
    with torch.inference_mode(): m2ib(enc, x, 'left lung', steps=3, samples=2); gradient(enc, x, 'left lung')
    with pytest.raises(ValueError): m2ib(enc, x, 'left lung', layer=7)
    with pytest.raises(RuntimeError), frozen(enc): raise RuntimeError
    assert before == ([m.training for m in enc.modules()], [p.requires_grad for p in enc.parameters()])
    assert all(p.grad is None for p in enc.parameters()) and not enc._cache

def test_features_of_texts_stand_for_texts(encoder):
    images = [torch.rand(3, 20, 30), torch.rand(3, 40, 30)]
    f = encoder.encode_text(['left lung', 'optic disc']).pooled
    kw = dict(steps=3, samples=2)
    want = saliency_maps(encoder, images, [['left lung'], ['left lung', 'optic disc']], **kw)
    for got in (saliency_maps(encoder, images, [f[:1]*3, f], **kw), saliency_maps(encoder, images, [['left lung'], f], bs=1, **kw)):
        for a,b in zip(got, want): torch.testing.assert_close(a, b, atol=1e-3, rtol=0)

@pytest.mark.parametrize('bad', [[], [[]], [['a'], ['b']], ['a', ['b']], [3]])
def test_bad_prompts(encoder, bad):
    with pytest.raises((ValueError, TypeError)): saliency_maps(encoder, torch.rand(3, 20, 30), bad)

if __name__ == '__main__': run(Path(sys.argv[1]), Path(sys.argv[2]), .05)
