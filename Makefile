# Builds, checks and runs evovlm. `make help` lists what there is.
#
# Everything is installed into $(VENV), first torch and what builds csrc/, then evovlm itself in editable form without
# build isolation: torch is 900 MB and would otherwise be unpacked twice. Stamp files in $(VENV) say what is done.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
PIP_QUIET ?= --quiet --quiet

FOLDERS := csrc parallel models data engine launch
PACKAGE_INPUTS := pyproject.toml setup.py constraints.txt $(foreach kind,cpp h cu cuh,$(wildcard csrc/*.$(kind)))

export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install install-dev quickstart verify test lint types imports pytest test-gpu bench docs format links clean distclean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: install  ## Make small real data, train a tiny model on it and print what it learned
	$(BIN)/evovlm quickstart $(QUICKSTART_ARGS)

test: lint types imports pytest docs  ## Everything that must hold before a commit

lint: install-dev  ## Style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-dev  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install-dev links  ## Static types of the whole package
	$(BIN)/mypy

imports: install-dev links  ## Which folder may import which
	PYTHONPATH=build/src $(BIN)/lint-imports --no-logo

# One thread for each test process: the tests run side by side, and start ranks of their own.
pytest: install-dev  ## The tests; PYTEST_ARGS="-k packing -x" for some of them
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)

test-gpu: install-dev  ## The tests that need a CUDA device
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch sees no CUDA device")'
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)

verify: install  ## Compare every layout with one process, in float64 and float32 (some minutes)
	$(BIN)/evovlm verify --json build/verify-float64.json
	$(BIN)/evovlm verify --precision float32 --json build/verify-float32.json
	$(BIN)/evovlm verify --loss mpo --json build/verify-mpo.json

bench: install  ## Measure this machine; results in build/bench.json
	$(BIN)/python -m evovlm.launch.bench --out build/bench.json $(BENCH_ARGS)

docs: install-dev links  ## The documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install: $(VENV)/.installed  ## evovlm and the quickstart's data packages, into .venv

install-dev: $(VENV)/.installed-dev  ## The same and the tools of `make test`

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; say where: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.build-requirements: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		> $(VENV)/build-requirements.txt
	@echo "Installing torch and what builds csrc/ into $(VENV): 900 MB on disk, once"
	$(BIN)/pip install $(PIP_QUIET) -r $(VENV)/build-requirements.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.build-requirements $(PACKAGE_INPUTS)
	$(BIN)/pip install $(PIP_QUIET) --no-build-isolation -e '.[quickstart]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.build-requirements $(PACKAGE_INPUTS)
	$(BIN)/pip install $(PIP_QUIET) --no-build-isolation -e '.[dev,quickstart]'
	@touch $(VENV)/.installed $@

# evovlm is a namespace package that setup.py maps from the folders; tools that read sources need it as a tree.
links:
	@mkdir -p build/src/evovlm
	@for folder in $(FOLDERS); do ln -sfn ../../../$$folder build/src/evovlm/$$folder; done

clean:  ## Remove what was built, except .venv and runs/
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find $(FOLDERS) -name '*.so' -delete
	find $(FOLDERS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV)/.installed-dev

distclean: clean  ## Remove .venv, too
	rm -rf $(VENV)
