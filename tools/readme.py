"Write README.md and docs_images/ from nbs/index.ipynb. `--check` writes nothing, and fails where they are out of step."
import re, shutil, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).resolve().parent.parent
source, images = root/'nbs'/'index.ipynb', 'docs_images'
note = f"<!-- Written by tools/readme.py from nbs/{source.name}: change that notebook. -->\n\n"
directive = re.compile(r'^#\s*\|\s*([\w-]+):?[ \t]*(.*)\n?', re.M)

def shown(cell):
    "`cell` as a reader sees it, its directives applied; None where it is hidden."
    if cell.cell_type != 'code': return cell
    opts = dict(directive.findall(cell.source))
    if opts.keys() & {'hide', 'default_exp'} or opts.get('include') == 'false': return None
    cell.source = directive.sub('', cell.source).strip()
    cell.metadata = dict(transient=dict(remove_source=opts.get('echo') == 'false'), alt=(opts.get('fig-alt') or opts.get('fig-cap') or 'Figure').strip('\'"'))
    return cell

def github_links(text):
    "Links of `text` that lead to a file beside the notebook, as seen from the root."
    def f(m): return f'](nbs/{m[1]}' if (source.parent/m[1]).exists() else m[0]
    return re.sub(r'\]\(([^)#:\s]+)', f, text)

def render():
    "The files to write: text of README.md, and bytes of the images, by relative path."
    nb = nbformat.read(source, 4)
    nb.metadata['language_info'] = dict(name='python')
    nb.cells = [c for c in map(shown, nb.cells) if c]
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = github_links(c.source)
    order = ['text/markdown', 'image/svg+xml', 'image/png', 'image/jpeg', 'text/plain']
    exporter = MarkdownExporter(config=Config(NbConvertBase=dict(display_data_priority=order)))
    text, res = exporter.from_notebook_node(nb, dict(output_files_dir=images, unique_key='index'))
    text = re.sub(rf'!\[\w+\](\({images}/index_(\d+)_)', lambda m: f"![{nb.cells[int(m[2])].metadata['alt']}]{m[1]}", text)
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip()
    return {'README.md': (note + text + '\n').encode()} | res['outputs']

def present():
    "The same files as they are now."
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in [root/'README.md', *(root/images).glob('*')] if p.is_file()}

if __name__ == '__main__':
    want = render()
    if '--check' in sys.argv:
        have = present()
        wrong = sorted(n for n in {*want, *have} if want.get(n) != have.get(n))
        sys.exit(f"out of step with nbs/{source.name}: {', '.join(wrong)}. Run `make readme`." if wrong else 0)
    shutil.rmtree(root/images, ignore_errors=True)
    for name,content in want.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(content)
    print(f"README.md, {len(want)-1} images")
