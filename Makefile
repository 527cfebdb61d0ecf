# Two commands on a machine that has only Python 3.11+ and a package index: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

FUZZ_CASES ?= 20000
FUZZ_JOBS ?= 2

.PHONY: help demo test lint types layers unit oldest fuzz format clean

help:
	@echo "make demo    train, prune, export, bench and evaluate on packaged data; prints one table"
	@echo "make test    lint, types, layering and tests"
	@echo "make oldest  the tests once more, with the oldest releases that pyproject.toml allows"
	@echo "make fuzz    read FUZZ_CASES artefacts, each damaged or forged at random"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the virtual environment and the caches"

demo: $(VENV)/.installed-demo
	$(BIN)/gatepress demo --force

test: lint types layers unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

layers: $(VENV)/.installed-dev
	$(BIN)/lint-imports --no-logo

unit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal --durations 20

# every lower bound of the dependencies, as an exact version
oldest:
	sed -n '/^dependencies/,/^]/ s/^  "\([a-z-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml > .oldest.txt
	PIP_CONSTRAINT=$(CURDIR)/.oldest.txt $(MAKE) VENV=.venv-oldest unit

fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --cases $(FUZZ_CASES) --jobs $(FUZZ_JOBS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"{sys.executable} is Python {sys.version.split()[0]}, expected 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .oldest.txt .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
