# Every target creates .venv if it is missing, and again if pyproject.toml or constraints.txt
# changed. PYTHON=… selects the interpreter, ARGS=… is passed to train.py or pytest, WORKERS=… is the
# number of test processes.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# The first of these that runs and is at least 3.12 creates .venv.
PYTHON ?= $(shell for name in python3 python3.12 python3.13 python3.14 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$name && exit; done; echo python3)

# XLA allocates new memory in every step. With pages of 2 MiB instead of 4 KiB, a step of the default
# model on a CPU is 1.4 times as fast (Linux with glibc 2.35 or newer; ignored elsewhere).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# pip's output is reduced to one line per package.
PIP_INSTALL = PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check \
	--progress-bar off --constraint constraints.txt
PIP_LINES = { grep --line-buffered -E '^ *(Downloading|Using cached|Building|Installing (collected|build))' \
	| cut -c -100 || true; }
# On GPU and TPU there is one test process, because a process takes all memory of the device.
WORKERS ?= $(if $(filter-out cpu,$(JAX_PLATFORMS)),0,2)
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.PHONY: train
train: $(VENV)/.installed  ## set up, then train the default run (ARGS="dense --train.steps 10" for another)
	$(BIN)/python train.py $(ARGS)

.PHONY: install
install: $(VENV)/.installed  ## set up .venv for training, evaluation and sampling
	@echo "Ready: $(BIN)/python train.py --help"

.PHONY: test
test: lint typecheck  ## set up, lint, type check, and all tests except the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.installed-dev  ## only the slow tests
	$(PYTEST) -m slow $(ARGS)

.PHONY: test-all
test-all: lint typecheck  ## like test, with the slow tests
	$(PYTEST) $(ARGS)

.PHONY: gpu
gpu: $(VENV)/.installed-dev  ## on one GPU, 12 minutes: tests, kernels compared with XLA, tokens/s
	$(BIN)/python -m benchmarks.gpu $(ARGS)

.PHONY: gpu-experiments
gpu-experiments: $(VENV)/.installed  ## on one GPU, 14 minutes: allocation and memory law of the small family's 10m
	$(BIN)/python -m experiments.gpu $(ARGS)

.PHONY: faults
faults: $(VENV)/.installed-dev  ## put faults into copies of the tree, and check that tests find them
	$(BIN)/python tests/faults.py $(ARGS)

.PHONY: soak
soak: $(VENV)/.installed-dev  ## 20 minutes of kills, full disks, damaged files and odd inputs
	$(BIN)/python tests/soak.py $(ARGS)

.PHONY: lint
lint: $(VENV)/.installed-dev  ## ruff: check lint and format, without changes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: typecheck
typecheck: $(VENV)/.installed-dev  ## mypy
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.installed-dev  ## ruff: fix lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean:  ## remove .venv, caches and build output, but not runs/
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	echo "Python 3.12 or newer is needed, and '$(PYTHON)' is not:" \
		"install it, or give its path: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(VENV)

$(VENV)/.installed: $(VENV)/pyvenv.cfg
	@echo "Installing engram-jax and what it needs (one to three minutes)"
	@$(PIP_INSTALL) --editable . | $(PIP_LINES)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/pyvenv.cfg
	@echo "Installing engram-jax and the tools for tests, lint and notebooks (two to four minutes)"
	@$(PIP_INSTALL) --editable '.[dev]' | $(PIP_LINES)
	@touch $(VENV)/.installed $@
