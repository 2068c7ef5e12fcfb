# Two commands on a fresh machine: `make demo` and `make test`. Both make an environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One release of torch and torchvision, so that two machines resize and compute alike.
TORCH ?= torch==2.14.1 torchvision==0.29.1

# Tests run in two processes; two threads in each would wait for one another most of the time.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-fast check check-static install clean

demo: $(VENV)/.installed
	$(BIN)/scalekd demo --overwrite

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not table"

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not table"

# Format, lint, types (of the tree as it is installed), then tests.
check: check-static test

check-static: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/typecheck build/lib build/bdist.*
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	$(BIN)/mypy build/typecheck/scalekd

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev,bench]"
	touch $@

clean:
	rm -rf build dist output $(VENV)
