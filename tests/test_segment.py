"The segmenter around FMISeg: what must hold for any weights, and what it says when something is wrong."
import json, shutil, warnings
from unittest import mock
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from medseg_nb import segment as module
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.core import MedImage, ImageMeta, seeded
from medseg_nb.fmiseg.learner import PromptedFMISeg
from medseg_nb.fmiseg.model import FMISeg, TINY
from medseg_nb.modes import PriorSegmenter, ZeroShotSegmenter, load_mode
from medseg_nb.clip.saliency import encoder_fingerprint
from medseg_nb.segment import FMISegSegmenter, check_segmenter, list_segmenters, load_segmenter, register_segmenter

@pytest.fixture(scope='module')
def model():
    torch.set_num_threads(1)
    with seeded(0): return PromptedFMISeg(FMISeg(**TINY), load_encoder('tiny', pretrained=False), train_text=True).eval()

@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    f = tmp_path_factory.mktemp('model')
    model.save_pretrained(f, size=64, threshold=.3, half=False)
    return f

@pytest.fixture
def segment(model): return FMISegSegmenter(model, size=64, device='cpu')

def images(*sizes):
    g = torch.Generator().manual_seed(1)
    return [torch.rand(3, *s, generator=g) for s in sizes]

def close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)

@pytest.mark.parametrize('bs,max_maps', [(1, 1), (2, 3), (3, 16), (8, 1)])
def test_batches_do_not_change_the_answer(model, segment, bs, max_maps):
    xs, prompts = images((64, 64), (50, 91), (131, 20)), [['left lung'], ['optic disc', 'cell nuclei', 'the retinal vessels of this eye'], ['polyp', 'glioma']]
    got = FMISegSegmenter(model, size=64, bs=bs, max_maps=max_maps, device='cpu')(xs, prompts)
    for x,ps,s in zip(xs, prompts, got):
        assert s.prob.shape == (len(ps), *x.shape[1:]) and s.prompts == ps
        for k,p in enumerate(ps):
            one, = segment(x, p)
            close(one.prob[0], s.prob[k]); close(one.score[0], s.score[k])

def test_one_prompt_twice(segment):
    s, = segment(images((40, 40))[0], ['left lung', 'left lung'])
    assert s.prob.shape[0] == 2 and s.prob[0].equal(s.prob[1])

def test_meta_and_pixels_are_kept(segment):
    im = MedImage(images((33, 47))[0], ImageMeta(path='a.png', spacing=(.2, .3)))
    s, = check_segmenter(segment, im, 'left lung')
    assert s.meta is im.meta and s.image is im.x

def test_maps_can_be_training_targets(segment):
    for size in ((64, 64), (40, 50)):
        s, = segment(images(size)[0], 'left lung')
        z = torch.zeros_like(s.prob, requires_grad=True)
        torch.nn.functional.binary_cross_entropy_with_logits(z, s.prob).backward()
        s.prob.mul_(s.score[:, None, None])

@pytest.mark.parametrize('o', [np.zeros((40, 50), np.uint8), np.zeros((40, 50, 3), np.uint16), torch.zeros(3, 40, 50), torch.zeros(1, 3, 40, 50)])
def test_forms_of_an_image(segment, o): assert segment(o, 'left lung')[0].prob.shape == (1, 40, 50)

def test_boxes_are_refused(segment):
    with pytest.raises(ValueError, match='takes no boxes'): segment(images((40, 40)), 'left lung', boxes=[(0, 0, 1, 1)])

def test_long_prompt_is_cut_with_one_warning(segment):
    text, x = 'left lung of the patient ' * 2000, images((40, 40))[0]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        s, = segment(x, text); segment(x, text)
    assert len(told) == 1 and "prompt 'left lung of the patient" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        short, = segment(x, segment.text(s.prompts[0]))
    close(s.prob, short.prob)

@pytest.mark.parametrize('bad,match', [('', 'empty prompt'), (['left lung', ' '], 'empty prompt'), ('?!', 'holds no word'), ([], 'no prompt'), ([3], 'lists of prompts|string|iterable')])
def test_bad_prompts(segment, bad, match):
    with pytest.raises((ValueError, TypeError), match=match): segment(images((40, 40)), bad)

def test_unknown_name_suggests():
    with pytest.raises(ValueError, match="unknown model 'tin'. Did you mean 'tiny'"): load_segmenter('tin')
    assert 'tiny' in list_segmenters()

def test_folder_is_read_with_its_config(folder, segment):
    again, x = load_segmenter(folder, device='cpu'), images((40, 40))[0]
    assert again.size == 64 and again.threshold == .3 and again(x, 'polyp')[0].threshold == .3
    close(again(x, 'polyp')[0].prob, segment(x, 'polyp')[0].prob)
    assert load_segmenter(str(folder), device='cpu', threshold=.7).threshold == .7

def test_class_decides_who_builds(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(cls='Nothing', level=7)))
    with pytest.raises(ValueError, match="unknown class of model 'Nothing'"): load_segmenter(tmp_path)
    with mock.patch.dict(module._builders):
        register_segmenter('Nothing')(lambda folder, config, device=None, **kw: (config['level'], kw))
        assert load_segmenter(tmp_path, gate=True) == (7, dict(gate=True))

@pytest.mark.parametrize('change,match', [
    (lambda s: s.pop('net.heads.lf.out.bias'), '1 missing: heads.lf.out.bias'),
    (lambda s: s.update({'net.more': torch.zeros(1)}), '1 unexpected: more'),
    (lambda s: s.update({'net.heads.lf.out.bias': torch.zeros(2)}), r'heads.lf.out.bias \(2,\) for \(1,\)')])
def test_keys_that_do_not_fit_are_named(folder, tmp_path, change, match):
    state = load_file(folder/'model.safetensors')
    change(state)
    save_file(state, tmp_path/'model.safetensors'); shutil.copy(folder/'config.json', tmp_path)
    with pytest.raises(ValueError, match=match): load_segmenter(tmp_path, device='cpu')

@pytest.mark.parametrize('text,match', [(None, 'no config.json'), ('{', 'is not JSON'), ('[]', "lacks 'cls'"), ('{"cls": "FMISeg"}', 'lacks args, encoder, size')])
def test_broken_config(tmp_path, text, match):
    if text is not None: (tmp_path/'config.json').write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=match): load_segmenter(tmp_path)

def test_weights_that_are_missing(folder, tmp_path):
    shutil.copy(folder/'config.json', tmp_path)
    with pytest.raises(FileNotFoundError, match='no model.safetensors'): load_segmenter(tmp_path)

def test_hub_without_network():
    with mock.patch('huggingface_hub.snapshot_download', side_effect=OSError('offline')) as f:
        with pytest.raises(ConnectionError, match="could not download 'me/model'"): load_segmenter('hf-hub:me/model', revision='abc')
    assert f.call_args.kwargs['revision'] == 'abc'

@pytest.fixture(scope='module')
def eye(): return load_encoder('tiny')

@pytest.fixture(scope='module')
def mapped(tmp_path_factory, eye):
    "A folder with a model that takes maps, as `train_prior` writes it."
    f = tmp_path_factory.mktemp('mapped')
    with seeded(0): m = PromptedFMISeg(FMISeg(**TINY, prior='gate'), load_encoder('tiny', pretrained=False), train_text=True)
    m.save_pretrained(f, size=64, half=False, prior=dict(encoder='tiny', fingerprint=encoder_fingerprint(eye), method='gradient', settings=dict(layer=1)))
    return f

def test_prior_mode_reads_its_config(mapped, eye):
    segment, xs = load_mode(mapped, 'prior', device='cpu'), images((64, 64), (50, 91))
    assert isinstance(segment, PriorSegmenter) and (segment.method, segment.settings) == ('gradient', dict(size=224, layer=1))
    prompts = [['left lung', 'the left lung', 'polyp'], ['optic disc']]
    got = check_segmenter(segment, xs, prompts)
    few = PriorSegmenter(segment.model, eye, size=64, bs=1, max_maps=1, device='cpu')(xs, prompts)
    for a,b in zip(got, few): torch.testing.assert_close(a.prob, b.prob, atol=1e-4, rtol=0)
    for one in (load_mode(mapped, 'prior', 'tiny', device='cpu'), load_mode(mapped, 'prior', eye, device='cpu')): assert one.eye.image_size == 224

def test_map_changes_the_answer(mapped, eye):
    segment, x = load_mode(mapped, 'prior', device='cpu'), images((64, 64))[0]
    assert (segment(x, 'polyp')[0].prob - PriorSegmenter(segment.model, eye, 'nib', {}, size=64, device='cpu')(x, 'polyp')[0].prob).abs().max() > 1e-5

def test_zero_shot_keeps_the_contract(eye):
    segment = ZeroShotSegmenter(eye, method='gradient', size=64, device='cpu')
    xs = images((64, 64), (50, 131), (9, 7))
    for s,x in zip(check_segmenter(segment, xs, [['left lung'], ['optic disc', 'polyp'], ['polyp']]), xs): assert s.score is None and s.image.equal(x)
    assert segment(np.zeros((40, 50), np.uint8), 'left lung')[0].prob.shape == (1, 40, 50)
    for bad,match in (('', 'empty prompt'), ('?!', 'holds no word'), ([], 'no prompt')):
        with pytest.raises(ValueError, match=match): segment(xs[:1], bad)
    with pytest.raises(ValueError, match='takes no boxes'): segment(xs[:1], 'polyp', boxes=[(0, 0, 1, 1)])

@pytest.mark.parametrize('kw,match', [
    (dict(mode='zero-shot'), "unknown mode 'zero-shot'. Did you mean 'zeroshot'"), (dict(mode=''), 'unknown mode'),
    (dict(mode='prior'), 'train one with'), (dict(mode='zeroshot', name='tinny'), "unknown encoder 'tinny'. Did you mean 'tiny'"),
    (dict(name='tinny'), "unknown model 'tinny'"), (dict(name='tinny', mode='prior'), "unknown model 'tinny'"), (dict(name='no/such', mode='zeroshot'), 'no folder'),
    (dict(encoder='tiny'), "mode 'text' makes no maps"), (dict(mode='zeroshot', encoder='tiny'), 'the model is the encoder'),
    (dict(mode='zeroshot', threshold=2), 'threshold'), (dict(mode='zeroshot', method='m2bi'), "Did you mean 'm2ib'"), (dict(mode='zeroshot', size=8), 'at least 32')])
def test_modes_refuse(kw, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match): load_mode(**kw, device='cpu')

def test_modes_refuse_what_does_not_fit(folder, mapped, eye):
    with pytest.raises(ValueError, match='class FMISeg, which has no image tower'): load_mode(folder, 'zeroshot')
    with pytest.raises(ValueError, match='train one with'): load_mode(folder, 'prior')
    with pytest.raises(ValueError, match='has none'): ZeroShotSegmenter(eye.text)
    with pytest.raises(ValueError, match='this encoder has other weights'): load_mode(mapped, 'prior', load_encoder('tiny', pretrained=False))
    with pytest.warns(UserWarning, match="mode 'prior' makes them"): load_mode(mapped, device='cpu')
