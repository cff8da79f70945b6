# Every target makes .venv when it is missing, and makes it anew when pyproject.toml or
# constraints.txt changed. PYTHON=… picks the interpreter, ARGS=… goes to train.py or pytest,
# WORKERS=… is how many processes share the tests.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# The first of these that starts and is at least 3.12 makes .venv.
PYTHON ?= $(shell for name in python3 python3.12 python3.13 python3.14 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$name && exit; done; echo python3)

# XLA takes fresh memory for every step; in pages of 2 MiB instead of 4 KiB that makes a step of the
# default model on a CPU 1.4 times as fast (Linux with glibc 2.35 or newer; elsewhere it is ignored).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# What pip does, one line a package, without its resolver's chatter.
PIP_INSTALL = PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check \
	--progress-bar off --constraint constraints.txt
PIP_LINES = { grep --line-buffered -E '^ *(Downloading|Using cached|Building|Installing (collected|build))' \
	| cut -c -100 || true; }
# A process takes all memory of a GPU or TPU, so there it is one.
WORKERS ?= $(if $(filter-out cpu,$(JAX_PLATFORMS)),0,2)
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --durations=10

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: train
train: $(VENV)/.installed  ## set up, then train the default run (ARGS="dense --train.steps 10" for another)
	$(BIN)/python train.py $(ARGS)

.PHONY: install
install: $(VENV)/.installed  ## set up .venv for training, evaluation and sampling
	@echo "Ready: $(BIN)/python train.py --help"

.PHONY: test
test: lint typecheck  ## set up, lint, type check, and all tests but the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.installed-dev  ## the slow tests alone
	$(PYTEST) -m slow $(ARGS)

.PHONY: test-all
test-all: lint typecheck  ## as test, with the slow tests
	$(PYTEST) $(ARGS)

.PHONY: gpu
gpu: $(VENV)/.installed-dev  ## one GPU for twelve minutes: tests, kernels beside XLA, tokens/s
	$(BIN)/python -m benchmarks.gpu $(ARGS)

.PHONY: faults
faults: $(VENV)/.installed-dev  ## put faults into copies of the tree, and see whether tests find them
	$(BIN)/python tests/faults.py $(ARGS)

.PHONY: lint
lint: $(VENV)/.installed-dev  ## ruff: lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: typecheck
typecheck: $(VENV)/.installed-dev  ## mypy
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.installed-dev  ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean:  ## remove .venv, caches and build output; runs/ stays
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	echo "Python 3.12 or newer is needed and '$(PYTHON)' is none:" \
		"install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(VENV)

$(VENV)/.installed: $(VENV)/pyvenv.cfg
	@echo "Installing engram-jax and what it needs (one to three minutes)"
	@$(PIP_INSTALL) --editable . | $(PIP_LINES)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/pyvenv.cfg
	@echo "Installing engram-jax and the tools for tests, lint and notebooks (two to four minutes)"
	@$(PIP_INSTALL) --editable '.[dev]' | $(PIP_LINES)
	@touch $(VENV)/.installed $@
