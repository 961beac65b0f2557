# Everything a fresh clone needs: Python (3.11 or later) with pip and venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RIVAL := .bench-venv
OUT := out/demo
MODEL := builtin:smollm2-135m
MIX := uniform:python-stdlib,encyclopedia,math-solutions,stories

.PHONY: setup demo test test-long lint bench clean

setup: $(VENV)/.ready
	$(BIN)/calmix assets install

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

# One source, a mix, and text the model wrote itself: all at 60 % SparseGPT on the real model, and
# what each lost.
demo: setup
	rm -rf $(OUT)
	$(BIN)/calmix prune $(MODEL) -o $(OUT)/single --sparsity 0.6 --calibration encyclopedia
	$(BIN)/calmix prune $(MODEL) -o $(OUT)/mix --sparsity 0.6 --calibration $(MIX)
	$(BIN)/calmix generate igsp --model $(MODEL) -o $(OUT)/written
	$(BIN)/calmix prune $(MODEL) -o $(OUT)/igsp --sparsity 0.6 --calibration $(OUT)/written
	for name in single mix igsp; do \
	  $(BIN)/calmix evaluate $(OUT)/$$name --quick --against $(MODEL) -o $(OUT)/$$name.json \
	    > $(OUT)/$$name.txt || exit; done
	$(BIN)/calmix compare $(OUT)/single.json $(OUT)/mix.json $(OUT)/igsp.json

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# What takes too long for every change: more kills and Ray, ten thousand mutated files, the fault
# matrix.
test-long: setup
	HF_HUB_OFFLINE=1 CALMIX_LONG=1 $(BIN)/python -m pytest -m long
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz 10000
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-compressor, to measure against, lives in an environment of its own.
$(RIVAL)/.ready:
	$(PYTHON) -m venv $(RIVAL)
	$(RIVAL)/bin/python -m pip install -q 'llmcompressor>=0.14'
	touch $@

# Takes an hour or two on two cores. With CALMIX_DATA set, quality beside llm-compressor too.
bench: setup $(RIVAL)/.ready
	$(BIN)/python benchmarks/speed.py --rival $(RIVAL)/bin/python --pattern 2:4
	$(BIN)/python benchmarks/scaling.py --methods sparsegpt wanda
	$(BIN)/python benchmarks/on_paper.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/profile_trial.py
	test -z "$$CALMIX_DATA" || \
	  $(BIN)/python benchmarks/quality.py --data "$$CALMIX_DATA" --rival $(RIVAL)/bin/python

clean:
	rm -rf $(VENV) $(RIVAL) out
