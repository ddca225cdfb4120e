# One environment, .venv, for every target: `make demo` installs what running needs, `make test` and `make docs` add what development needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --timeout 120 --retries 5

.PHONY: help install demo test docs readme clean
.DELETE_ON_ERROR:

help:
	@echo "make install   .venv with the package (editable) and its development tools: some minutes, about 7 GB, once"
	@echo "make demo      segment the example images into demo_out/; installs what it needs first"
	@echo "make test      what CI runs: notebooks clean and exported, lessons, tests; installs what it needs first"
	@echo "make docs      the site in _docs/ where Quarto is installed, else a check of the notebooks"
	@echo "make readme    README.md from nbs/index.ipynb"
	@echo "make clean     remove what the other targets made, but for .venv"
	@echo "Needs Python 3.10 or newer with pip; another interpreter than python3: make test PYTHON=python3.12"

install: .venv/.dev

demo: .venv/.runtime
	$(BIN)/medseg demo --out demo_out

test: .venv/.dev
	@$(BIN)/python tools/test.py

docs: .venv/.dev
	@$(BIN)/python tools/docs.py

readme: .venv/.dev
	@$(BIN)/python tools/readme.py

clean:
	rm -rf _docs _proc build dist demo_out *.egg-info .pytest_cache .hypothesis
	find medseg_nb nbs tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# Without Debian's python3-venv there is no ensurepip: then the interpreter's own pip fills the environment.
.venv/pyvenv.cfg:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "medseg_nb needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python .venv install -q pip; } || \
	  { rm -rf .venv; echo "'$(PYTHON)' can make no virtual environment: it lacks venv or pip (on Debian: apt install python3-venv)"; exit 1; }

.venv/.runtime: .venv/pyvenv.cfg settings.ini setup.py
	@echo "Installing medseg_nb into .venv: some minutes the first time"
	$(PIP) install -q "pip>=23"
	$(PIP) install -q -e .
	@touch $@

.venv/.dev: .venv/pyvenv.cfg settings.ini setup.py
	@echo "Installing medseg_nb and its development tools into .venv: some minutes the first time"
	$(PIP) install -q "pip>=23"
	$(PIP) install -q -e ".[dev,nnunet,wsi]"
	@touch .venv/.runtime $@
