# `make finetune` and `make test` need Python 3.11 or newer and nothing else: the first use sets up .venv.
#
#   PYTHON=python3.12                                     the interpreter that .venv is made from
#   TORCH_INDEX=URL    another package index for torch, for instance the one with builds without CUDA
#   ARGS="--steps 50"                                     more arguments for the command (finetune, test)
#   JOBS=2                                                processes for the tests
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread for each test process: two processes on two cores beat one process with two threads. Files keep their order:
# xdist's own, by the number of tests, leaves the few long tests, which launch processes, to the end and to one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help finetune test test-all lint format docs bench models clean

help:
	@echo "make finetune   set up .venv and fine-tune the embedded model on 2 processes"
	@echo "make test       set up .venv and run the tests"
	@echo "make test-all   the full matrices and the long drills too"
	@echo "make lint       ruff, mypy, imports; make format mends what can be mended"
	@echo "make docs       the pages of docs/ and the API reference, as a site in site/"
	@echo "make bench      the benchmarks, each against its peer"
	@echo "make models     every architecture at every layout, into docs/models.md; an hour or two, goes on where it was"

# torch comes first and alone, so that its index can differ; the constraints keep everything else off it.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "MeshPEFT needs Python 3.11 or newer, and $(PYTHON) is %d.%d: set PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "setting up $(VENV) (once)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	@$(PIP) --editable '.[docs]'
	@touch $@

finetune: $(VENV)/.runtime
	@$(BIN)/meshpeft finetune --tp 2 --output-dir runs/embedded --overwrite $(ARGS)

test: $(VENV)/.dev
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	@$(PYTEST) $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# A warning, such as a link to nowhere or a parameter that a docstring invents, is an error.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

models: $(VENV)/.dev
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/models.py --jobs $(JOBS) $(ARGS)

clean:
	rm -rf $(VENV) build dist runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
