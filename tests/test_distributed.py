"Two processes on the CPU train what one does."
import json, os, subprocess, sys
import pytest
pytest.importorskip('accelerate', reason='needs accelerate: pip install "medseg_nb[distributed]"')

SCRIPT = '''
import json, sys, torch, medseg_nb
from functools import partial
import fastai.callback.progress
from fastai.optimizer import SGD
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.core import seeded
from medseg_nb.data import make_episodes, prompt_dls, read_index
from medseg_nb.fmiseg.learner import fmiseg_learner
from medseg_nb.fmiseg.model import FMISeg, TINY
from medseg_nb.training.distributed import distributed, first_process
torch.set_num_threads(1)
with seeded(0):
    df, enc = read_index(sys.argv[1]), load_encoder('tiny')
    dls = prompt_dls(make_episodes(df, n=8, flips=False), enc, size=64, bs=int(sys.argv[2]), augment=False, device='cpu')
    net = FMISeg(**TINY)
    learn = fmiseg_learner(dls, net, enc, ema=.9, lr=.02, wd=0.)
    learn.opt_func = SGD
    with learn.no_bar(), learn.no_logging(), distributed(learn): learn.fit(3)
weights = {k: v.double().sum().item() for k,v in learn.model.net.named_parameters()}
if first_process(): print(json.dumps(dict(values=[list(v)[1:] for v in learn.recorder.values], weights=weights)))
'''

def launch(processes, *args):
    many = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)] if processes > 1 else []
    env = {k: v for k,v in os.environ.items() if k not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')} | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
    r = subprocess.run([sys.executable, *many, *map(str, args)], capture_output=True, text=True, env=env, timeout=400)
    assert not r.returncode, r.stderr[-3000:]
    return r.stdout

@pytest.fixture(scope='module')
def chests(tmp_path_factory):
    from medseg_nb.phantoms import make_phantom_pack
    folder = tmp_path_factory.mktemp('chests')
    make_phantom_pack(folder, 16, kinds=['chest'], size=64, seed=0, splits=dict(train=.5, val=.5))
    return folder

def test_two_processes_learn_as_one(chests):
    (chests/'fit.py').write_text(SCRIPT)
    one, two = (json.loads(launch(n, chests/'fit.py', chests/'index.csv', 8//n).strip().splitlines()[-1]) for n in (1, 2))
    for a,b in zip(one['values'], two['values']): assert a == pytest.approx(b, abs=2e-4)
    assert one['weights'].keys() == two['weights'].keys()
    for k,v in one['weights'].items(): assert v == pytest.approx(two['weights'][k], abs=2e-3), k

def test_the_command_in_two_processes(chests):
    said = launch(2, '-m', 'medseg_nb.cli', 'train', 'fmiseg', '--index', chests/'index.csv', '--out', chests/'model', '--stage', '64,32,1e-3', '--bs', '4', '--device', 'cpu')
    assert said.count('the model is in') == 1 and said.count('epoch 1 of 1') == 1
    assert {p.name for p in (chests/'model').iterdir()} == {'config.json', 'history.csv', 'model.safetensors', 'report.json'}
    from medseg_nb.fmiseg.learner import PromptedFMISeg
    PromptedFMISeg.from_pretrained(chests/'model')
