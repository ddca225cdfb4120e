"What `make test` runs. It goes on after a failure, and ends with 1 if anything failed."
import os, subprocess, sys, time
from pathlib import Path

root, bin = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
quiet = dict(MPLBACKEND='Agg', TQDM_DISABLE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false',
             PIP_NO_INPUT='1', PIP_DISABLE_PIP_VERSION_CHECK='1')

def flags():
    "Directives of the cells that this machine can run; `slow` is run by hand."
    import torch
    data = Path(os.environ.get('MEDSEG_DATA') or root.parent/'shared'/'data').is_dir()
    return ' '.join([f for f,on in dict(data=data, cuda=torch.cuda.is_available()).items() if on])

def run(name, *cmd, **env):
    "Run `cmd` in the root, and say how long it took."
    print(f"== {name}", flush=True)
    t = time.time()
    env = quiet | env | os.environ | dict(PATH=os.pathsep.join([str(bin), os.environ.get('PATH', '')]))
    ok = subprocess.run(cmd, cwd=root, env=env, stdin=subprocess.DEVNULL).returncode == 0
    if cmd[0] != 'pytest': print(f"== {name}: {'passed' if ok else 'FAILED'} in {time.time()-t:.0f} s", flush=True)
    return ok

if __name__ == '__main__':
    on = flags()
    threads = str(max(1, min(4, (os.cpu_count() or 2)//2)))
    results = {'export': run('notebooks are clean and exported', sys.executable, 'tools/check_export.py'),
               'lessons': run(f"lessons (flags: {on or 'none'})", 'nbdev_test', '--flags', on, '--n_workers', '2', '--timing', '--do_print',
                              OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads),
               'tests': run('tests', 'pytest', 'tests', '-q', '-n', '2', '--dist', 'loadfile', '--durations=5', OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)}
    failed = [name for name,ok in results.items() if not ok]
    if failed: sys.exit(f"FAILED: {', '.join(failed)}")
