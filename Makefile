PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: pretrain test test-all gpu lint types docs dist setup clean

pretrain: setup  ## pretrain the embedded default: no network, no GPU
	$(BIN)/accelerate launch --config_file recipes/accelerate/single.yaml recipes/pretrain.py

# A file's tests stay in one worker, which starts what they share once; the longest files go first.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup lint types  ## lint, types and every guarantee once
	$(PYTEST) -m "not slow"

test-all: setup lint types docs  ## lint, types, the site and the whole test suite
	$(PYTEST)

gpu:  ## all that only a GPU can show, each record as soon as it is there; needs torch, triton, transformers, pytest
	$(PYTHON) kernels/benchmarks/gpu.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.:kernels $(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

docs: setup  ## the site, with the API reference, in site/
	$(BIN)/mkdocs build --strict

dist: setup  ## wheel and sdist in dist/, and steps from the wheel in an environment that has nothing of this tree
	rm -rf dist
	.ci/dist $(BIN)/python dist

setup: $(READY)

# torch goes in first and alone: whatever follows finds it satisfied and pulls no second build.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
