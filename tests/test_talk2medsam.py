"Talk2MedSAM: bad input, exact counts, step 0, what is frozen, folders, and the segmenter's contract."
import json, socket
import huggingface_hub, numpy as np, pytest, torch
from PIL import Image
from medseg_nb.clip.bert import load_text_encoder, random_bert
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.clip.text import TextFeatures
from medseg_nb.core import seeded
from medseg_nb.segment import check_segmenter
from medseg_nb.talk2medsam.adapters import (DotProduct, GatedFusion, HierarchicalFusion, Routes, SparsePrompt, TextAttention, list_adapters,
                                            make_adapter)
from medseg_nb.talk2medsam.model import Talk2MedSAM, Talk2MedSAMSegmenter, load_sam, talk2medsam, text_gradient

def build(adapter='hierarchical', seed=0, **kwargs):
    with seeded(seed): return talk2medsam('tiny', adapter, pretrained=False, **kwargs)

@pytest.fixture(scope='module')
def model(): return build()

@pytest.fixture(scope='module')
def images():
    with seeded(1): return torch.rand(2, 3, 70, 90)

@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(socket, 'socket', refuse)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)

def count(m): return sum(p.numel() for p in m.parameters())
def bits(x): return x.detach().contiguous().view(torch.int32)

def features(b, n, dim=32, lengths=None, seed=0):
    with seeded(seed):
        mask = torch.arange(n)[None] < torch.tensor(lengths or [n]*b)[:, None]
        return TextFeatures(torch.randn(b, n, dim), mask, torch.nn.functional.normalize(torch.randn(b, dim), dim=-1))

def wake(m):
    with seeded(9):
        for p in m.parameters():
            if not p.any(): torch.nn.init.normal_(p, std=.1)
    return m

boxes = torch.tensor([[10., 20, 200, 240], [0, 0, 255, 255]])

@pytest.mark.parametrize('adapter, n', [(GatedFusion(), 526_337), (GatedFusion(form='zero'), 526_337), (HierarchicalFusion(), 494_594),
    (HierarchicalFusion(width=None), 1_052_674), (HierarchicalFusion(words=True), 478_082), (SparsePrompt(), 262_656), (DotProduct(), 196_865)])
def test_counts(adapter, n): assert count(adapter) == n

@pytest.mark.parametrize('name, kwargs', [('hierarchical', {}), ('hierarchical', dict(words=True, grid=4)), ('hierarchical', dict(width=None)),
    ('gated', dict(form='zero')), ('dot', {}), ('hierarchical+dot', {})])
@pytest.mark.parametrize('box', [None, boxes])
def test_step_0_is_the_frozen_model(model, images, name, kwargs, box):
    m = talk2medsam(model.sam, name, model.encoder, **kwargs)
    x = m.embed(images)
    want = model.sam(image_embeddings=x, input_boxes=None if box is None else box[:, None], multimask_output=False).pred_masks[:, 0]
    for mode in (False, True): assert torch.equal(bits(m.train(mode).decode(x, ['left lung', 'heart'], box)), bits(want))
    assert torch.equal(bits(m.decode_frozen(x, box)), bits(want))

@pytest.mark.parametrize('name', ['gated', 'sparse'])
def test_published_forms_are_not(model, images, name):
    m = talk2medsam(model.sam, name, model.encoder)
    x = m.embed(images)
    assert not torch.equal(m.decode(x, ['a', 'b']), m.decode_frozen(x))

@pytest.mark.parametrize('name', [*list_adapters(), 'hierarchical+sparse+dot'])
def test_only_the_adapter_learns(images, name):
    m = build(name).train()
    frozen = {n: p.clone() for n,p in m.named_parameters() if not n.startswith('adapter.')}
    opt = torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=.1)
    first = m.decode(m.embed(images), ['a', 'b'], boxes)
    for _ in range(2):
        opt.zero_grad(); (m.decode(m.embed(images), ['a', 'b'], boxes) - 1).square().mean().backward(); opt.step()
    assert not m.sam.training and not m.encoder.training and m.adapter.training
    assert all(torch.equal(p, frozen[n]) and p.grad is None for n,p in m.named_parameters() if n in frozen)
    assert all(p.grad is not None for p in m.adapter.parameters())
    assert not torch.equal(first, m.decode(m.embed(images), ['a', 'b'], boxes))

@pytest.mark.parametrize('kwargs', [dict(), dict(words=True), dict(width=None, words=True), dict(form='postnorm', words=True, grid=3)])
@pytest.mark.parametrize('seed', range(3))
def test_rows_and_padding_are_independent(kwargs, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 4).tolist()
    text = features(4, 12, lengths=lengths, seed=seed)
    x = torch.randn(4, 32, *rng.integers(3, 9, 2).tolist(), generator=torch.Generator().manual_seed(seed))
    adapters = Routes(wake(HierarchicalFusion(32, 32, **kwargs)), SparsePrompt(32, 32, words=True, n=2), wake(DotProduct(32, 32)))
    with torch.no_grad():
        whole = adapters(x, text)
        for i,n in enumerate(lengths):
            one = adapters(x[[i]], TextFeatures(text.tokens[[i], :n], text.mask[[i], :n], text.pooled[[i]]))
            for a,b in zip(one, whole): torch.testing.assert_close(a[0], b[i], atol=1e-5, rtol=1e-4)

def test_one_token_has_no_attention():
    a = TextAttention(16, 4)
    x, t = torch.randn(2, 9, 16), torch.randn(2, 1, 16)
    y = a(x, t)
    y.square().sum().backward()
    assert not a.q.weight.grad.any() and not a.k.weight.grad.any() and a.v.weight.grad.any()
    torch.testing.assert_close(y, a.out(a.v(t)).expand(2, 9, 16))

def test_missing_text_reads_as_nothing_of_the_sentence():
    text, x = features(2, 3), torch.randn(2, 32, 4, 4)
    none = TextFeatures(text.tokens*0, text.mask, text.pooled*0)
    for a in (wake(HierarchicalFusion(32, 32)), wake(DotProduct(32, 32)), SparsePrompt(32, 32)):
        out = [o for o in a(x, none) if o is not None]
        assert all(torch.isfinite(o).all() for o in out)

def test_half_precision_embeddings_are_taken(model, images):
    x = model.embed(images)
    torch.testing.assert_close(model.decode(x.half(), ['a', 'b']), model.decode(x.half().float(), ['a', 'b']))

def test_one_image_many_texts(images):
    m = build('hierarchical+dot'); wake(m.adapter)
    x, texts = m.embed(images[:1]), ['one', 'two words', 'three short words']
    with torch.no_grad(): torch.testing.assert_close(m.decode(x, texts), torch.cat([m.decode(x, [t]) for t in texts]), atol=1e-5, rtol=1e-4)

def test_embed_takes_images_of_several_sizes(model, images):
    x = model.embed([images[0], images[1, :, :40]])
    torch.testing.assert_close(x[0], model.embed(images)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.embed(images*.5 + .2), model.embed(images), atol=1e-2, rtol=1e-2)

def test_text_gradient(images):
    m = build('hierarchical+dot')
    x = m.embed(images)
    assert not text_gradient(m, x, ['a', 'b']).share.any()
    wake(m.adapter)
    g = text_gradient(m, x, ['a', 'b'], boxes)
    assert all(o.shape == (2,) and (o > 0).all() for o in g) and (g.share < 1).all()
    assert all(p.grad is None for p in m.parameters())
    again = text_gradient(m, x, ['a', 'b'], boxes)
    assert all(torch.equal(a, b) for a,b in zip(g, again))

@pytest.mark.parametrize('name, kwargs', [('hierarchical', dict(words=True, width=64, gate_is='sigmoid')), ('gated', {}), ('sparse', dict(n=2, words=True)),
    ('dot', {}), ('hierarchical+dot', dict(hierarchical=dict(grid=4)))])
def test_folder_round_trip(tmp_path, images, name, kwargs):
    m = build(name, **kwargs); wake(m.adapter)
    m.save_pretrained(tmp_path, threshold=.3, box='full', cls='other')
    assert sorted(f.name for f in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    back = Talk2MedSAM.from_pretrained(tmp_path, sam=m.sam)
    x, text = m.embed(images), m.text(['left lung', 'a heart'])
    assert torch.equal(bits(back.decode(x, text)), bits(m.decode(x, text)))
    seg = Talk2MedSAMSegmenter(back, device='cpu')
    assert seg.threshold == .3 and seg.box == 'full' and back.config['cls'] == 'Talk2MedSAM' and not back.training
    assert all(p.requires_grad for p in back.adapter.parameters()) and not any(p.requires_grad for p in back.sam.parameters())

def test_whole_folder_round_trip_and_again(tmp_path, images):
    with seeded(2): bert = random_bert(load_encoder('tiny').tokenizer, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    m = build(encoder=bert, words=True); wake(m.adapter)
    m.save_pretrained(tmp_path/'a', whole=True)
    back = Talk2MedSAM.from_pretrained(tmp_path/'a')
    x = m.embed(images)
    assert torch.equal(bits(back.decode(x, m.text(['a', 'b']))), bits(m.decode(x, m.text(['a', 'b']))))
    torch.testing.assert_close(back.text(['a', 'b c']).pooled, m.text(['a', 'b c']).pooled)
    back.save_pretrained(tmp_path/'b')
    with pytest.raises(ValueError, match='pass sam='): Talk2MedSAM.from_pretrained(tmp_path/'b')

def test_an_adapter_without_a_name_is_not_written(tmp_path, model):
    class Own(DotProduct): name = None
    with pytest.raises(ValueError, match='Own has no name'): Talk2MedSAM(model.sam, model.encoder, Own(64, 128)).save_pretrained(tmp_path/'a')
    assert not (tmp_path/'a').exists()

def test_folder_refusals(tmp_path, model):
    model.save_pretrained(tmp_path)
    read = lambda **k: Talk2MedSAM.from_pretrained(tmp_path, **{**dict(sam=model.sam), **k})
    with pytest.raises(ValueError, match='pass sam='): read(sam=None)
    with pytest.raises(ValueError, match='another sam'): read(sam=build(seed=5).sam)
    with seeded(6): other = load_encoder('tiny', pretrained=False)
    with pytest.raises(ValueError, match='another encoder'): read(encoder=other)
    config = json.loads((tmp_path/'config.json').read_text())
    for change, match in (dict(cls='FMISeg'), 'holds a FMISeg'), (dict(adapter=dict(config['adapter'], name='gated', form='zero')), 'unexpected'), \
                         (dict(adapter=dict(config['adapter'], width=64)), 'misshaped'), (dict(size=512), 'squares of 256'):
        (tmp_path/'config.json').write_text(json.dumps({**config, **change}))
        with pytest.raises((ValueError, TypeError), match=match): read()
    (tmp_path/'config.json').write_text(json.dumps({k: v for k,v in config.items() if k != 'sam'}))
    with pytest.raises(ValueError, match='lacks sam'): read()
    with pytest.raises(FileNotFoundError, match='no config.json'): Talk2MedSAM.from_pretrained(tmp_path/'nothing')

@pytest.mark.parametrize('box', ['none', 'full'])
@pytest.mark.parametrize('frozen', [False, True])
def test_segmenter_contract(model, images, box, frozen):
    seg = Talk2MedSAMSegmenter(model, box=box, frozen=frozen, device='cpu', bs=2, chunk=3)
    grey = (np.arange(50*64).reshape(50, 64) % 256).astype(np.uint8)
    many = [images[0], grey, Image.fromarray(grey[:20])]
    out = check_segmenter(seg, many, [['left lung', 'heart', 'a', 'b'], ['heart'], ['heart', 'spleen']])
    assert [tuple(o.prob.shape) for o in out] == [(4, 70, 90), (1, 50, 64), (2, 20, 64)] and not out[0].prob.requires_grad
    check_segmenter(seg, images[0], 'heart')

def test_segmenter_with_boxes(images):
    m = build('hierarchical+dot'); wake(m.adapter)
    seg = Talk2MedSAMSegmenter(m, 'given', device='cpu')
    given = [[[0, 0, 40, 30], [10, 10, 89, 69]], torch.tensor([[5, 5, 60, 60], [5., 5, 60, 60]])]
    out = check_segmenter(lambda i, p: seg(i, p, given), list(images), ['heart', 'left lung'])
    assert not torch.equal(out[1].prob[0], out[1].prob[1])
    swapped = seg(list(images), ['left lung', 'heart'], [[given[0][1], given[0][0]], given[1]])
    torch.testing.assert_close(swapped[0].prob.flip(0), out[0].prob, atol=1e-5, rtol=1e-4)

def test_segmenter_refusals(model, images):
    make = lambda box, **k: Talk2MedSAMSegmenter(model, box, device='cpu', **k)
    with pytest.raises(ValueError, match="Did you mean 'given'"): make('give')
    with pytest.raises(ValueError, match='from 0 to 1'): make('none', threshold=2)
    with pytest.raises(ValueError, match='at least 1'): make('none', bs=0)
    with pytest.raises(ValueError, match='no image'): make('none')([], 'a')
    with pytest.raises(ValueError, match='empty prompt'): make('none')(images[0], ' ')
    with pytest.raises(ValueError, match='takes no boxes'): make('full')(images[0], 'a', [[[0, 0, 5, 5]]])
    with pytest.raises(ValueError, match='needs boxes'): make('given')(images[0], 'a')
    for box, match in ([[0, 0, 5, 5]], 'boxes of 2 images'), ([[[0, 0, 5]]], r'\(1, 4\)'), ([[[9, 0, 5, 5]]], 'within its 70x90'), \
                      ([[[0, 0, 91, 5]]], 'within its'), ([[[0, 0, float('nan'), 5]]], 'within its'):
        with pytest.raises(ValueError, match=match): make('given')([images[0]], ['a'], box*2 if match.startswith('boxes') else box)

def test_names(no_network, tmp_path):
    for name in ('medsam', 'sam', 'hf-hub:somebody/medsam'):
        with pytest.raises(ConnectionError, match='fetch its config.json'): talk2medsam(name)
    for name in ('pubmedbert', 'pubmedbert-abstract', 'bert:somebody/bert'):
        with pytest.raises(ConnectionError, match='vocab.txt'): load_text_encoder(name)
    with pytest.raises(ValueError, match='pretrained=False'): load_sam('full')
    with pytest.raises(ValueError, match='is for the sizes'): load_sam('medsam', pretrained=False)
    with pytest.raises(FileNotFoundError, match='no config.json'): load_sam(tmp_path)
    with pytest.raises(ValueError, match='unknown model'): load_sam('medsma')
    with pytest.raises(ValueError, match='unknown text encoder'): load_text_encoder('pubmed')
    assert build().size == 256

def test_sam_from_a_folder(tmp_path, model, images):
    model.sam.save_pretrained(tmp_path/'medsam')
    m = talk2medsam(tmp_path/'medsam')
    assert m.sources == dict(sam=str(tmp_path/'medsam'), encoder='tiny')
    assert torch.equal(m.embed(images), model.embed(images))
    m.save_pretrained(tmp_path/'adapter')
    assert torch.equal(Talk2MedSAM.from_pretrained(tmp_path/'adapter').embed(images), model.embed(images))

@pytest.mark.parametrize('bad, match', [(lambda m, x: m.decode(x, ['a']), '1 texts for 2'), (lambda m, x: m.decode(x, []), 'list of strings'),
    (lambda m, x: m.decode(x[:, :3], ['a', 'b']), 'expected an embedding'), (lambda m, x: m.decode(x, ['a', 'b'], boxes[:1]), r'boxes \(2, 4\)'),
    (lambda m, x: m.decode(x, ['a', 'b'], boxes.flip(1)), 'within the model'), (lambda m, x: m.embed(torch.zeros(1, 1, 9, 9)), 'float images'),
    (lambda m, x: m.decode(x, ['a', 'b'], boxes*float('nan')), 'within the model'), (lambda m, x: m.decode(x, features(2, 3)), 'built for 128')])
def test_bad_input(model, images, bad, match):
    with pytest.raises(ValueError, match=match): bad(model, model.embed(images))

def test_bad_parts(model):
    with pytest.raises(ValueError, match='expected a SamModel'): Talk2MedSAM(model.encoder, model.encoder, model.adapter)
    with pytest.raises(ValueError, match='expected an Adapter'): Talk2MedSAM(model.sam, model.encoder, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match='words of width 77'): Talk2MedSAM(model.sam, model.encoder, make_adapter('gated', 64, 128, 77))
