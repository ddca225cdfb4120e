"SAM, SAM 2 and MedSAM: what no lesson shows, bad folders, odd images, queries of different kinds, chunks."
import json, os, pickle
from unittest import mock
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel, SamModel
from transformers.utils import logging
from medseg_nb.core import seeded
from medseg_nb.regions import PAD
from medseg_nb.sam import pretrained as module
from medseg_nb.sam.pretrained import MedSamProposer, Sam2Proposer, SamProposer, list_proposers, load_proposer
from medseg_nb.sam.pretrained import map_boxes, map_points, map_prompt, medsam_pixels, model_frame, sam2_pixels, sam_pixels, unmap_masks
from medseg_nb.sam.proposers import RandomWalkerProposer, check_proposer

logging.disable_progress_bar()
classes = [SamProposer, Sam2Proposer, MedSamProposer]
per_class = pytest.mark.parametrize('cls', classes)
width = dict(hidden_size=32, mlp_dim=64)
decoder = dict(**width, num_attention_heads=2, iou_head_hidden_dim=32)
rest = dict(prompt_encoder_config=dict(hidden_size=32, image_size=64), mask_decoder_config=decoder)
vit = dict(**width, num_hidden_layers=1, num_attention_heads=2, image_size=64, output_channels=32, window_size=2,
           global_attn_indexes=[0], num_pos_feats=16)
hiera = dict(model_type='sam2_hiera_det_model', hidden_size=8, image_size=[64, 64], blocks_per_stage=[1]*4,
             embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1]*4, window_size_per_stage=[2]*4,
             global_attention_blocks=[], window_positional_embedding_background_size=[2, 2])
neck = dict(backbone_config=hiera, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]])
vision = {SamModel: vit, Sam2Model: neck}

def build(cls, seed=0):
    torch.set_num_threads(1)
    with seeded(seed), torch.no_grad():
        model = cls(cls.config_class(vision_config=vision[cls], **rest))
        for n,p in model.named_parameters():
            if p.ndim > 1: p.normal_(0, 1 if 'token' in n or 'embed' in n and 'patch' not in n else 1.5*p[0].numel()**-.5)
    return model

@pytest.fixture(scope='module')
def models(): return {c: build(c) for c in (SamModel, Sam2Model)}

@pytest.fixture(scope='module')
def saved(models, tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    for c,n in ((SamModel, 'sam'), (Sam2Model, 'sam2')): models[c].save_pretrained(root/n)
    return root

@pytest.fixture
def folder(saved, tmp_path):
    "A SAM's folder that may be broken."
    for f in (saved/'sam').iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    return tmp_path

def proposer(models, cls, **kwargs): return cls(models[cls.model_class], device='cpu', **kwargs)
def rand(*shape, seed=0): return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
def boxes_in(n, h, w, seed=0):
    a, b = (rand(n, 2, seed=seed+i)*torch.tensor([w-1., h-1]) for i in (1, 2))
    return torch.cat((a.minimum(b), a.maximum(b)), 1)
def close(a, b, tol=1e-3): torch.testing.assert_close(a, b, atol=tol, rtol=0)

@per_class
@pytest.mark.parametrize('size', [(2, 2), (5, 300), (200, 31), (64, 64)])
def test_contract_on_odd_sizes(models, cls, size): check_proposer(proposer(models, cls), rand(3, *size))

@per_class
@pytest.mark.parametrize('chunk', [1, 3, 7, 100])
def test_chunks_do_not_change_the_answer(models, cls, chunk):
    x, boxes = rand(3, 50, 70), boxes_in(7, 50, 70)
    want = proposer(models, cls).set_image(x).masks(boxes=boxes)
    seen = []
    hook = models[cls.model_class].mask_decoder.register_forward_hook(lambda m, a, o: seen.append(len(o[0])))
    got = proposer(models, cls, chunk=chunk).set_image(x).masks(boxes=boxes)
    hook.remove()
    close(got.prob, want.prob); close(got.score, want.score)
    assert max(seen) <= chunk and sum(seen) == 7

@pytest.mark.parametrize('cls', classes[:2])
def test_queries_of_different_numbers_of_points(models, cls):
    "Alone or among others, with padding before, between and behind: the same answer, in the order of the queries."
    p = proposer(models, cls, chunk=2).set_image(rand(3, 50, 70))
    points = rand(6, 4, 2)*torch.tensor([69., 49])
    labels = torch.tensor([[1, PAD, PAD, PAD], [PAD, 1, PAD, 0], [1, 1, 0, 0], [PAD, PAD, PAD, 1], [1, 0, 1, PAD], [1, 1, PAD, PAD]])
    got = p.masks(points=points, labels=labels)
    for i,(o, t) in enumerate(zip(points, labels)):
        alone = p.masks(points=o[t != PAD][None], labels=t[t != PAD][None])
        close(alone.prob[0], got.prob[i]); close(alone.score[0], got.score[i])
    assert (got.prob[0] - got.prob[3]).abs().max() > 1e-3

@pytest.mark.parametrize('cls', classes[:2])
def test_every_mix_of_prompts(models, cls):
    p = proposer(models, cls).set_image(rand(3, 50, 70))
    points, boxes, rough = rand(4, 1, 2)*40, boxes_in(4, 50, 70), rand(4, 9, 11)*8 - 4
    labels = torch.tensor([[1], [PAD], [1], [PAD]])
    some = dict(points=points, labels=labels, boxes=boxes)
    kinds = dict(points=dict(points=points), boxes=dict(boxes=boxes), mask=dict(mask_prompt=rough), points_boxes=some,
                 boxes_mask=dict(boxes=boxes, mask_prompt=rough), all=dict(some, mask_prompt=rough))
    made = {n: p.masks(**kw) for n,kw in kinds.items()}
    for n,o in made.items():
        assert o.prob.shape == (4, 3, 50, 70) and o.prob.isfinite().all(), n
        for i in range(4): close(p.masks(**{k: v[i:i+1] for k,v in kinds[n].items()}).prob[0], o.prob[i])
    close(made['points_boxes'].prob[1], made['boxes'].prob[1])
    assert (made['points_boxes'].prob[0] - made['boxes'].prob[0]).abs().max() > 1e-3
    assert (made['boxes_mask'].prob - made['boxes'].prob).abs().max() > 1e-3

def test_sam2_single_mask_falls_back_where_it_is_unstable(models):
    "Token 0, or where its area changes by more than 2% between two cuts, the best of the others: by transformers' own outputs."
    p = proposer(models, Sam2Proposer).set_image(rand(3, 50, 70))
    f, emb = p._state
    boxes = boxes_in(12, 50, 70)
    ask = dict(image_embeddings=[e.expand(12, -1, -1, -1) for e in emb], input_boxes=map_boxes(boxes, f)[:, None])
    decoder = models[Sam2Model].mask_decoder
    with torch.no_grad():
        many = models[Sam2Model](**ask)
        with mock.patch.object(decoder, 'dynamic_multimask_via_stability', False): zero = models[Sam2Model](**ask, multimask_output=False)
    z = zero.pred_masks[:, 0, 0]
    inner, outer = ((z > s*.05).flatten(1).sum(1) for s in (1, -1))
    stable = inner >= .98*outer
    best = many.iou_scores[:, 0].argmax(1)
    want = torch.where(stable[:, None, None], z, many.pred_masks[:, 0][torch.arange(12), best])
    close(p.masks(boxes=boxes, multimask=False).prob[:, 0], unmap_masks(want[:, None], f, True)[:, 0].sigmoid())

def test_scores_fall(models):
    for cls in classes:
        o = proposer(models, cls).set_image(rand(3, 40, 40)).masks(boxes=boxes_in(9, 40, 40))
        assert (o.score.diff(dim=1) <= 0).all() and o.prob.shape[1] == (1 if cls is MedSamProposer else 3)

def test_half_precision_models_are_read_in_full(models, tmp_path):
    build(SamModel).half().save_pretrained(tmp_path)
    p = load_proposer(tmp_path, device='cpu').set_image(rand(3, 40, 50))
    assert {o.dtype for o in p.model.parameters()} == {torch.float32} and not p.model.training
    full = proposer(models, SamProposer).set_image(rand(3, 40, 50))
    assert (p.masks(boxes=[[3, 3, 30, 30]]).prob - full.masks(boxes=[[3, 3, 30, 30]]).prob).abs().mean() < .02

@pytest.mark.parametrize('cls', classes[:2])
def test_autocast_is_for_the_encoder(models, cls):
    "What `amp` does on CUDA, on the CPU: embeddings nearly the same, and the decoder in single precision."
    p, q = (proposer(models, cls) for _ in range(2))
    p._cast = lambda: torch.autocast('cpu', torch.bfloat16)
    a, b = (o.set_image(rand(3, 40, 50)).masks(boxes=boxes_in(3, 40, 50), mask_prompt=rand(3, 8, 8)) for o in (p, q))
    assert a.prob.dtype == torch.float32 and a.prob.isfinite().all() and not proposer(models, SamProposer, amp=True).amp
    for u,v in zip(*(o._state[1] if isinstance(o._state[1], list) else [o._state[1]] for o in (p, q))):
        assert u.dtype == torch.float32 and 0 < (u-v).norm()/v.norm() < .05

@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(2, 300), st.sampled_from([16, 64, 1024]), st.booleans(), st.integers(0, 99))
def test_boxes_and_points_stay_inside(h, w, side, square, seed):
    f = model_frame((h, w), side, square)
    boxes, points = boxes_in(8, h, w, seed), rand(8, 2, seed=seed)*torch.tensor([w-1., h-1])
    b, p, last = map_boxes(boxes, f), map_points(points, f), torch.tensor([f.inner[1], f.inner[0]]) - .5
    assert (b[:, :2] <= b[:, 2:] + 1e-3).all() and (b >= -.5 - 1e-3).all() and (b[:, 2:] <= last + 1e-3).all()
    assert (p >= -.5 - 1e-3).all() and (p <= last + 1e-3).all()
    assert max(f.inner) == side and min(f.inner) >= 1

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.sampled_from([sam_pixels, sam2_pixels, medsam_pixels]))
def test_pixels_of_any_size(h, w, fn):
    x = rand(3, h, w)
    y, f = fn(x, 64)
    assert y.shape == (3, 64, 64) and y.dtype == torch.float32 and y.isfinite().all() and f.size == (h, w)
    assert (fn is not medsam_pixels) or (y.min() == 0 and abs(y.max() - 1) < 1e-6)
    assert not (fn is sam_pixels) or not y[:, f.inner[0]:].any() and not y[:, :, f.inner[1]:].any()

@settings(max_examples=30, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.booleans())
def test_masks_go_there_and_back(h, w, square):
    f = model_frame((h, w), 256, square)
    y, x = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing='ij')
    m = ((x - .6*w)/w*8)**2 + ((y - .4*h)/h*8)**2
    back = unmap_masks(map_prompt((2-m)[None], f, 64), f, square)[0, 0]
    a, b = back > 0, m < 2
    assert 2*(a & b).sum()/(a.sum() + b.sum()) > .9

def test_kinds_of_a_folder(saved, tmp_path):
    assert [type(load_proposer(saved/n, device='cpu')) for n in ('sam', 'sam2')] == classes[:2]
    assert type(load_proposer(str(saved/'sam'), kind='medsam', device='cpu')) is MedSamProposer
    (tmp_path/'My-MedSAM').symlink_to(saved/'sam')
    assert type(load_proposer(tmp_path/'My-MedSAM', device='cpu')) is MedSamProposer
    assert type(load_proposer(tmp_path/'My-MedSAM', kind='sam', device='cpu')) is SamProposer
    with pytest.raises(ValueError, match="holds a 'sam2', which is no 'medsam': expected sam2"): load_proposer(saved/'sam2', kind='medsam')

def test_video_folder_holds_an_image_model(tmp_path):
    "The published SAM 2.1 folders are of the video model."
    memory = dict(memory_encoder_hidden_size=32, memory_encoder_output_channels=8, memory_fuser_embed_dim=32, mask_downsampler_embed_dim=32,
                  memory_fuser_intermediate_dim=32, memory_attention_hidden_size=32, memory_attention_feed_forward_hidden_size=32,
                  memory_attention_num_layers=1, memory_attention_rope_feat_sizes=[4, 4])
    with seeded(3): video = Sam2VideoModel(Sam2VideoConfig(vision_config=neck, **rest, image_size=64, **memory))
    video.save_pretrained(tmp_path)
    assert json.loads((tmp_path/'config.json').read_text())['model_type'] == 'sam2_video'
    p = load_proposer(tmp_path, device='cpu')
    assert type(p) is Sam2Proposer
    own, theirs = p.model.state_dict(), video.state_dict()
    assert len(own) < len(theirs) and all(own[k].equal(theirs[k]) for k in own)

def test_shards(models, tmp_path):
    models[SamModel].save_pretrained(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    p = load_proposer(tmp_path, device='cpu')
    assert all(v.equal(models[SamModel].state_dict()[k]) for k,v in p.model.state_dict().items())
    next(tmp_path.glob('*.safetensors')).unlink()
    with pytest.raises(ValueError, match='is no readable SamModel'): load_proposer(tmp_path, device='cpu')

def test_old_weights_file(models, folder):
    "Weights as torch.save wrote them, and never anything that runs."
    (folder/'model.safetensors').unlink()
    torch.save(models[SamModel].state_dict(), folder/'pytorch_model.bin')
    p = load_proposer(folder, device='cpu')
    assert all(v.equal(models[SamModel].state_dict()[k]) for k,v in p.model.state_dict().items())

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_pickles_do_not_run(folder):
    (folder/'model.safetensors').unlink()
    with open(folder/'pytorch_model.bin', 'wb') as f: pickle.dump(dict(a=Evil(str(folder/'run'))), f)
    with pytest.raises(ValueError, match='is no readable SamModel'): load_proposer(folder, device='cpu')
    assert not (folder/'run').exists()

@pytest.mark.parametrize('content', [b'', b'garbage', b'\0'*100])
def test_broken_weights(folder, content):
    (folder/'model.safetensors').write_bytes(content)
    with pytest.raises(ValueError, match='is no readable SamModel'): load_proposer(folder, device='cpu')

@pytest.mark.parametrize('content,error', [('{', 'is not a model'), ('[]', 'is not a model'), ('{}', "unknown model_type 'None'"),
                                           ('{"model_type": "sam3"}', "Did you mean 'sam'"),
                                           ('{"model_type": "sam2"}', 'does not fit Sam2Model')])
def test_broken_config(folder, content, error):
    if 'sam2' in content: content = json.dumps(dict(Sam2Config(vision_config=neck, **rest).to_dict()))
    (folder/'config.json').write_text(content)
    with pytest.raises(ValueError, match=error): load_proposer(folder, device='cpu')

def test_lacking_files(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match='no config.json'): load_proposer(tmp_path_factory.mktemp('empty'))
    (folder/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no weights in .*model.safetensors'): load_proposer(folder)
    (folder/'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='no config.json'): load_proposer(folder)
    (folder/'sam_vit_b.pth').write_bytes(b'x')
    with pytest.raises(ValueError, match='is a file: expected a folder'): load_proposer(folder/'sam_vit_b.pth')

def test_keys_are_named(folder):
    state = load_file(folder/'model.safetensors')
    def load(s):
        save_file(s, folder/'model.safetensors', metadata=dict(format='pt'))
        return load_proposer(folder, device='cpu')
    some = [k for k in state if k.startswith('vision_encoder.neck')]
    with pytest.raises(ValueError, match=f'{len(some)} missing: vision_encoder.neck.conv1.weight, .*, \\.\\.\\.'):
        load({k: v for k,v in state.items() if k not in some})
    with pytest.raises(ValueError, match=r'1 missing: mask_decoder.iou_token.weight; 1 unexpected: other.weight'):
        load({('other.weight' if k == 'mask_decoder.iou_token.weight' else k): v for k,v in state.items()})
    with pytest.raises(ValueError, match=r'1 misshaped: mask_decoder.iou_token.weight \(2, 32\) for \(1, 32\)'):
        load({**state, 'mask_decoder.iou_token.weight': torch.zeros(2, 32)})
    assert not logging.is_progress_bar_enabled()

def test_names():
    with pytest.raises(ValueError, match="Did you mean 'random-walker'"): load_proposer('random_walker')
    with pytest.raises(ValueError, match="Did you mean 'medsam'"): load_proposer('medsamm')
    with pytest.raises(FileNotFoundError, match='no folder'): load_proposer('models/none')
    with pytest.raises(ValueError, match='kind and revision are for models'): load_proposer('random-walker', kind='sam')
    assert load_proposer('random-walker', side=64).side == 64 and isinstance(load_proposer('random-walker'), RandomWalkerProposer)
    assert set(module._hub) < set(list_proposers())

def fake_hub(files, seen):
    def get(repo, revision=None, allow_patterns=None):
        seen.append((repo, revision, allow_patterns))
        return str(files)
    return mock.patch('huggingface_hub.snapshot_download', get)

def test_hub(saved):
    seen = []
    with fake_hub(saved/'sam', seen):
        assert type(load_proposer('sam', device='cpu')) is SamProposer
        assert type(load_proposer('medsam', device='cpu', revision='v1')) is MedSamProposer
        assert type(load_proposer('hf-hub:someone/medsam-b', device='cpu')) is MedSamProposer
        assert type(load_proposer('hf-hub:medsam/vit-b', device='cpu')) is SamProposer
        with pytest.raises(ValueError, match="holds a 'sam', which is no 'sam2'"): load_proposer('sam2', device='cpu')
    assert [s[:2] for s in seen[:3]] == [('facebook/sam-vit-base', None), ('wanglab/medsam-vit-base', 'v1'), ('someone/medsam-b', None)]
    assert all('config.json' in s[2] and not any(p.endswith(('.bin', '.pt', '.pth')) for p in s[2]) for s in seen)

def test_hub_without_safetensors(models, folder):
    (folder/'model.safetensors').unlink()
    torch.save(models[SamModel].state_dict(), folder/'pytorch_model.bin')
    seen = []
    with fake_hub(folder, seen): load_proposer('hf-hub:someone/old', device='cpu')
    assert len(seen) == 2 and 'pytorch_model*.bin' in seen[1][2]

@pytest.mark.parametrize('name,how', [('sam', "kind='sam'"), ('medsam', "kind='medsam'"),
                                      ('hf-hub:a/b', "load_proposer\\('<that folder>'\\)")])
def test_no_hub(name, how):
    with mock.patch('huggingface_hub.snapshot_download', side_effect=OSError('no network')):
        with pytest.raises(ConnectionError, match=f"could not download .*OSError.*into a folder.*{how}"): load_proposer(name)
