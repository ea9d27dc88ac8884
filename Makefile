# Everything a bare machine needs is Python 3.11, git and make; the rest lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format lock faults bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(READY): requirements.lock pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(READY)  ## install everything into .venv

demo: setup  ## bill a month: generated usage, or FILES="a.csv b.csv" ARGS="--map ..."
	$(BIN)/python -m examples.demo $(FILES) $(ARGS)

test: setup  ## run the tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --ignore tests/faults
	$(BIN)/python -m pytest -q tests/faults

check: setup  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## put the code in its standard form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(BIN)/uv  ## renew requirements.lock (UPGRADE=1 takes newer versions)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" \
		$(if $(UPGRADE),--upgrade) --all-extras --group jobs --group dev pyproject.toml --output-file requirements.lock

ROUNDS ?= 50
FAULTS ?= tests/faults
faults: setup  ## kill everything ROUNDS times (default 50) and compare what is left
	TALLYSTICK_FAULT_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest -q $(FAULTS) --timeout 3600

bench: setup  ## figures beside a floor and a peer
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## remove what was generated, keep .venv
	rm -rf .tallystick .prefect .hypothesis .pytest_cache .mypy_cache .ruff_cache
