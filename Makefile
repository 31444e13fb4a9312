# Every target creates its virtual environment in .venv (or in VENV=...) and needs only Python 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := demo
.PHONY: help demo test test-slow test-deployment test-payload test-extras robustness lint security check docs dist \
	bench emoji tables rates clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

demo: $(STAMP) ## run the demo federation
	$(BIN)/pilot-flwr run experiment=demo

test: $(STAMP) ## run the tests, except those marked slow
	$(BIN)/pytest -n auto --maxprocesses 4

test-slow: $(STAMP) ## run the tests marked slow, but for the deployment
	$(BIN)/pytest -m slow --ignore tests/deployment

test-payload: $(STAMP) ## send what a 7B model exchanges (16 GiB of memory)
	$(BIN)/pytest -m slow tests/deployment/test_payload.py

# docs/how-to/deployment.md command by command.
test-deployment: $(STAMP) ## deploy a server and three sites over TLS on this machine
	$(BIN)/pytest -m slow tests/deployment --ignore tests/deployment/test_payload.py

test-extras: $(STAMP) ## test the extras: a 4-bit base model, and captions scored with Java
	$(BIN)/pip install --quiet --editable ".[captions,quantization]"
	$(BIN)/pytest tests/model/test_model_options.py tests/metrics

robustness: $(STAMP) ## fuzz every reader, kill and resume whole runs, kill real sites (50 minutes)
	$(BIN)/python tests/robustness/fuzz/run.py
	$(BIN)/python tests/robustness/faults/run.py
	$(BIN)/python tests/robustness/faults/sites.py

lint: $(STAMP) ## check format, lint, types and the order of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Without network the packages are not audited: that is reported, but not a failure.
security: $(STAMP) ## check the code with bandit and the installed packages for vulnerabilities
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive pilot_flwr scripts
	$(BIN)/bandit --quiet --skip B101,B311,B404 --recursive benchmarks \
		tests/robustness/faults tests/robustness/fuzz # random inputs, no secrets
	$(BIN)/python scripts/audit.py

check: lint security test ## lint, security and test

docs: $(STAMP) ## build the documentation site into site/, strictly
	$(BIN)/pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(STAMP) ## build and check the wheel, the source archive and Flower's app bundle
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	cd dist && $(abspath $(BIN))/flwr build --app ..

bench: $(STAMP) ## update benchmarks/results (45 minutes)
	$(BIN)/python benchmarks/run_all.py

EMOJI := outputs/emoji/base/training.json

emoji: $(EMOJI) ## make the emoji federations and their base model (5 minutes)

$(EMOJI): benchmarks/emoji/base.py benchmarks/emoji/federation.py | $(STAMP)
	$(BIN)/pip install --quiet --editable ".[captions]"
	$(BIN)/python benchmarks/emoji/federation.py
	$(BIN)/python benchmarks/emoji/base.py

rates: $(EMOJI) ## search every method's learning rate on validation rows; gate and power
	$(BIN)/python benchmarks/emoji/search.py
	$(BIN)/python benchmarks/emoji/gate.py
	$(BIN)/python benchmarks/emoji/power.py

# Uses the committed rates; repeat it to resume.
tables: $(EMOJI) ## compare all methods on test rows (one night), update every table and figure
	@echo "All runs take about 9 hours on two cores; if interrupted, make tables resumes."
	$(BIN)/python benchmarks/emoji/compare.py
	$(BIN)/python benchmarks/emoji/curves.py
	$(BIN)/python benchmarks/emoji/mechanisms.py
	$(BIN)/python benchmarks/emoji/figure.py
	$(BIN)/python benchmarks/tables.py --readme

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean: ## remove the environment, caches, outputs and distributions
	rm -rf $(VENV) outputs dist .pytest_cache .mypy_cache .ruff_cache
