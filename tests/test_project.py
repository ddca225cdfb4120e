"What holds for the project as a whole: its notebooks, the modules they export, the files around them."
import ast, configparser, json, re, subprocess, sys
from importlib.metadata import version
from pathlib import Path
import pytest, yaml
from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
config = configparser.ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts))
numbered = [p for p in notebooks if re.match(r'\d\d[a-z]?_', p.name) and p.parent.name == 'nbs']
modules = sorted(p for p in (root/'medseg_nb').rglob('*.py') if p.name[0] != '_')
per_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
per_numbered = pytest.mark.parametrize('path', numbered, ids=lambda p: p.stem)
per_module = pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(root/'medseg_nb').as_posix())

def joined(o): return ''.join(o or '')
def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def code(path): return [joined(c['source']) for c in cells(path) if c['cell_type'] == 'code']
def python(source): return ast.parse(re.sub(r'^\s*[%!?].*$', '', source, flags=re.M))
def module_name(path): return path.stem.partition('_')[2]

def output_texts(path):
    "Kind and text of every output of a notebook."
    for out in (o for c in cells(path) for o in c.get('outputs', [])):
        if out['output_type'] == 'stream': yield out['name'], joined(out['text'])
        elif out['output_type'] == 'error': yield 'error', out['evalue']
        else: yield from ((k, joined(v)) for k,v in out['data'].items() if k.startswith('text/') or k == 'image/svg+xml')

noise = re.compile(r'Warning\b|warnings\.warn|Traceback \(most recent|it/s\]|━━|\r|IPKernelApp')
machine = re.compile(r'(?<![\w.:/<*])/(?:home|root|work|tmp|Users|usr/(?:lib|local)|opt|mnt|var|private)/[\w.-]+|[A-Z]:\\+Users|site-packages')

def imported(source):
    "Modules of the package that `source` imports, as notebooks name them."
    for node in ast.walk(python(source)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module, *(f'{node.module}.{a.name}' for a in node.names)]
        else: continue
        yield from (n.removeprefix('medseg_nb.') for n in names if n.startswith('medseg_nb.'))

@per_notebook
def test_outputs_are_clean(path):
    for kind,text in output_texts(path):
        assert kind not in ('error', 'stderr'), f'{kind}: {text[:200]}'
        for m in (noise.search(text), machine.search(text)): assert not m, text[max(0, m.start()-80):m.end()+80]

@per_notebook
def test_source_names_no_machine(path):
    for c in cells(path):
        m = machine.search(joined(c['source']))
        assert not m, m[0]

@per_notebook
def test_has_title_and_promise(path):
    first = cells(path)[0]
    assert first['cell_type'] == 'markdown' and re.match(r'# .+\n\s*> .+', joined(first['source'])), 'the first cell is an H1 title and a > promise'

@per_numbered
def test_exports_the_module_of_its_name(path):
    found = re.findall(r'^#\s*\|\s*default_exp\s+(\S+)', '\n'.join(code(path)), re.M)
    assert found == [module_name(path)]
    assert (root/'medseg_nb'/f"{module_name(path).replace('.', '/')}.py").is_file()
    assert 'nbdev_export()' in code(path)[-1]

@per_numbered
def test_imports_only_from_lower_numbers(path):
    numbers = {module_name(p): p.name.partition('_')[0] for p in numbered}
    for source in code(path):
        for name in imported(source):
            if name in numbers: assert numbers[name] <= numbers[module_name(path)], f'{path.stem} imports {name}, which is {numbers[name]}'

@per_numbered
def test_import_cells_only_import(path):
    for source in code(path):
        if re.search(r'^#\s*\|\s*(export|eval:\s*false)', source, re.M) or 'nbdev_export()' in source: continue
        tree = python(source)
        mixed = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)) and not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body)
        assert not mixed, f'the site runs this cell alone, because it imports something: import in the import cell.\n{source}'

def test_numbers_are_unique():
    numbers = [p.name.partition('_')[0] for p in numbered]
    assert len(set(numbers)) == len(numbers)

@per_module
def test_nothing_is_defined_twice(path):
    "A cell that was pasted twice exports its functions twice, and the second hides the first."
    own = [n for n in ast.parse(path.read_text(encoding='utf-8')).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.decorator_list]
    names = [n.name for n in own if n.name != '_']
    assert sorted(names) == sorted(set(names))

@per_module
def test_module_is_short(path):
    text = path.read_text(encoding='utf-8')
    assert 'AUTOGENERATED' in text, 'modules are exported from notebooks'
    written = [l for l in text.splitlines() if l.strip() and not l.startswith('# %%')]
    assert len(written) < 300, f'{len(written)} lines: make two lessons of it'

@per_module
def test_nothing_is_unpickled(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {(n or '').split('.')[0] for n in names} & {'pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal'}, node.lineno
        if isinstance(node, ast.ImportFrom): assert not {a.name for a in node.names} & {'load_learner', 'load_pickle'}, node.lineno
        if not isinstance(node, ast.Call): continue
        options = {k.arg: getattr(k.value, 'value', None) for k in node.keywords}
        assert options.get('weights_only', True) is True and not options.get('allow_pickle'), node.lineno
        if ast.unparse(node.func) == 'torch.load': assert 'weights_only' in options, f'line {node.lineno}: torch.load without weights_only=True'

@per_module
def test_imports_are_explicit(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom): assert '*' not in [a.name for a in node.names], node.lineno

def test_settings():
    runtime, dev = ([Requirement(r) for r in settings[k].split()] for k in ('requirements', 'dev_requirements'))
    assert not {r.name for r in runtime} & {r.name for r in dev}
    assert not {'nbdev', 'pytest', 'nbconvert', 'ipykernel'} & {r.name for r in runtime}
    assert [r.name for r in runtime if not r.specifier.contains(version(r.name), prereleases=True)] == []
    assert settings['nbs_path'] == 'nbs' and settings['lib_path'] == 'medseg_nb'

def test_version_is_one():
    v = settings['version']
    assert f'__version__ = "{v}"' in (root/'medseg_nb/__init__.py').read_text()
    assert yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))['version'] == v
    assert f'## {v}' in (root/'CHANGELOG.md').read_text(encoding='utf-8')

def test_site_follows_settings():
    site = yaml.safe_load((root/'nbs/nbdev.yml').read_text(encoding='utf-8'))
    want = dict(title=settings['title'], description=settings['description'], **{'site-url': settings['doc_host']+settings['doc_baseurl'],
                'repo-branch': settings['branch'], 'repo-url': settings['git_url']})
    assert site == dict(project={'output-dir': settings['doc_path']}, website=want)
    assert (root/'nbs/_quarto.yml').read_text() == (root/'_quarto.yml').read_text()

def leaves(o):
    "Files that a sidebar lists."
    if isinstance(o, str): return [o]
    if isinstance(o, list): return [f for x in o for f in leaves(x)]
    return leaves(o.get('contents', [])) + ([o['href']] if 'href' in o else [])

def test_sidebar_lists_every_notebook():
    listed = leaves(yaml.safe_load((root/'nbs/sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents'])
    there = [p.relative_to(root/'nbs').as_posix() for p in notebooks]
    assert sorted(listed) == sorted(there), f'add to nbs/sidebar.yml: {sorted(set(there)-set(listed))}; take out: {sorted(set(listed)-set(there))}'
    order = [f for f in listed if f[0].isdigit()]
    assert order == sorted(order), 'the sidebar follows the numbers'

def test_readme_is_the_index():
    r = subprocess.run([sys.executable, root/'tools/readme.py', '--check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr

@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_lead_somewhere(name):
    text = (root/name).read_text(encoding='utf-8')
    missing = [t for t in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'\w+:|#', t) and not (root/t.partition('#')[0]).exists()]
    assert not missing

@per_notebook
def test_links_between_lessons_lead_somewhere(path):
    text = '\n'.join(joined(c['source']) for c in cells(path) if c['cell_type'] == 'markdown')
    targets = [t.partition('#')[0] for t in re.findall(r'\]\(([^)\s]+\.ipynb[^)\s]*)\)', text) if not re.match(r'\w+:', t)]
    assert [t for t in targets if not (path.parent/t).exists()] == []

def test_workflows_parse():
    for p in (root/'.github/workflows').glob('*.yml'):
        jobs = yaml.safe_load(p.read_text())['jobs']
        assert all('make ' in json.dumps(j['steps']) for j in jobs.values()), p.name
