# Every target but `help` and `clean` first makes .venv with all that is needed, once.
# PYTHON chooses the interpreter that .venv is made with; ARGS goes to the command of demo, test and bench.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

APT_INSTALL = { apt-get update -qq || true; } >/dev/null; \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

# A quarter of a minute and 300 MB, which only tests, benchmarks and users of --engine ray need.
INSTALL_RAY = $(BIN)/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("ray"))' \
	|| { echo "installing Ray, for the tests and measurements with it"; \
	  $(BIN)/python -m pip install -qq -c constraints.txt -e '.[ray]'; }

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help setup demo test long check lint types format simulate soak fuzz bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv (once; again when pyproject.toml or constraints.txt change)
	@echo ".venv is ready"

demo: $(READY) ## train a real model on this machine's cores
	@$(BIN)/paceline demo $(ARGS)

test: $(READY) ## run the tests
	@if ! command -v strace >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Debian's strace: some tests of checkpoints kill at system calls with it, and skip without"; \
	  $(APT_INSTALL) strace >/dev/null || echo "strace could not be installed"; \
	fi
	@if ! command -v ip >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Debian's iproute2: some tests make two hosts of network namespaces with it, and skip without"; \
	  $(APT_INSTALL) iproute2 >/dev/null || echo "iproute2 could not be installed"; \
	fi
	@$(INSTALL_RAY)
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

long: $(READY) ## the tests that test leaves out: more moments of kills, runs across network namespaces
	@$(INSTALL_RAY)
	@$(BIN)/python -m pytest -m long $(ARGS)

check: lint types test ## lint, types and tests: what must pass before a change lands

lint: $(READY) ## ruff: rules and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(READY) ## mypy, strict
	@$(BIN)/mypy

format: $(READY) ## let ruff mend what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

simulate: $(READY) ## N simulated schedules of faults (10000)
	@$(BIN)/python -m tests.simulation $(or $(N),10000) $(ARGS)

soak: $(READY) ## kill KILLS processes of real jobs at every pace (200), and count every sample
	@$(BIN)/python -m tests.process.soak $(or $(KILLS),200) $(ARGS)

fuzz: $(READY) ## N damaged inputs for every decoder of bytes from elsewhere (100000)
	@$(BIN)/python -m tests.fuzz $(or $(N),100000) $(ARGS)

bench: $(READY) ## measure on this machine, beside DDP, torch.distributed.rpc and Ray (installs Ray)
	@$(INSTALL_RAY)
	@$(BIN)/python -m benchmarks.one_host $(ARGS)

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 comes without ensurepip, and `venv` fails without it: the package python3-venv brings it.
CAN_MAKE_VENV = $(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

$(READY): pyproject.toml constraints.txt
	@if ! $(CAN_MAKE_VENV) && [ "$(PYTHON)" = python3 ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Debian's python3-venv"; \
	  $(APT_INSTALL) python3 python3-venv >/dev/null || true; \
	fi
	@if ! $(CAN_MAKE_VENV); then \
	  echo "error: '$(PYTHON)' cannot make a virtual environment ($$($(PYTHON) --version 2>/dev/null || echo 'it does not start'))" >&2; \
	  echo "why:   CPython 3.11 or newer with the modules venv and ensurepip is needed" >&2; \
	  echo "fix:   sudo apt-get install python3-venv      or, for another Python: make setup PYTHON=python3.12" >&2; \
	  exit 1; \
	fi
	@echo "setting up .venv (once, about a minute)"
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,examples]'
	@touch $@
