# A fresh clone needs only make and Python 3.11 or later, with pip and venv.
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
	$(PYTHON) -m venv --without-pip $(VENV)

# A recent pip resolves dependencies three times as fast as Python 3.11's, and installs itself
# faster than venv does. Modules are compiled on all cores, except rarely imported ones. Errors are
# ignored: some packages contain templates.
SELDOM := tests?|testing|transformers/models|ray|sklearn|nltk|pip|mypy|debugpy|libcst|textual|IPython
SELDOM := $(SELDOM)|setuptools|pygments|networkx|physics|distutils|_inductor|onnx|_export|pandas
SELDOM := $(SELDOM)|datasets|stats|signal|interpolate|integrate|ndimage|combinatorics|_vendor
define install
	$(PYTHON) -m pip --python $(BIN)/python install -q -U pip || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install -qq --no-compile -e '$(1)'
	$(BIN)/python -m compileall -q -j 0 -x '/($(SELDOM))/' $(VENV)/lib calmix > /dev/null 2>&1 || true
endef

$(VENV)/.base: pyproject.toml | $(BIN)/python
	$(call install,.)
	touch $@

$(VENV)/.ready: pyproject.toml | $(BIN)/python
	$(call install,.[dev])
	touch $@ $(VENV)/.base

# Quantise a real model and test what it keeps.
demo: $(VENV)/.base
	rm -rf $(OUT)
	$(BIN)/calmix compress $(MODEL) -o $(OUT)/compressed --effort quick
	$(BIN)/calmix check $(OUT)/compressed --keep-at-least general=0.5,math=0.4
	@echo "the report card: $(OUT)/compressed/card.html"

# The same model pruned on one source, for comparison.
demo-plain: demo
	$(BIN)/calmix prune $(MODEL) -o $(OUT)/plain --sparsity 0.6 --calibration encyclopedia
	$(BIN)/calmix evaluate $(OUT)/plain --suite abilities --quick --without gsm8k \
	  --against $(MODEL) -o $(OUT)/plain.json > $(OUT)/plain.txt
	$(BIN)/calmix compare $(OUT)/plain.json $(OUT)/compressed/abilities.json

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# Slow tests: Ray, 10,000 fuzzed files, fault injection for every command.
test-long: setup docs
	HF_HUB_OFFLINE=1 CALMIX_LONG=1 $(BIN)/python -m pytest -m long
	HF_HUB_OFFLINE=1 CALMIX_LONG=1 $(BIN)/python -m pytest tests/fuzz

# Branch coverage of `make test`, in htmlcov/index.html.
coverage: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --cov --cov-report=term:skip-covered \
	  --cov-report=html

# Mutation testing of solvers, masks, statistics and retention (files and tests: pyproject.toml).
# Takes many CPU hours; MUTANTS selects mutants by name.
mutants: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/mutmut run $(MUTANTS)
	$(BIN)/mutmut results

# The tests with the lowest version of every dependency, in a separate environment. To avoid the CUDA
# build of PyTorch, set UV_OVERRIDE to a file that requires another one, e.g. `torch==2.13.0+cpu`.
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

url = $$(sed -n 's/^$(1) = "\(.*\)"/\1/p' pyproject.toml)

# The documentation site, in out/site. A broken link is an error.
docs: $(VENV)/.ready
	$(BIN)/python -m pip install -q -e '.[docs]'
	rm -rf out/site-src && mkdir -p out/site-src/benchmarks
	cp benchmarks/README.md out/site-src/benchmarks
	cp -r README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CITATION.cff LICENSE docs recipes \
	  studies out/site-src
	$(BIN)/python docs/pages.py out/site-src/docs
	$(BIN)/jupyter-nbconvert --to markdown --log-level WARN out/site-src/docs/notebooks/*.ipynb
	sed -i.bak 's/\.ipynb)/.md)/' out/site-src/README.md out/site-src/docs/tasks/*.md && \
	  find out/site-src -name '*.bak' -delete
	NO_MKDOCS_2_WARNING=1 SITE_NAME="$$($(BIN)/calmix --version)" REPOSITORY=$(call url,Source) \
	  SITE=$(call url,Documentation) $(BIN)/mkdocs build

# Build and check the wheel, then try it in an empty environment. Nothing is uploaded. On Linux that
# environment gets the CUDA build of PyTorch unless pip is configured otherwise.
release: $(BIN)/python
	$(BIN)/python -m pip install -q 'build>=1.3' 'twine>=6.2'
	rm -rf dist out/release
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv out/release
	out/release/bin/python -m pip install -q dist/*.whl
	cd out/release && bin/calmix --version && bin/calmix doctor && \
	  bin/calmix compress $(MODEL) -o small --effort quick --dry-run
	@grep -q OWNER pyproject.toml && echo "replace OWNER in pyproject.toml before uploading" || true
	@echo "dist/ is ready: $(BIN)/twine upload dist/*"

# llm-compressor, for comparison, has its own environment.
$(RIVAL)/.ready:
	$(PYTHON) -m venv $(RIVAL)
	$(RIVAL)/bin/python -m pip install -q 'llmcompressor>=0.14'
	touch $@

# Takes one to two hours on two cores. Set CALMIX_DATA to compare perplexity with llm-compressor too.
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
