"""Run lessons in place and clean them, so that their outputs are what the code gives now.

    python tools/lesson.py nbs/03_losses.ipynb ...          all cells but those flagged `cuda` where there is no GPU
    python tools/lesson.py --skip slow nbs/03_losses.ipynb  leave the outputs of slow cells as they are
"""
import json, os, re, subprocess, sys
from pathlib import Path

root, bin = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
quiet = dict(TQDM_DISABLE='1', HF_HUB_OFFLINE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', TOKENIZERS_PARALLELISM='false',
             PATH=os.pathsep.join([str(bin), os.environ.get('PATH', '')]))

def joined(v): return ''.join(v) if isinstance(v, list) and all(isinstance(o, str) for o in v) else v

def execute(path, skip):
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    held = {c.id: (c.source, c.outputs) for c in nb.cells if c.cell_type == 'code' and any(re.search(rf'^#\|\s*{s}\b', c.source, re.M) for s in skip)}
    for c in nb.cells:
        if c.id in held: c.source = 'pass'
    NotebookClient(nb, timeout=None, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for c in nb.cells:
        if c.id in held: c.source, c.outputs = held[c.id]
    nbformat.write(nb, path)

def tidy(path):
    "Sources and texts as single strings, as the repository keeps them."
    nb = json.loads(path.read_text(encoding='utf-8'))
    for c in nb['cells']:
        c['source'] = joined(c['source'])
        for o in c.get('outputs', []):
            if 'text' in o: o['text'] = joined(o['text'])
            if 'data' in o: o['data'] = {k: joined(v) for k,v in o['data'].items()}
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')

def main(*args):
    import torch
    args, skip = list(args), [] if torch.cuda.is_available() else ['cuda']
    while '--skip' in args: i = args.index('--skip'); skip.append(args[i+1]); del args[i:i+2]
    os.environ.update(quiet)
    for path in (Path(a).resolve() for a in args):
        execute(path, skip)
        subprocess.run([bin/'nbdev_clean', '--fname', path], cwd=root, check=True)
        tidy(path)
    subprocess.run([bin/'nbdev_export'], cwd=root, check=True)

if __name__ == '__main__': main(*sys.argv[1:])
