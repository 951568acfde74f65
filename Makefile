# Every command makes .venv and installs the pinned versions on first use; see README.md.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python
INSTALLED := $(VENV)/.installed
LOWEST := $(VENV)-lowest
LOWEST_PY := $(LOWEST)/$(notdir $(BIN))/python
# In the conda environment of environment.yml everything is installed already.
ifeq ($(CONDA_DEFAULT_ENV),llmbook)
PY := python
INSTALLED :=
endif

export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help book test test-lowest test-elsewhere mutate sync format lab workbook figures bench constraints clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | sort

# Whatever pyproject.toml asks for is pinned in constraints.txt, a test sees to that.
$(VENV)/.installed: constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f'Python 3.11 or newer is needed, but $(PYTHON) is {v.major}.{v.minor}. Try: make PYTHON=python3.11')"
	@echo "Setting up $(VENV): once, about five minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) tools/install.py --constraint constraints.txt --editable ".[book,dev]"
	@touch $@

book: $(INSTALLED) ## build the site in _build/html
	@$(PY) tools/build_book.py

test: $(INSTALLED) ## run all that CI runs
	@$(PY) tools/test.py

test-elsewhere: $(INSTALLED) ## run the tests with the arithmetic of other processors
	@$(PY) tools/elsewhere.py $(ARGS)

mutate: $(INSTALLED) ## change the package at random and see whether a test notices
	@$(PY) tools/mutate.py $(ARGS)

# An environment of its own, which uv fills with the oldest versions that pyproject.toml allows.
$(LOWEST)/.made:
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v[:2] in {(3, 11), (3, 12)} else \
	  f'Old libraries need an old Python, and $(PYTHON) is {v.major}.{v.minor}: make test-lowest PYTHON=python3.11')"
	@echo "Setting up $(LOWEST): once, a few minutes ..."
	@$(PYTHON) -m venv $(LOWEST)
	@$(LOWEST_PY) tools/install.py --constraint constraints.txt uv==0.13.9 packaging
	@touch $@

test-lowest: $(LOWEST)/.made ## run the unit tests with the oldest libraries that are allowed
	@$(LOWEST_PY) tools/lowest.py $(ARGS)

sync: $(INSTALLED) ## after an edit: pair, export, execute what changed
	@$(PY) tools/sync.py $(ARGS)

format: $(INSTALLED) ## lay out the code as the tests want it
	@$(PY) -m ruff format --quiet && $(PY) -m ruff check --quiet --fix

lab: $(INSTALLED) ## open the chapters in JupyterLab
	@$(PY) -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/chapters $(ARGS)

workbook: $(INSTALLED) ## student notebooks, solutions blanked, in _build/workbook
	@$(PY) tools/workbook.py

figures: $(INSTALLED) ## draw the diagrams in figures/ anew
	@$(PY) figures/draw.py

bench: $(INSTALLED) ## time ours against others; tables in benchmarks/results
	@$(PY) benchmarks/measure.py $(ARGS)

constraints: ## resolve the pinned versions anew (maintainers)
	@rm -rf $(VENV)-resolve && $(PYTHON) -m venv $(VENV)-resolve
	@$(VENV)-resolve/bin/python tools/install.py torch==2.13.0 ".[book,dev]"
	@{ sed -n '/^#/p' constraints.txt; $(VENV)-resolve/bin/python -m pip list --format=freeze \
	  --exclude llmbook --exclude pip --exclude setuptools | sed 's/+cpu//'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt && rm -rf $(VENV)-resolve

clean: ## remove what was built, keep .venv
	@rm -rf _build build artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis
