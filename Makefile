# One launcher. `make help` lists the targets; CI calls the same ones.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# More arguments for pip, e.g. an index that holds a CPU build of torch.
PIP_ARGS ?=
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: help demo bench test lint format clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard setup.py csrc/*) | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed ## Train small nets on real digits with every recipe and compare them (under 5 minutes)
	$(BIN)/fqt compare digits --out runs/demo

bench: $(VENV)/.installed ## Measure layers, steps and quantizers against fp32, bf16 and torchao (on an idle machine)
	$(BIN)/fqt bench --out runs/bench.json

test: $(VENV)/.installed-dev ## Run the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev ## Check style and types
	$(BIN)/ruff check src tests results
	$(BIN)/ruff format --check src tests results
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Lay the code out
	$(BIN)/ruff check --fix src tests results
	$(BIN)/ruff format src tests results

clean: ## Remove the virtual environment and build leftovers
	rm -rf $(VENV) build dist src/*.egg-info src/fqt/kernels/*.so
