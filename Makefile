# Start with `make help`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
BENCHMARKS := $(filter-out __init__ timing,$(basename $(notdir $(wildcard benchmarks/*.py))))

# Two test processes on two cores: one thread each, or they get in each other's way.
test test-long: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-long audit check format bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Create .venv and install hemofed with everything that is pinned in constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray,records]'
	@touch $@

demo: setup ## Four simulated hospitals learn together; the outcome goes to runs/demo
	@if [ -e $(DEMO)/.finished ]; then rm -rf $(DEMO); fi
	$(BIN)/hemofed-sim run simulation/studies/demo.toml --out $(DEMO) --resume
	@touch $(DEMO)/.finished

test: setup ## Run the fast tests (at most 10 minutes on 2 cores)
	$(BIN)/pytest -m "not long" -n 2

test-long: setup ## Run the tests marked long (at most 60 minutes)
	$(BIN)/pytest -m long

audit: setup ## Attack our own training; needs new folders runs/audit-* (about 40 minutes on 1 core)
	OMP_NUM_THREADS=1 $(BIN)/hemofed-sim audit --out runs/audit-finetune
	OMP_NUM_THREADS=1 $(BIN)/hemofed-sim audit --out runs/audit-pretrain --what pretrain

check: setup ## Check style, format, types and which package may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Mend style and format where that can be done without thinking
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Run all benchmarks; each prints ratios from one run
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

clean: ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
