# `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# The tests start hundreds of interpreters: without bytecode files each would compile all of its imports.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
DATA ?= .stack
TIME_SCALE ?= 10
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up-done
SOURCES := router models_backend local bench plugins dags tests
# Longest tests first, so that no test process ends up alone with them.
FAST_TESTS := tests/integration tests/fundamentals tests/unit
PARALLEL_TESTS := tests/airflow tests/chaos tests/browser $(FAST_TESTS)
PARALLEL := -q -m "not soak and not alone" -n 4 --dist loadfile --no-loadscope-reorder
ALONE_TESTS = $(shell grep -rlE '^[^#]*mark\.alone' --include='test_*.py' tests | sort)
# Read when make starts, so that the demo's time includes the set-up.
export ROUTER_DEMO_STARTED_AT := $(shell date +%s)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-13s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## create .venv with the locked packages (needs Python 3.10 to 3.13)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) is not Python 3.10 to 3.13. Use another one: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot create a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip sync --quiet requirements.txt
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $@

up: setup  ## start the embedded stack (DATA=.stack TIME_SCALE=10)
	@exec $(BIN)/python -m local up --data "$(DATA)" --time-scale $(TIME_SCALE) $(ARGS)

demo: setup  ## start the stack, solve a backlog with a live view, audit every window (ARGS="--tasks N --exit --json FILE")
	@exec $(BIN)/python -m bench.demo --data "$(DATA)" --time-scale $(TIME_SCALE) $(ARGS)

demo-learning: setup  ## simulate days of traffic with and without nightly reviews (ARGS="--days N --json FILE --plot FILE")
	@exec $(BIN)/python -m bench.learning_demo $(ARGS)

test: test-parallel test-alone  ## run all tests but the soak tests

test-parallel: setup
	$(BIN)/pytest $(PARALLEL) $(PARALLEL_TESTS)

test-alone: setup
	$(BIN)/pytest -q -m "alone and not soak" $(ALONE_TESTS)

# With `test`, which includes them, they do not run twice.
ifeq ($(filter test,$(MAKECMDGOALS)),)
test-fast: setup
	$(BIN)/pytest $(PARALLEL) $(FAST_TESTS)
else
test-fast: test-parallel
endif

check: lint test-fast  ## check style, types and import contracts, run the fast tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@found=$$(grep -rsnE '\b(TO''DO|FIX''ME|X''XX|HA''CK)\b' --include='*.py' --include='*.sql' --include='*.lua' \
	  --include='*.md' --include='*.yaml' --include='*.html' --include='*.js' --include='*.css' \
	  $(SOURCES) sql config docs *.md *.yaml || true); \
	test -z "$$found" || { echo "$$found"; echo "Unfinished marks: resolve or remove them."; exit 1; }

soak: setup  ## run the soak tests
	$(BIN)/pytest -q -m soak $(ARGS)

bench: setup  ## run the benchmarks that need no data files; see --help of the others
	@missed=""; for name in answering console limiter old_vs_new queue; do \
	  echo "== bench.$$name"; $(BIN)/python -m bench.$$name $(ARGS) || missed="$$missed $$name"; done; \
	test -z "$$missed" || { echo "Missed a target:$$missed"; exit 1; }

lock: setup  ## compile requirements.txt from pyproject.toml
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-header \
	  --no-annotate pyproject.toml -o requirements.txt

clean:  ## remove .venv, caches and $(DATA)
	@target=$$(readlink "$(DATA)/postgres" || true); \
	case "$$target" in /var/lib/llm-router/postgres-*/data) rm -rf "$${target%/data}";; esac
	rm -rf $(VENV) "$(DATA)" .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup up demo demo-learning test test-parallel test-alone test-fast check lint soak bench lock clean
