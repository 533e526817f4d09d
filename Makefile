# `make demo`, `make real` and `make test` each do all the set-up they need on a fresh machine with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo study real test suite test-all check tiny clean

demo: $(VENV)/installed  ## phase 1 of the study on the embedded model, then its table
	$(BIN)/python train.py --config configs/tiny_phase1.toml
	$(BIN)/python evaluate.py --run runs/tiny_phase1

# Two processes of one thread each are faster on two cores than one process of two threads.
study: $(VENV)/installed-report  ## the whole search on the embedded model, its verdict and its report
	$(BIN)/python study.py --config configs/tiny_study.toml --exhaustive --workers 2

real: $(VENV)/installed-real  ## a real chat model of 135 M parameters: fetched, fine-tuned plain and with an anchor, and judged
	$(BIN)/python -m minipersona.cli.real

test: $(VENV)/installed-dev  ## style, types and the whole test suite, the types while the tests run
	$(MAKE) --jobs 2 check suite

suite: export PYTHONDONTWRITEBYTECODE =  # else each of some hundred processes compiles the package anew
suite: $(VENV)/installed-dev  ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist loadscope

test-all: check  ## the same and what takes half a minute and more: a Ray cluster, every rank as the culprit
	$(BIN)/python -m pytest -n auto --dist loadscope -m ""

check: $(VENV)/installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tiny: $(VENV)/installed  ## make the embedded model anew
	$(BIN)/python -m minipersona.tiny

clean:  ## remove the virtual environment and what the demo, the study and the real model left
	rm -rf $(VENV) runs/tiny_phase1 studies/tiny runs/smollm2* models/smollm2

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; run make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-real: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[data,gguf]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-report: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[report]'
	@touch $@ $(VENV)/installed

# Compiling all that is installed takes half a minute of one core; the suite compiles what it imports.
$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --no-compile --editable '.[data,dev,report]'
	@touch $@ $(VENV)/installed
