# What can be done here. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Hundreds of interpreters start in the tests: without kept bytecode each compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
DATA ?= .stack
TIME_SCALE ?= 10
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up-done
SOURCES := router models_backend local bench plugins dags tests
# Those with the longest tests first, so that no process is left with them at the end.
FAST_TESTS := tests/integration tests/fundamentals tests/unit
BESIDE_TESTS := tests/airflow tests/chaos tests/browser $(FAST_TESTS)
BESIDE := -q -m "not soak and not alone" -n 4 --dist loadfile --no-loadscope-reorder
ALONE_TESTS = $(shell grep -rlE '^[^#]*mark\.alone' --include='test_*.py' tests | sort)
# Taken when make starts, so that setting up counts as part of a demo.
export ROUTER_DEMO_STARTED_AT := $(shell date +%s)

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-13s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## a virtual environment in .venv with the locked packages (needs Python 3.10 to 3.13)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.10 to 3.13 is needed; $(PYTHON) is not one. Name another: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip sync --quiet requirements.txt
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $@

up: setup  ## start the embedded stack and leave it open (DATA=.stack TIME_SCALE=10)
	@exec $(BIN)/python -m local up --data "$(DATA)" --time-scale $(TIME_SCALE) $(ARGS)

demo: setup  ## the stack, a backlog, and a live view of its solving (ARGS="--tasks N --exit --json FILE")
	@exec $(BIN)/python -m bench.demo --data "$(DATA)" --time-scale $(TIME_SCALE) $(ARGS)

demo-learning: setup  ## days of traffic, with a review every night and without (ARGS="--days N --json FILE --plot FILE")
	@exec $(BIN)/python -m bench.learning_demo $(ARGS)

test: test-beside test-alone  ## all tests but the long ones

test-beside: setup
	$(BIN)/pytest $(BESIDE) $(BESIDE_TESTS)

test-alone: setup
	$(BIN)/pytest -q -m "alone and not soak" $(ALONE_TESTS)

# Together with `test`, which runs them among the others, they do not run twice.
ifeq ($(filter test,$(MAKECMDGOALS)),)
test-fast: setup
	$(BIN)/pytest $(BESIDE) $(FAST_TESTS)
else
test-fast: test-beside
endif

check: lint test-fast  ## style, types, floors, left-over marks, fast tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@found=$$(grep -rsnE '\b(TO''DO|FIX''ME|X''XX|HA''CK)\b' --include='*.py' --include='*.sql' --include='*.lua' \
	  --include='*.md' --include='*.yaml' --include='*.html' --include='*.js' --include='*.css' \
	  $(SOURCES) sql config docs *.md *.yaml || true); \
	test -z "$$found" || { echo "$$found"; echo "Left-over marks: finish them or take them out."; exit 1; }

soak: setup  ## the long tests
	$(BIN)/pytest -q -m soak $(ARGS)

bench: setup  ## the measurements of bench/ that need no data, each printing its table; the others say what they want: --help
	@missed=""; for name in answering console limiter old_vs_new queue; do \
	  echo "== bench.$$name"; $(BIN)/python -m bench.$$name $(ARGS) || missed="$$missed $$name"; done; \
	test -z "$$missed" || { echo "Missed an aim:$$missed"; exit 1; }

lock: setup  ## compile requirements.txt anew from pyproject.toml
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-header \
	  --no-annotate pyproject.toml -o requirements.txt

clean:  ## remove what make made: the virtual environment, caches and $(DATA)
	rm -rf $(VENV) "$(DATA)" .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup up demo demo-learning test test-beside test-alone test-fast check lint soak bench lock clean
