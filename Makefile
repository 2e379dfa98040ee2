PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: pretrain test lint types docs setup clean

pretrain: setup  ## pretrain the embedded default: no network, no GPU
	$(BIN)/accelerate launch --config_file recipes/accelerate/single.yaml recipes/pretrain.py

test: setup lint types  ## lint, types and the whole test suite
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.:kernels $(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

docs: setup  ## the site, with the API reference, in site/
	$(BIN)/mkdocs build --strict

setup: $(READY)

# torch goes in first and alone: whatever follows finds it satisfied and pulls no second build.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
