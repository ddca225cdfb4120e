"The language model behind the prompts: servers that misbehave, secrets, the memory on disk, models of transformers."
import json, os, threading, time, warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
import medseg_nb.clip.llm as llm
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.clip.llm import ChatEndpoint, LocalLLM, PromptGenerator
from medseg_nb.clip.prompts import check_prompts, ensemble_features, expand_prompts, prompt_fault, side
from medseg_nb.core import seeded

key = 'sk-very-s3cret'
said = ['left lung', 'the aerated left lung', 'lung field on the left', 'right lung', 'left lung\x00 \x1b[31mapex']

def envelope(content): return json.dumps(dict(choices=[dict(message=dict(content=content))])).encode()

class Handler(BaseHTTPRequestHandler):
    "Behaves as the model's name says."
    def log_message(self, *args): pass
    def do_POST(self):
        got = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.seen.append((self.path, got, self.headers['Authorization']))
        try: getattr(self, got['model'])()
        except OSError: self.server.cut.set()
    def drip(self, data):
        while not self.server.over.wait(.02): self.wfile.write(data); self.wfile.flush()
    def send(self, body, code=200):
        self.send_response(code); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body)
    def good(self): self.send(envelope(json.dumps(said)))
    def parts(self): self.send(envelope([dict(type='text', text='- left lung\n'), dict(type='text', text='- the left lung')]))
    def stall(self): self.server.over.wait(20)
    def half(self):
        self.send_response(200); self.send_header('Content-Length', '5000'); self.end_headers()
        self.wfile.write(envelope(json.dumps(said))[:30]); self.wfile.flush(); self.server.over.wait(20)
    def drip_body(self): self.send_response(200); self.end_headers(); self.drip(b' ')
    def drip_head(self): self.wfile.write(b'HTTP/1.1 200 OK\r\nX-Long: '); self.drip(b'x')
    def drip_error(self): self.send_response(500); self.end_headers(); self.drip(b' ')
    def error(self): self.send(f'wrong key {key}'.encode(), 500)
    def html(self): self.send(b'<html>hello</html>')
    def binary(self): self.send(bytes(range(256)))
    def shape(self): self.send(b'{"answer": ["left lung"]}')
    def silent(self): self.send(envelope('  '))
    def long(self): self.send(envelope('left lung ' * 5000))
    def nested(self): self.send(b'[' * 30_000)
    def useless(self): self.send(envelope('I am sorry, I can not help with that.'))
    def close(self): self.connection.close()
    def moved(self): self.send_response(302); self.send_header('Location', self.server.url + '/elsewhere'); self.end_headers()

@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.seen, s.over, s.cut, s.daemon_threads = [], threading.Event(), threading.Event(), True
    s.url = f'http://127.0.0.1:{s.server_port}/v1'
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    yield s
    s.over.set(); s.shutdown(); s.server_close()

failures = dict(stall='no whole answer within 0.3 s', half='no whole answer within 0.3 s', drip_body='no whole answer within 0.3 s',
                drip_head='no whole answer within 0.3 s', drip_error='no whole answer within 0.3 s', error='500 Internal Server Error',
                html='not JSON', binary='not JSON', shape='choices', silent='empty', long='longer than 32768 bytes', nested='nested too deeply',
                useless='none of its 1 sentences can be used', close='ConnectionError', moved='302')

@pytest.mark.parametrize('mode', failures)
def test_failure_is_named_and_templates_stand_in(server, tmp_path, mode):
    ask, start = PromptGenerator(server.url, mode, api_key=key, cache=tmp_path, timeout=.3), time.monotonic()
    with pytest.warns(UserWarning, match='are the offline templates') as w: found = ask('left lung', 'chest x-ray', n=5)
    assert time.monotonic() - start < 3
    assert found.source == 'templates' and found.prompts == expand_prompts('left lung', 'chest x-ray', n=5)
    assert len(w) == 1 and failures[mode] in str(w[0].message) and failures[mode] in found.problem
    assert w[0].filename == __file__
    assert key not in str(w[0].message) + repr(found) + found._repr_html_()
    assert list(tmp_path.iterdir()) == [] and len(server.seen) == 1
    if mode.startswith('drip'): assert server.cut.wait(5), 'the connection is still open'

def test_failure_is_not_remembered(server, tmp_path):
    ask = lambda mode: PromptGenerator(ChatEndpoint(server.url, mode), name='x', cache=tmp_path)('left lung', n=3)
    with pytest.warns(UserWarning): assert ask('error').source == 'templates'
    assert ask('good').source == 'llm' and ask('good').source == 'cache'

def test_good_answer_is_checked(server, tmp_path):
    found = PromptGenerator(server.url, 'good', cache=tmp_path)('left lung', 'chest x-ray', n=5)
    assert found.source == 'llm' and found.problem is None
    assert found.prompts == said[:3] + ['left lung apex'] and found.rejected == [('right lung', 'says right, the target left')]
    assert PromptGenerator(server.url, 'parts', cache=None)('left lung').prompts == ['left lung', 'the left lung']
    path, got, auth = server.seen[0]
    assert path == '/v1/chat/completions' and got['model'] == 'good' and auth is None and '"left lung"' in got['messages'][0]['content']

def test_answer_is_remembered(server, tmp_path):
    ask = lambda *a, model='good', **kw: PromptGenerator(server.url, model, cache=tmp_path)(*a, **kw)
    first, again = ask('left lung', n=5), ask('left lung', n=5)
    assert (first.source, again.source, len(server.seen)) == ('llm', 'cache', 1)
    assert (first.prompts, first.rejected) == (again.prompts, again.rejected)
    for i,call in enumerate([lambda: ask('left lung', n=4), lambda: ask('left lung', 'CT', n=5), lambda: ask('left lung', n=5, model='parts'),
                             lambda: ask('left lung', n=5, synonyms=['left side']), lambda: ask('left lung', n=5, refresh=True)]):
        assert call().source == 'llm' and len(server.seen) == i+2
    assert ask('left lung', n=5).source == 'cache'

@pytest.mark.parametrize('text', ['', '{', '[]', '{"answer": 3}', '{"answer": "right lung"}', '\x00', '{"answer": ""}'])
def test_damaged_memory_is_asked_again(server, tmp_path, text):
    ask = PromptGenerator(server.url, 'good', cache=tmp_path)
    ask('left lung')
    for p in tmp_path.iterdir(): p.write_text(text)
    assert ask('left lung').source == 'llm' and ask('left lung').source == 'cache'

def test_folder_that_can_not_be_written(server, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.warns(UserWarning, match='could not be kept') as w: found = PromptGenerator(server.url, 'good', cache=tmp_path/'file')('left lung')
    assert found.source == 'llm' and w[0].filename == __file__

def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert PromptGenerator(lambda t: 'polyp', name='a')('polyp').source == 'llm'
    assert PromptGenerator(lambda t: 1/0, name='a')('polyp').source == 'cache'
    assert [p.suffix for p in (tmp_path/'medseg_nb/prompts').iterdir()] == ['.json']

def test_nameless_callable_is_not_remembered(tmp_path):
    ask = PromptGenerator(lambda t: 'polyp', cache=tmp_path)
    assert [ask('polyp').source for _ in range(2)] == ['llm']*2 and not list(tmp_path.iterdir())

def test_key_stays_secret(server, tmp_path, monkeypatch):
    monkeypatch.setenv('MEDSEG_LLM_KEY', key + '\n'); monkeypatch.setenv('OPENAI_API_KEY', 'another')
    ask = PromptGenerator(server.url, 'good', cache=tmp_path)
    found = ask('left lung')
    assert server.seen[0][2] == f'Bearer {key}'
    kept = ''.join(p.read_text() for p in tmp_path.iterdir())
    assert 'left lung' in kept and key not in kept + repr(ask) + repr(found) + ask.backend.id + str(ask.id)
    with pytest.warns(UserWarning, match=r'wrong key \*\*\*'): PromptGenerator(server.url, 'error', cache=None)('left lung')
    with pytest.warns(UserWarning): PromptGenerator(server.url, 'moved', cache=None)('left lung')
    assert [o[0] for o in server.seen] == ['/v1/chat/completions']*3

def test_no_proxy_to_this_machine(server, monkeypatch):
    for n in ('http_proxy', 'HTTP_PROXY', 'all_proxy'): monkeypatch.setenv(n, 'http://127.0.0.1:1')
    for n in ('no_proxy', 'NO_PROXY'): monkeypatch.delenv(n, raising=False)
    assert PromptGenerator(server.url, 'good', cache=None)('left lung').source == 'llm'

def test_nobody_listens(tmp_path):
    with pytest.warns(UserWarning, match='refused'): found = PromptGenerator('http://127.0.0.1:1/v1', 'm', cache=tmp_path)('polyp', n=2)
    assert len(found) == 2

def hang(text): time.sleep(30)
def fail(text): raise RuntimeError('out of\n\x1b[31mmemory')
callables = [(hang, 'no whole answer within 0.2 s'), (fail, 'RuntimeError: out of'), (lambda t: None, 'NoneType'), (lambda t: b'polyp', 'bytes'),
             (lambda t: '', 'none of its 0 sentences'), (lambda t: 'polyp '*9000, 'longer than'), (lambda t: '['*30_000, 'none of its 1'),
             (lambda t: 'no polyp\n'*3000, 'none of its 200')]

@pytest.mark.parametrize('f,why', callables, ids=[w for _,w in callables])
def test_callable_that_fails(f, why):
    start = time.monotonic()
    with pytest.warns(UserWarning, match=why): found = PromptGenerator(f, cache=None, timeout=.2 if f is hang else 20)('polyp', n=3)
    assert found.prompts == expand_prompts('polyp', n=3) and time.monotonic() - start < 8

def test_no_warning_without_a_model():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert PromptGenerator()('polyp', 'endoscopy', n=4).source == 'templates'
        assert PromptGenerator(lambda t: '["polyp", "\\ud800 colon polyp"]', name='s', cache=None)('polyp').prompts == ['polyp', 'colon polyp']

def tiny_tokenizer():
    chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i,c in enumerate(['<end>', *chars])}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<end>')

@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    torch.set_num_threads(1)
    folder, tok = tmp_path_factory.mktemp('llama'), tiny_tokenizer()
    with seeded(0): net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                       num_attention_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0))
    net.save_pretrained(folder); tok.save_pretrained(folder)
    return folder, net, tok

def test_local_model_of_noise(llama, tmp_path):
    folder, net, tok = llama
    backend = LocalLLM(folder, device='cpu', max_new_tokens=12)
    with pytest.warns(UserWarning, match="because 'llama.*' on this machine failed: ValueError: none of its"):
        found = PromptGenerator(backend, cache=tmp_path)('left lung', n=3)
    assert found.source == 'templates' and not list(tmp_path.iterdir())
    text = llm.instruct('left lung', n=3)
    want = net.generate(**{k: v for k,v in tok(text + '\n', return_tensors='pt').items() if k != 'token_type_ids'}, max_new_tokens=12, do_sample=False)
    assert backend(text) == LocalLLM(net, tok, max_new_tokens=12)(text) == tok.decode(want[0, len(tok(text + '\n').input_ids):], skip_special_tokens=True)

def test_local_model_is_loaded_late_and_remembered(llama, tmp_path, monkeypatch):
    folder = llama[0]
    monkeypatch.setattr(LocalLLM, '__call__', lambda self, text, seconds: 'polyp\ncolon polyp')
    assert PromptGenerator(folder, cache=tmp_path)('polyp').source == 'llm'
    monkeypatch.setattr(LocalLLM, 'ready', lambda self: 1/0)
    assert PromptGenerator(str(folder), cache=tmp_path)('polyp').source == 'cache'
    os.utime(folder/'config.json', (1, 1))
    with pytest.warns(UserWarning, match='ZeroDivisionError'): assert PromptGenerator(folder, cache=tmp_path)('polyp').source == 'templates'

def test_chat_format():
    chat = tiny_tokenizer()
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} [bot]{% endif %}"
    ids = llm._encode(chat, 'hello', 'cpu')['input_ids'][0]
    assert chat.decode(ids) == '[user] hello [bot]'

def test_local_model_stops_in_time(llama, monkeypatch):
    _, net, tok = llama
    monkeypatch.setattr(net.generation_config, 'eos_token_id', None)
    start = time.monotonic()
    with pytest.warns(UserWarning, match='no whole answer within 0.05 s'):
        PromptGenerator(LocalLLM(net, tok, max_new_tokens=10_000), cache=None, timeout=.05)('polyp', n=2)
    assert time.monotonic() - start < 5

def test_local_model_that_can_not_be_read(tmp_path, monkeypatch):
    (tmp_path/'config.json').write_text('{}')
    with pytest.warns(UserWarning, match='could not load the language model'): PromptGenerator(tmp_path, cache=None)('polyp', n=2)
    def offline(*args, **kwargs): raise OSError('no connection\nand a long story')
    monkeypatch.setattr(llm.AutoTokenizer, 'from_pretrained', offline)
    with pytest.warns(UserWarning, match="language model 'owner/name': no connection and a long"): PromptGenerator('hf-hub:owner/name', cache=None)('polyp', n=2)

@pytest.mark.parametrize('target,other', [('left lung', 'right'), ('right kidney', 'left'), ('Left atrium of the heart', 'right')])
def test_other_side_is_never_accepted(target, other):
    texts = [f'{target}, {other}', f'{other} one, not the {target}', target.lower().replace(side(target), other), f'{other.upper()}-sided {target}',
             f'{target} on the {other}most side', target.lower().replace(side(target), '')]
    assert check_prompts(texts, target)[0] == []
    assert all(side(t) == side(target) for t in expand_prompts(target, 'CT', n=None))

def test_length_follows_the_target():
    long = ' '.join(['segment'] * 20)
    assert PromptGenerator(lambda t: f'the {long}', cache=None)(long).prompts == [f'the {long}']
    assert 'words' in prompt_fault(long, long)

def test_ensemble_keeps_type_and_order():
    enc = load_encoder('tiny')
    lists = [['heart', 'the heart'], ['polyp']]
    a, b = ensemble_features(enc, lists), ensemble_features(enc.double(), lists[::-1])
    assert a.dtype == torch.float32 and b.dtype == torch.float64 and torch.allclose(a.double(), b.flip(0), atol=1e-5)
