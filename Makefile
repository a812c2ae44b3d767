# `make` lists the targets. Every target but help sets up .venv first, when it is missing or out of date.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
INDEX ?=
STORE ?= sqlite:///runs/mlflow.db
PORT ?= 5000
WORKERS ?= 2
SERVICES ?= yes
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo ui test test-all lint bench

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12      the Python of .venv, 3.11 or newer"
	@echo "  ARGS='workers=4'       further key=value settings of the demo, options of pytest or of the bench"
	@echo "  WORKERS=8              processes of \`make test\`, one thread and about 1.5 GB each"
	@echo "  SERVICES=no            \`make test\` as root on Debian or Ubuntu installs no SLURM and no PostgreSQL"
	@echo "  STORE=URI PORT=5000    what \`make ui\` shows, and where"
	@echo "  make setup INDEX=URL   for CUDA: the wheel index that PyTorch's install page names for your driver"

setup: $(STAMP) ## make or update .venv

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON=$(PYTHON): needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV): a few minutes, 3 GB"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check \
		$(if $(INDEX),--extra-index-url $(INDEX)) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train, watch models collapse, mend them: about 3 minutes on 2 cores
	@$(RUN) -m sweeps.run conf/sweep/demo.yaml $(ARGS)

ui: $(STAMP) ## every run in the browser, on 127.0.0.1 only
	@mkdir -p runs
	@echo "http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning (Ctrl-C stops it)"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true $(VENV)/bin/mlflow ui \
		--backend-store-uri $(STORE) --host 127.0.0.1 --port $(PORT) --workers 1

test: $(STAMP) ## the tests, about 12 minutes on 2 cores
	@test $(SERVICES) = no || tests/install_services.sh
	@$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: $(STAMP) ## all tests, minutes-long and GPU ones included
	@test $(SERVICES) = no || tests/install_services.sh
	@$(RUN) -m pytest $(ARGS)

lint: $(STAMP) ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: $(STAMP) ## our kernels against their peers
	@$(RUN) -m kernels.bench $(ARGS)
