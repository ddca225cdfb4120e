"The site in _docs/ where Quarto is installed; elsewhere all of it that needs no Quarto."
import shutil, subprocess, sys
from pathlib import Path
from nbdev.serve import proc_nbs

def main():
    "Render the site, or process its pages."
    if shutil.which('quarto'):
        Path('README.md').touch() # nbdev_docs writes its own where the notebook is newer
        return subprocess.run([Path(sys.executable).parent/'nbdev_docs', '--n_workers', '2']).returncode
    pages = list(proc_nbs(n_workers=2, force=True).rglob('*.ipynb'))
    print(f"Quarto is not installed (quarto.org), so no site is rendered. {len(pages)} pages were processed into _proc/ without errors.")

if __name__ == '__main__': sys.exit(main())
