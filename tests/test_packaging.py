"The wheel holds everything, and works where nothing but its runtime requirements is installed."
import configparser, hashlib, json, os, re, shutil, subprocess, sys, time, zipfile
from contextlib import contextmanager
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
config = configparser.ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']

def run(*cmd, cwd, timeout=600, ok=0):
    "Run `cmd` without the environment of the caller's Python; its output, or its last lines in the error."
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')} | dict(PYTHONNOUSERSITE='1')
    r = subprocess.run([str(c) for c in cmd], cwd=cwd, env=env, timeout=timeout, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert r.returncode == ok, f"{' '.join(map(str, cmd))} ended with {r.returncode}:\n" + '\n'.join(r.stdout.splitlines()[-25:])
    return r.stdout

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from the source distribution, that from a copy of the project that holds no earlier build."
    ignored = [l.strip().rstrip('/') for l in (root/'.gitignore').read_text().splitlines() if l.strip() and l[0] != '#']
    src, out = tmp_path_factory.mktemp('build')/'src', tmp_path_factory.mktemp('dist')
    shutil.copytree(root, src, symlinks=True, ignore=shutil.ignore_patterns('.git', *ignored))
    said = run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, src, cwd=out)
    assert not re.search('would be ignored|Deprecated|Warning', said), said[-3000:]
    return next(out.glob('*.whl'))

def contents(wheel):
    with zipfile.ZipFile(wheel) as z: return {n: z.read(n) for n in z.namelist() if n[-1] != '/'}

def dist_info(wheel, name): return next(v.decode() for k,v in contents(wheel).items() if k.endswith(f'.dist-info/{name}'))

def test_wheel_holds_the_package(wheel):
    have = {k: v for k,v in contents(wheel).items() if '.dist-info/' not in k}
    keep = lambda p: p.is_file() and '__pycache__' not in p.parts and p.suffix != '.tmp' and (p.suffix == '.py' or 'weights' in p.parts)
    want = {p.relative_to(root).as_posix(): p.read_bytes() for p in (root/'medseg_nb').rglob('*') if keep(p)}
    assert sorted(have) == sorted(want)
    assert [k for k in want if have[k] != want[k]] == []

def test_wheel_describes_itself(wheel):
    about = dist_info(wheel, 'METADATA')
    head, _, long = about.partition('\n\n')
    assert f"Version: {settings['version']}" in head and 'License' in head and f"Requires-Python: >={settings['min_python']}" in head
    assert '# medseg_nb' in long and '](docs_images/' not in long and '](nbs/' not in long
    runtime = [l.split(': ', 1)[1] for l in head.splitlines() if l.startswith('Requires-Dist') and 'extra ==' not in l]
    assert len(runtime) == len(settings['requirements'].split())
    assert not [r for r in runtime if r.startswith(('nbdev', 'pytest', 'jupyter'))]
    assert 'medseg = medseg_nb.cli:main' in dist_info(wheel, 'entry_points.txt')
    assert 'Apache License' in next(v.decode() for k,v in contents(wheel).items() if k.endswith('/LICENSE'))

def test_wheel_is_small(wheel): assert wheel.stat().st_size < 30e6

@contextmanager
def alone(path):
    "One process at a time holds the file `path`."
    import fcntl
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def make_env(env):
    "A virtual environment with pip, by the interpreter's own pip where there is no ensurepip, as the Makefile does."
    try: run(sys.executable, '-m', 'venv', env, cwd=env.parent)
    except AssertionError:
        run(sys.executable, '-m', 'venv', '--clear', '--without-pip', env, cwd=env.parent)
        run(sys.executable, '-m', 'pip', '--python', env/'bin/python', 'install', '-q', '--timeout', '120', '--retries', '5', 'pip', cwd=env.parent)

def bare_python(store):
    "An environment with the runtime requirements and nothing else, made once for each set of requirements and Python."
    names = sorted(settings['requirements'].split())
    key = hashlib.sha256('\n'.join([sys.version, *names]).encode()).hexdigest()[:12]
    env, done = store/f'bare-{key}', store/f'bare-{key}'/'complete'
    if not done.exists():
        shutil.rmtree(env, ignore_errors=True)
        make_env(env)
        run(env/'bin/python', '-m', 'pip', 'install', '-q', '--timeout', '120', '--retries', '5', 'pip>=23', *names, cwd=store, timeout=900)
    done.touch()
    for old in store.glob('bare-*/complete'): # a changed requirement leaves some GB behind
        if time.time() - old.stat().st_mtime > 14*24*3600: shutil.rmtree(old.parent, ignore_errors=True)
    return env/'bin/python'

look = """
import importlib, importlib.metadata as md, json, pkgutil, sys
import medseg_nb
names = [m.name for m in pkgutil.walk_packages(medseg_nb.__path__, 'medseg_nb.')]
for n in names: importlib.import_module(n)
dev = [n for n in ('nbdev', 'execnb', 'pytest') if n in sys.modules]
print(json.dumps(dict(file=medseg_nb.__file__, names=names, dev=dev, versions={n: md.version(n) for n in ('fastai', 'fastcore', 'torch', 'transformers', 'monai')})))
"""

@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get('MEDSEG_SKIP_BARE')), reason='MEDSEG_SKIP_BARE is set')
def test_works_in_a_bare_environment(wheel, tmp_path):
    store = Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')/'medseg_nb'
    with alone(store/'lock'):
        python = bare_python(store)
        run(python, '-m', 'pip', 'install', '-q', '--force-reinstall', '--no-deps', '--no-index', wheel, cwd=tmp_path)
        seen = json.loads(run(python, '-W', 'ignore', '-c', look, cwd=tmp_path).splitlines()[-1])
        print(seen['versions'])
        assert 'site-packages' in seen['file'] and str(root) not in seen['file'].replace(str(store), '')
        modules = [p for p in contents(wheel) if p.endswith('.py') and p != 'medseg_nb/__init__.py']
        assert sorted(seen['names']) == sorted(m.removesuffix('.py').removesuffix('/__init__').replace('/', '.') for m in modules)
        assert seen['dev'] == []
        if 'medseg_nb.cli' in seen['names']:
            medseg = python.parent/'medseg'
            assert 'segment' in run(medseg, '--help', cwd=tmp_path)
            run(medseg, 'demo', '--out', 'out', cwd=tmp_path)
            report = json.loads((tmp_path/'out/report.json').read_text())
            assert report['command'] and report['results'] and not [r for r in report['results'] if 'error' in r]
            assert all((tmp_path/'out'/r['mask']).is_file() for r in report['results'])
