# One launcher. `make help` lists the targets; CI calls the same ones.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# More arguments for pip, e.g. an index that holds a CPU build of torch.
PIP_ARGS ?=
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

SANITIZED = build/sanitized
.PHONY: help demo bench gpu torture sanitize arm test lint docs wheel format clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

SOURCES = pyproject.toml constraints.txt $(wildcard setup.py csrc/*/*)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# Not by way of the former: each installation compiles the kernels.
$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@

demo: $(VENV)/.installed ## Train small nets on real digits with every recipe and compare them (minutes, installation included)
	$(BIN)/fqt compare digits --out runs/demo

bench: $(VENV)/.installed ## Measure layers, steps and quantizers against fp32, bf16 and torchao (on an idle machine)
	$(BIN)/fqt bench --out runs/bench.json

gpu: ## Test, measure and train on an NVIDIA GPU in under 8 minutes, with PYTHON as it is: nothing is installed
	PYTHON=$(PYTHON) results/gpu.sh runs/gpu

torture: $(VENV)/.installed ## Kill, damage and fuzz everything, at length (hours; not in CI)
	OMP_NUM_THREADS=1 $(BIN)/python results/torture/run.py $(TORTURE_ARGS)

test: $(VENV)/.installed-dev ## Run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed-dev ## Check style and types
	$(BIN)/ruff check src tests results docs/site
	$(BIN)/ruff format --check src tests results docs/site
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## Build the site into build/site; a warning is an error, nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

sanitize: $(VENV)/.installed-dev ## Test the native kernels under the address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r src csrc setup.py pyproject.toml tests $(SANITIZED)
	cd $(SANITIZED) && rm -f src/fqt/kernels/cpu/*.so && FQT_SANITIZE=1 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=src $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -k "not level" \
		tests/kernels tests/nn/test_fused.py tests/quant/test_mixed_codes.py tests/quant/test_best.py

arm: $(VENV)/.installed-dev ## Test Arm's kernels in an emulator; wants qemu-user and g++-aarch64-linux-gnu (minutes; not in CI)
	PYTHON=$(BIN)/python tests/arm/run build/arm

wheel: ## Build one wheel for every Python on this platform, and try it where there is no compiler
	.ci/wheel dist

format: $(VENV)/.installed-dev ## Lay the code out
	$(BIN)/ruff check --fix src tests results docs/site
	$(BIN)/ruff format src tests results docs/site

clean: ## Remove the virtual environment and build leftovers
	rm -rf $(VENV) build dist src/*.egg-info src/fqt/kernels/cpu/*.so
