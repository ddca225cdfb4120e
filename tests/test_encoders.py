"Encoders from local folders and from a local hub cache, with the network cut; tokenizers against recorded examples."
import json, os, pickle, shutil, socket
from pathlib import Path
import huggingface_hub, pytest, torch
from safetensors.torch import save_file
import medseg_nb
from medseg_nb.clip.biomedclip import ClipEncoder, TextFeatures, biomedclip_config, load_encoder, read_tokenizer, save_encoder, tiny_config

tiny = Path(medseg_nb.__file__).parent/'weights/tiny_clip'
shared = Path(__file__).resolve().parents[2]/'shared/weights/tokenizers_and_configs'
texts = ['left lung', 'bilateral pulmonary infection, two infected areas, upper left lung.', 'optic disc']
sizes = dict(vit=dict(depth=1, embed_dim=32, num_heads=2),
             bert=dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48))

@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(socket, 'socket', refuse)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)

@pytest.fixture
def enc():
    torch.manual_seed(0)
    return load_encoder('tiny', pretrained=False)

@pytest.fixture
def released(tmp_path):
    "A small model in BiomedCLIP's layout, with the weights it was written from."
    torch.manual_seed(1)
    cfg = dict(tiny_config(), embed_dim=24, context_length=64, vit=dict(biomedclip_config()['vit'], **sizes['vit']),
               bert=dict(tiny_config()['bert'], vocab_size=30522, max_position_embeddings=512, **sizes['bert']))
    source = ClipEncoder(read_tokenizer(tiny/'vocab.txt', 64), **cfg).eval()
    folder = tmp_path/'released'; folder.mkdir()
    write(folder, source.state_dict())
    return folder, source

def write(folder, state):
    vision = dict(timm_model_name='vit_base_patch16_224', timm_pool='', timm_proj='linear', image_size=224, vit=sizes['vit'])
    text = dict(hf_model_name='nobody/nothing', hf_tokenizer_name='nobody/nothing', hf_proj_type='mlp',
                hf_pooler_type='cls_last_hidden_state_pooler', context_length=64, bert=sizes['bert'])
    stats = {k: tiny_config()[k] for k in ('mean', 'std')}
    cfg = dict(model_cfg=dict(embed_dim=24, vision_cfg=vision, text_cfg=text), preprocess_cfg=stats)
    (folder/'open_clip_config.json').write_text(json.dumps(cfg))
    shutil.copy(tiny/'vocab.txt', folder)
    torch.save({**state, 'text.transformer.embeddings.position_ids': torch.arange(512)[None]}, folder/'open_clip_pytorch_model.bin')

def test_released_layout(released):
    folder, source = released
    got, x = load_encoder(folder), torch.rand(2, 3, 60, 90)
    assert torch.equal(got.encode_image(x), source.encode_image(x))
    assert torch.equal(got.encode_text(texts).tokens, source.encode_text(texts).tokens)
    assert got.text.transformer.embeddings.word_embeddings.num_embeddings == 30522 and not got.training

def test_released_safetensors(released):
    folder, source = released
    (folder/'open_clip_pytorch_model.bin').unlink()
    save_file({k: v.contiguous() for k,v in source.state_dict().items()}, folder/'open_clip_model.safetensors')
    assert torch.equal(load_encoder(str(folder)).encode_text(texts).pooled, source.encode_text(texts).pooled)

def test_missing_and_extra_key(released):
    folder, source = released
    state = source.state_dict()
    write(folder, {k: v for k,v in state.items() if k != 'visual.trunk.norm.weight'})
    with pytest.raises(ValueError, match='1 missing: visual.trunk.norm.weight'): load_encoder(folder)
    write(folder, {**state, 'text.transformer.pooler.dense.bias': torch.zeros(32)})
    with pytest.raises(ValueError, match='1 unexpected: text.transformer.pooler.dense.bias'): load_encoder(folder)
    write(folder, {**state, 'visual.head.proj.weight': torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r'visual.head.proj.weight \(3, 4\) for \(24, 32\)'): load_encoder(folder)

def test_lacking_files_and_other_models(released):
    folder, path = released[0], released[0]/'open_clip_config.json'
    torch.save([torch.zeros(1)], folder/'open_clip_pytorch_model.bin')
    with pytest.raises(ValueError, match='no dict of tensors'): load_encoder(folder)
    (folder/'open_clip_pytorch_model.bin').unlink()
    with pytest.raises(FileNotFoundError, match='no weights in'): load_encoder(folder)
    assert load_encoder(folder, pretrained=False).dim == 24
    cfg = json.loads(path.read_text())
    cfg['model_cfg']['vision_cfg']['timm_model_name'] = 'resnet50'; path.write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match='resnet50'): load_encoder(folder)
    path.write_text('{}')
    with pytest.raises(ValueError, match="lacks 'model_cfg'"): load_encoder(folder)
    path.write_text(json.dumps(dict(cfg, model_cfg=dict(cfg['model_cfg'], text_cfg={}))))
    with pytest.raises(ValueError, match='lacks'): load_encoder(folder)
    cfg['model_cfg']['vision_cfg']['timm_model_name'] = 'vit_base_patch16_224'; path.write_text(json.dumps(cfg))
    (folder/'vocab.txt').unlink()
    with pytest.raises(FileNotFoundError, match='no tokenizer in'): load_encoder(folder)

@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('content', [b'', b'garbage', pickle.dumps(dict(a=1)), pickle.dumps(os.getcwd)])
def test_bad_weights(released, content):
    (released[0]/'open_clip_pytorch_model.bin').write_bytes(content)
    with pytest.raises(ValueError, match='tensors'): load_encoder(released[0])

def test_parity_with_open_clip(released, tmp_path):
    "The same weights in open_clip's own BiomedCLIP, which needs the BERT configuration and tokenizer in a folder of their own."
    import open_clip
    folder, source = released
    bert = tmp_path/'bert'
    source.text.transformer.save_pretrained(bert); shutil.copy(tiny/'vocab.txt', bert)
    (bert/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='BertTokenizer', do_lower_case=True)))
    cfg = json.loads((folder/'open_clip_config.json').read_text())['model_cfg']
    cfg['text_cfg'].update(hf_model_name=str(bert), hf_tokenizer_name=str(bert)); del cfg['text_cfg']['bert']
    cfg['vision_cfg'].update(timm_model_name='test_vit'); del cfg['vision_cfg']['vit']
    name = f'parity-{tmp_path.name}'
    (tmp_path/'cfg').mkdir(); (tmp_path/f'cfg/{name}.json').write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path/'cfg')
    got = load_encoder(f'open_clip:{name}', pretrained=False)
    got.model.text.load_state_dict(source.text.state_dict())
    f, g = got.encode_text(texts), source.encode_text(texts)
    assert torch.equal(f.mask, g.mask) and torch.allclose(f.pooled, g.pooled, atol=1e-5)
    assert torch.allclose(f.tokens[f.mask], g.tokens[g.mask], atol=1e-5)
    with torch.no_grad(): theirs = got.model.encode_text(got.tokenizer(texts), normalize=True)
    assert torch.allclose(theirs, g.pooled, atol=1e-5)

def test_bad_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='is no encoder'): load_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match='no folder'): load_encoder(tmp_path/'absent')
    (tmp_path/'config.json').write_text('not json')
    with pytest.raises(ValueError, match='is not JSON'): load_encoder(tmp_path)
    for f in ('config.json', 'vocab.txt'): shutil.copy(tiny/f, tmp_path)
    with pytest.raises(FileNotFoundError, match='no model.safetensors'): load_encoder(tmp_path)
    (tmp_path/'vocab.txt').unlink()
    with pytest.raises(FileNotFoundError, match='no tokenizer file'): load_encoder(tmp_path, pretrained=False)

def test_round_trip(enc, tmp_path):
    save_encoder(enc, tmp_path)
    again = ClipEncoder.from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k,v in enc.state_dict().items())
    assert again.config == enc.config and again.tokenizer.to_str() == enc.tokenizer.to_str()

def test_hub_cache(released, tmp_path, monkeypatch):
    "A snapshot that the hub client fetched earlier is used without a network."
    folder, source = released
    repo, commit = tmp_path/'cache/models--owner--name', '0123456789'*4
    shutil.copytree(folder, repo/'snapshots'/commit)
    (repo/'refs').mkdir(); (repo/'refs/main').write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    for revision in (None, commit):
        got = load_encoder('hf-hub:owner/name', revision=revision)
        assert torch.equal(got.encode_text(texts).pooled, source.encode_text(texts).pooled)
    with pytest.raises(ConnectionError, match='owner/other'): load_encoder('hf-hub:owner/other')
    with pytest.raises(ConnectionError, match='BiomedCLIP'): load_encoder('biomedclip')

def test_padding_and_batching(enc):
    many = enc.encode_text(texts, cache=False)
    for i,t in enumerate(texts):
        one = enc.encode_text([t], cache=False)
        assert torch.allclose(one.tokens[0], many.tokens[i][many.mask[i]], atol=1e-5)
        assert torch.allclose(one.pooled[0], many.pooled[i], atol=1e-5)
    assert torch.allclose(enc.encode_text(texts).pooled, many.pooled, atol=1e-5)

def test_wider_padding_changes_nothing(enc):
    ids, mask = enc.tokenize(texts)
    wide = enc.forward_text(*(torch.nn.functional.pad(o, (0, 30)) for o in (ids, mask)))
    assert torch.allclose(wide.tokens[:, :ids.shape[1]], enc.forward_text(ids, mask).tokens, atol=1e-5)

@pytest.mark.parametrize('kwargs', [dict(), dict(foreach=True), dict(fused=True)])
def test_cache_follows_training(enc, kwargs):
    before = enc.encode_text(texts)
    enc.train()
    opt = torch.optim.AdamW(enc.parameters(), lr=.1, **kwargs)
    enc.encode_text(texts).tokens.pow(2)[..., 0].sum().backward(); opt.step(); enc.eval()
    after = enc.encode_text(texts)
    assert not torch.allclose(before.pooled, after.pooled)
    assert torch.allclose(after.pooled, enc.encode_text(texts, cache=False).pooled, atol=1e-5)

def test_encoder_is_picklable(enc):
    enc.encode_text(texts)
    again = pickle.loads(pickle.dumps(enc))
    assert not again._cache and torch.equal(again.encode_text(texts).pooled, enc.encode_text(texts).pooled)

def test_pad_cat_keeps_rows():
    parts = [TextFeatures(torch.rand(2, n, 3), torch.ones(2, n, dtype=torch.bool), torch.rand(2, 4)) for n in (1, 4, 2)]
    f = TextFeatures.pad_cat(parts)
    assert f.mask.sum(1).tolist() == [1, 1, 4, 4, 2, 2] and torch.equal(f[4:].tokens[:, :2], parts[2].tokens)

@pytest.mark.skipif(not shared.is_dir(), reason='shared tokenizers are not here')
@pytest.mark.parametrize('file', ['biomedclip/vocab.txt', 'biomedclip/tokenizer.json', 'cxr_bert_specialized/vocab.txt'])
def test_recorded_tokens(file):
    tok, examples = read_tokenizer(shared/file), json.loads((shared/'tokenization_examples.json').read_text())
    key = next(k for k in examples if k in file or file.split('/')[0].startswith(k))
    assert examples[key]
    for o in examples[key]:
        e = tok.encode(o['text'])
        assert e.ids == o['ids'] and e.tokens == o['tokens']

@pytest.mark.skipif(not shared.is_dir(), reason='shared tokenizers are not here')
def test_released_config_is_understood(tmp_path):
    from medseg_nb.clip.biomedclip import _biomedclip_args, biomedclip_config
    assert _biomedclip_args(shared/'biomedclip/open_clip_config.json') == biomedclip_config()
