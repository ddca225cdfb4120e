"The package's build, all of it read from settings.ini, which nbdev reads too."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_namespace_packages

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['=']); cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
readme = here/'README.md'

def long_description():
    "README.md with its relative links made absolute: outside the repository they lead nowhere."
    blob = f"{cfg['git_url']}/blob/{cfg['branch']}/"
    text = re.sub(r'(!\[[^]]*\]\()(?!\w+:)([^)]+)', rf'\1{blob}\2?raw=true', readme.read_text(encoding='utf-8'))
    return re.sub(r'(\]\()(?!\w+:|#)', rf'\1{blob}', text)

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
      author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0', license_files=['LICENSE'],
      long_description=long_description(), long_description_content_type='text/markdown',
      packages=find_namespace_packages(include=['medseg_nb', 'medseg_nb.*'], exclude=['*.__pycache__', '*.__pycache__.*']), # the folders of weights too
      include_package_data=True, python_requires=f">={cfg['min_python']}",
      install_requires=cfg['requirements'].split(), extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
      entry_points=dict(console_scripts=cfg['console_scripts'].split('\n'), nbdev=[f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]),
      classifiers=['Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
                   'Topic :: Scientific/Engineering :: Image Processing'], zip_safe=False)
