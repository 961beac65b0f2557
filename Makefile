# Everything a fresh clone needs: Python (3.11 or later) with pip and venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RIVAL := .bench-venv
OUT := out/demo
MODEL := builtin:smollm2-135m

.PHONY: setup demo demo-plain test test-long coverage mutants test-lowest lint docs release bench clean

setup: $(VENV)/.ready
	$(BIN)/calmix doctor assets --install

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A new pip resolves requirements in a third of the time of the one that comes with Python 3.11. It
# would compile all modules, on one core: left out are those that are seldom imported. Files that no
# Python can compile are templates.
SELDOM := tests?|transformers/models|ray|sklearn|nltk|pip|mypy|debugpy|libcst|textual|IPython
define install
	$(BIN)/python -m pip install -q -U pip
	$(BIN)/python -m pip install -qq --no-compile -e '$(1)'
	$(BIN)/python -m compileall -q -j 0 -x '/($(SELDOM))/' $(VENV)/lib calmix > /dev/null 2>&1 || true
endef

$(VENV)/.base: pyproject.toml | $(BIN)/python
	$(call install,.)
	touch $@

$(VENV)/.ready: pyproject.toml | $(BIN)/python
	$(call install,.[dev])
	touch $@ $(VENV)/.base

# The real model, quantised on a mix, and tested.
demo: $(VENV)/.base
	$(BIN)/calmix doctor assets --install
	rm -rf $(OUT)
	$(BIN)/calmix compress $(MODEL) -o $(OUT)/compressed --effort quick
	$(BIN)/calmix check $(OUT)/compressed --keep-at-least general=0.5,math=0.4
	@echo "the report card: $(OUT)/compressed/card.html"

# What is kept beside it by a plain prune on one source, which takes more bytes.
demo-plain: demo
	$(BIN)/calmix prune $(MODEL) -o $(OUT)/plain --sparsity 0.6 --calibration encyclopedia
	$(BIN)/calmix evaluate $(OUT)/plain --suite abilities --quick --without gsm8k \
	  --against $(MODEL) -o $(OUT)/plain.json > $(OUT)/plain.txt
	$(BIN)/calmix compare $(OUT)/plain.json $(OUT)/compressed/abilities.json

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# What takes too long for every change: Ray, ten thousand mutated files, all faults of all verbs.
test-long: setup docs
	HF_HUB_OFFLINE=1 CALMIX_LONG=1 $(BIN)/python -m pytest -m long
	HF_HUB_OFFLINE=1 CALMIX_LONG=1 $(BIN)/python -m pytest tests/fuzz

# Branches that `make test` takes; htmlcov/index.html shows those it does not.
coverage: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --cov --cov-report=term:skip-covered \
	  --cov-report=html

# Changes in the code of solvers, masks, statistics and retention that no test notices
# (pyproject.toml says which files and tests); many CPU hours. MUTANTS narrows it by name.
mutants: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/mutmut run $(MUTANTS)
	$(BIN)/mutmut results

# The lower end of every range in pyproject.toml, in an environment of its own. Torch may bring
# gigabytes of CUDA: UV_OVERRIDE names a file that asks for another build, `torch==2.13.0+cpu`.
LOWEST := .lowest-venv
test-lowest: setup
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct \
	  $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) -e '.[dev]'
	HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site in out/site; a link that leads nowhere is an error.
docs: $(VENV)/.ready
	$(BIN)/python -m pip install -q -e '.[docs]'
	rm -rf out/site-src && mkdir -p out/site-src
	cp -r README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CITATION.cff LICENSE docs studies \
	  out/site-src
	$(BIN)/python docs/pages.py out/site-src/docs
	$(BIN)/jupyter-nbconvert --to markdown --log-level WARN out/site-src/docs/notebooks/*.ipynb
	sed -i.bak 's/\.ipynb)/.md)/' out/site-src/README.md out/site-src/docs/tasks/*.md && \
	  find out/site-src -name '*.bak' -delete
	NO_MKDOCS_2_WARNING=1 SITE_NAME="$$($(BIN)/calmix --version)" $(BIN)/mkdocs build

# What would be uploaded: built, checked, and tried in an empty environment; nothing is uploaded.
# On Linux that environment gets the CUDA build of PyTorch, unless pip is set to take another.
release: $(BIN)/python
	$(BIN)/python -m pip install -q 'build>=1.3' 'twine>=6.2'
	rm -rf dist out/release
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv out/release
	out/release/bin/python -m pip install -q dist/*.whl
	cd out/release && bin/calmix --version && bin/calmix doctor && \
	  bin/calmix compress $(MODEL) -o small --effort quick --dry-run
	@grep -q OWNER pyproject.toml && echo "before an upload: put the owner's name for OWNER" || true
	@echo "dist/ is ready: $(BIN)/twine upload dist/*"

# llm-compressor, to measure against, lives in an environment of its own.
$(RIVAL)/.ready:
	$(PYTHON) -m venv $(RIVAL)
	$(RIVAL)/bin/python -m pip install -q 'llmcompressor>=0.14'
	touch $@

# Takes an hour or two on two cores. With CALMIX_DATA set, quality beside llm-compressor too.
bench: setup $(RIVAL)/.ready
	$(BIN)/python benchmarks/speed.py --rival $(RIVAL)/bin/python --pattern 2:4
	$(BIN)/python benchmarks/scaling.py --methods sparsegpt wanda
	$(BIN)/python benchmarks/recovery.py -o out/recovery
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/architectures.py
	test -z "$$CALMIX_DATA" || \
	  $(BIN)/python benchmarks/quality.py --data "$$CALMIX_DATA" --rival $(RIVAL)/bin/python

clean:
	rm -rf $(VENV) $(RIVAL) $(LOWEST) mutants htmlcov .coverage out
