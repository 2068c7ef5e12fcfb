# Two commands on a fresh machine: `make demo` and `make test`. Both make an environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One release of torch and torchvision, so that two machines resize and compute alike.
TORCH ?= torch==2.14.1 torchvision==0.29.1

# Tests run in two processes; two threads in each would wait for one another most of the time.
export OMP_NUM_THREADS ?= 1

.PHONY: demo docs test test-fast check check-static install clean bench-accuracy bench-speed

demo: $(VENV)/.installed
	@echo "running scalekd demo: about a minute and a half on two free cores"
	$(BIN)/scalekd demo --overwrite

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not table"

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not table"

# Format, lint, types and the direction of imports (of the tree as it is installed), then tests.
check: check-static test

check-static: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/typecheck build/lib build/bdist.*
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	$(BIN)/mypy build/typecheck/scalekd
	cd build/typecheck && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-cache --no-logo $(CURDIR)/pyproject.toml

# Some hours for the whole grid; finished runs are kept, and several of these may run side by side.
# QUICK=1 takes some minutes and writes accuracy-quick.jsonl. DATA=DIR is where the data lie, when
# not in ../shared/data (README, Development).
bench-accuracy: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.accuracy $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA))
	$(BIN)/python -m benchmarks.accuracy.flops
	$(BIN)/python -m benchmarks.report

# QUICK=1 takes at most ten minutes on two free cores and writes speed-quick.json.
bench-speed: $(VENV)/.installed-dev build/mosaicml-streaming/.installed
	$(BIN)/python -m benchmarks.speed $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA))
	$(BIN)/python -m benchmarks.report

# Its dependencies and this project's exclude one another; what both need is shared.
build/mosaicml-streaming/.installed:
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')" \
		> $$(echo $(@D)/lib/python3*/site-packages)/shared.pth
	$(@D)/bin/python -m pip install --quiet "mosaicml-streaming>=0.13,<0.14" || \
		echo "mosaicml-streaming cannot be installed here; it will be left out"
	touch $@

# The documentation as a site in build/site; fails on every warning, such as a dead link.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "installing into $(VENV), in two steps; pip shows what it fetches"
	@echo "step 1 of 2: $(TORCH)"
	@echo "  The default build of torch is for CUDA, more than 5 GB with its libraries. Where your index,"
	@echo "  a mirror or a folder has a build for CPUs (see docs/install.md), stop this and run"
	@echo "  make $(or $(MAKECMDGOALS),install) TORCH=\"$(TORCH) --index-url URL\"   (or --find-links FOLDER)"
	$(BIN)/python -m pip install $(TORCH)
	@echo "step 2 of 2: scalekd and its other dependencies"
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what tests, checks and documents need"
	$(BIN)/python -m pip install -e ".[dev,bench,docs]"
	touch $@

clean:
	rm -rf build dist output $(VENV)
