# One environment, .venv in the checkout; every target is safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MLFLOW_DISABLE_TELEMETRY := true
export OMP_NUM_THREADS ?= 1

.PHONY: help demo setup test test-all lint format lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tsforge needs CPython 3.11 or newer; point make at one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/.core: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.core $@

demo: $(VENV)/.core  ## install and run the main job on the embedded data (no network, no server)
	$(BIN)/tsforge demo

setup: $(VENV)/.dev  ## install with everything needed to work on tsforge

test: $(VENV)/.dev  ## the tests: everything but slow and GPU (browser tests skip without Chromium)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow and not gpu"

test-all: $(VENV)/.dev  ## every test, slow ones too
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

lint: $(VENV)/.dev  ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the sources in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(VENV)/.dev  ## write the versions of this (passing) environment to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' | grep -v ' @ ' > constraints.txt

clean:  ## remove the environment and caches (not your data)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
