# make demo    a real language model in int8 beside the original, as one table (MODEL=... for another model)
# make test    lint, types and the whole CPU test suite (what CI runs); GPU tests too where there is a GPU
# make check   lint and types only
# make bench   the measurements of benchmarks/
#
# Each sets up .venv from constraints.txt first, once. Needed: Python 3.11 or newer, pip, make.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first interpreter that starts and is new enough: a version manager's shim may exist and yet not run.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# -qq: pip's progress and its remarks on the machine's index stay out; errors and the lines echoed between steps remain.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
READY := $(VENV)/.int8pass-ready

MODEL ?= smollm2
DEMO_ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?=
# Test processes, each with one torch thread: more threads than cores make torch crawl.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$(( n < 8 ? n : 8 )))

.PHONY: help demo test check bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(READY)
	@$(BIN)/python examples/compile_model.py $(MODEL) $(DEMO_ARGS)

test: check
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(TEST_ARGS)

check: $(READY)
	@echo "== lint"
	@$(BIN)/ruff check .
	@echo "== types"
	@$(BIN)/mypy

bench: $(READY)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# An interpreter without ensurepip (Debian's python3 without python3-venv) makes the environment without pip, and the
# pip outside fills it. A .venv whose interpreter has gone is made anew.
$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "int8pass needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "== .venv: creating with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV); \
	    $(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python install -qq pip; }; \
	fi
	@echo "== .venv: 1/3 torch (the large one: several minutes on a slow line)"
	@$(PIP) setuptools torch
	@echo "== .venv: 2/3 transformers, test tools and what they need"
	@$(PIP) --no-build-isolation -e '.[hf,test,bench]'
	@echo "== .venv: 3/3 check"
	@$(BIN)/python -m pip --disable-pip-version-check check >/dev/null || \
	  { $(BIN)/python -m pip --disable-pip-version-check check; exit 1; }
	@$(BIN)/python -c 'import torch; print("== .venv: ready, torch", torch.__version__)'
	@touch $@
