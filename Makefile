# `make` alone lists what there is. Everything runs in .venv, which is made on first use.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv/peers
RUN := runs/demo
# How many processes run tests at once: one more than the cores of a small machine, as tests often
# wait. Each test file runs in one of them, the slow ones come first.
JOBS ?= 3
SESSION := elastic=session
# SIGKILL to rank 1 as it is about to do step 70.
PLANNED_KILL := kill@demo.step:rank=1,step=70

.PHONY: help venv train test soak bench lint clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

venv: $(INSTALLED) ## Make .venv and install Planaria into it (again when its versions change)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Planaria needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name one that is: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11"; exit 1; } >&2
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
# The pinned torch is named outright: a mere constraint lets pip look at newer builds first.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt "$$(grep '^torch==' constraints.txt)" -e '.[dev]'
	@touch $@

train: venv ## Train the demo on 4 ranks: one is killed on the way, the others go on, bit for bit
	@if [ ! -e $(RUN) ]; then \
	  echo "[1/3] An undisturbed reference, on 2 ranks:"; \
	  $(BIN)/planaria run --run $(RUN)-reference --fresh $(SESSION) -n 2 || exit $$?; \
	  echo; \
	  echo "[2/3] The same on 4 ranks; rank 1 is killed (SIGKILL) at step 70, on purpose:"; \
	else \
	  echo "$(RUN) exists: an unfinished run resumes, a finished one shows its summary."; \
	  echo "To begin again: rm -r $(RUN)"; \
	fi
	@PLANARIA_FAULTS='$(PLANNED_KILL)' $(BIN)/planaria run --run $(RUN) $(SESSION) -n 4 \
	  --reference $(RUN)-reference
	@echo
	@echo "[3/3] What happened, in time:"
	@$(BIN)/planaria trace $(RUN) --ranks $(RUN)/ranks.png --reference $(RUN)-reference

test: venv ## Run all tests but the long ones
# The processes that tests start find everything compiled.
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m "not soak" -n $(JOBS) --dist loadfile --no-loadscope-reorder

soak: venv ## Run the long, randomised tests
	$(BIN)/pytest -m soak --timeout 3600

bench: venv ## Run every benchmark, or one: make bench SUITE=load ARGS="--mb 256"
	@if [ $(PEERS) -ot $(INSTALLED) ]; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e '.[bench,peers]' && touch $(PEERS) || \
	  echo "Not all peers could be installed; those that are missing give no figures." >&2; \
	fi
	@failed=; \
	for script in tests/benchmarks/bench_$(or $(SUITE),*).py; do \
	  echo "== $$script"; \
	  $(BIN)/python "$$script" $(ARGS) || failed="$$failed $$script"; \
	done; \
	if [ -n "$$failed" ]; then echo "Failed:$$failed" >&2; exit 1; fi

lint: venv ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean: ## Remove what was built and cached (not .venv, not runs/)
	rm -rf build dist src/*.egg-info .hypothesis .ruff_cache .pytest_cache .coverage
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
