# The commands a person needs. `make demo` and `make test` set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= marketplace
MODEL ?=
SOAK_MINUTES ?= 30
export GENRECALL_HOME ?= $(CURDIR)/artifacts
export GENRECALL_DATA ?= $(abspath $(CURDIR)/../shared/data)
# A remote home has no room for a sqlite file: there the registry must be named.
ifeq (,$(findstring ://,$(GENRECALL_HOME)))
export MLFLOW_TRACKING_URI ?= sqlite:///$(GENRECALL_HOME)/mlflow.db
endif
export RAY_AUTH_MODE ?= token
export RAY_USAGE_STATS_ENABLED ?= 0
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S ?= 2

.PHONY: help setup demo serve test lint pipeline mlflow bench-tables soak clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("genrecall needs Python 3.11 or newer, this is %d.%d; try make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

setup: $(VENV)/.installed ## create .venv and install (done by every other command)

demo: setup ## run the whole line on the built-in marketplace and print the results
	$(BIN)/python jobs/run_pipeline.py --recipe marketplace

pipeline: setup ## run the whole line for RECIPE=home_depot, amazon_scientific, ...
	$(BIN)/python jobs/run_pipeline.py --recipe $(RECIPE)

serve: setup ## serve the champion (or MODEL=models:/NAME@ALIAS, with default settings) on http://127.0.0.1:8000
	$(BIN)/serve run $(if $(MODEL),serve_apps.recall:app model=$(MODEL),serve_apps/recall.yaml)

mlflow: setup ## show runs, models and aliases on http://127.0.0.1:5000
	$(BIN)/mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri $(MLFLOW_TRACKING_URI)

bench-tables: setup ## rebuild the quality tables (hours on two cores; resumes)
	$(BIN)/python benchmarks/quality.py

soak: setup ## serve under mixed load for SOAK_MINUTES (30) and write memory, file handles and p99 to benchmarks/results/serving.json
	$(BIN)/python benchmarks/serving.py --tables soak --minutes $(SOAK_MINUTES) $(if $(MODEL),--model $(MODEL))

lint: setup ## ruff, import contracts, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint ## lint, then all tests
	$(BIN)/python -m pytest

clean: ## delete ./artifacts and caches (never another GENRECALL_HOME, and not the environment)
	rm -rf $(CURDIR)/artifacts .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
