# `make demo` and `make test` need nothing but Python 3.11; both make their own
# virtual environment in .venv (or in VENV=...).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-deployment test-extras lint security check bench tables rates clean

demo: $(STAMP)
	$(BIN)/pilot-flwr run experiment=demo

test: $(STAMP)
	$(BIN)/pytest -n auto --maxprocesses 4

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

# docs/deployment.md command by command: a server and three sites over TLS, on this machine. What a
# 7B model sends takes 16 GiB of memory and is left to `make test-slow`.
test-deployment: $(STAMP)
	$(BIN)/pytest -m slow tests/deployment --ignore tests/deployment/test_payload.py

# Tests that need an extra: a 4-bit base, and captions scored by way of Java.
test-extras: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[captions,quantization]"
	$(BIN)/pytest tests/test_model_options.py tests/metrics

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What bandit finds in the code, and known vulnerabilities of what is installed; where the network
# does not reach the list of these, that is said and is no failure.
security: $(STAMP)
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive pilot_flwr scripts
	$(BIN)/bandit --quiet --skip B101,B311,B404 --recursive benchmarks # random inputs, no secrets
	$(BIN)/python scripts/audit.py

check: lint security test

bench: $(STAMP)
	$(BIN)/python benchmarks/run_all.py

# The README's tables of the two scenarios and of Pilot's ablations, from the committed settings and
# rates; 230 runs. What was stopped goes on when it is called again.
tables: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[sweep]"
	$(BIN)/python benchmarks/scenarios/compare.py
	$(BIN)/python benchmarks/tables.py --readme

# The search of every method's rate, on validation scans and other seeds, from which these rates come.
rates: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[sweep]"
	$(BIN)/python benchmarks/scenarios/search.py

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache
