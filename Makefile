# Everything works in .venv/, which `make venv` builds. `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The build finds meson, ninja and cython by name: those of .venv/ come first.
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := $(shell find src -name '*.py' -o -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.[ch]') meson.build meson.options src/userswap/meson.build pyproject.toml
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help venv demo bench test compat examples stress lint debug sanitize clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(BIN)/.tools: pyproject.toml
	@echo "==> setting up $(VENV) (once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "userswap needs Python 3.11 or newer; say which one with: make PYTHON=/path/to/python3.12")'
	@command -v $${CC:-cc} >/dev/null || { echo "a C compiler is needed: on Debian and Ubuntu, apt-get install gcc"; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(0 if pathlib.Path(sysconfig.get_path("include"), "Python.h").exists() else "the headers of Python are needed to build: on Debian and Ubuntu, apt-get install python3-dev")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PIP) install 'meson-python>=0.17' 'meson>=1.4' ninja 'cython>=3.1' 'numpy>=2.0' 'blosc2>=4.1' 'rich>=13' 'matplotlib>=3.8' 'pandas>=2.2' 'joblib>=1.4' \
	    'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6' 'py-spy>=0.4' 'memray>=1.15' 'mypy>=1.11' 'ruff>=0.6' 'cython-lint>=0.16'
	@touch $@

$(BIN)/.built: $(BIN)/.tools $(SOURCES)
	@echo "==> building userswap"
	@mkdir -p build
	@$(PIP) install --no-build-isolation --no-deps --force-reinstall -Cbuild-dir=build/release . || { echo "the build failed: its log is above"; exit 1; }
	@touch $@

venv: $(BIN)/.built  ## build .venv/ with userswap and the tools in it

demo: $(BIN)/.built  ## the main job on real data, in less memory than it needs
	@$(BIN)/python examples/demo.py

bench: $(BIN)/.built  ## how fast it is on this machine, beside the kernel's swap and others
	@$(BIN)/userswap bench compare --quick

# Half of the time a test waits for processes, disks and moments, so two can run at once: tests/conftest.py says which may.
JOBS ?= 0
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS)

test: $(BIN)/.built  ## run the tests (JOBS=2: two at once)
	@$(PYTEST)
	@echo "Every test passed: swapped memory on this machine reads back byte for byte, under threads, forks, system calls and full disks."

# Other people's libraries in exact versions, and userswap as a wheel: in an environment of their own.
COMPAT := .venv-compat
REQUIRED := compat/requirements.txt examples/requirements.txt examples/requirements-torch.txt
$(COMPAT)/.built: $(BIN)/.built $(REQUIRED)
	@echo "==> setting up $(COMPAT)"
	@$(COMPAT)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(COMPAT)
	@$(COMPAT)/bin/python -m pip --disable-pip-version-check -q install -r compat/requirements.txt
	@$(COMPAT)/bin/python -m pip --disable-pip-version-check -q install -r examples/requirements-torch.txt 2>/dev/null \
	    || echo "==> going on without PyTorch: pip finds no build for processors alone (PIP_EXTRA_INDEX_URL may name PyTorch's own index)"
	@rm -rf build/wheel
	@$(PIP) wheel --no-build-isolation --no-deps -Cbuild-dir=build/release -w build/wheel .
	@$(COMPAT)/bin/python -m pip --disable-pip-version-check -q install --no-deps --force-reinstall build/wheel/*.whl
	@touch $@

compat: $(COMPAT)/.built  ## other people's test suites under swapped memory (two hours; SUITES="h5py numpy:fft" for some)
	@$(BIN)/python -m compat $(SUITES)

examples: $(COMPAT)/.built  ## real programs in a third of the memory they need (PROGRAMS="orders stack" for some)
	@$(COMPAT)/bin/python examples/real_programs.py $(PROGRAMS)

MINUTES ?= 60
SEED ?= 1
stress: $(BIN)/.built  ## everything at once under settings drawn by a seed, every byte checked (MINUTES=60 SEED=1)
	@$(BIN)/python -m stress --minutes $(MINUTES) --seed $(SEED)

lint: $(BIN)/.built  ## ruff, mypy --strict, cython-lint
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/cython-lint --max-line-length 120 src

# $(1): name of the build, $(2): its meson options
define install-to
	@mkdir -p build
	@rm -rf build/$(1)-site
	@$(PIP) install --no-build-isolation --no-deps --target build/$(1)-site -Cbuild-dir=build/$(1) $(2) .
endef

debug: $(BIN)/.tools  ## the tests on a build with assertions, lock checks and injected delays
	$(call install-to,debug,-Csetup-args=-Dassertions=true -Csetup-args=-Dbuildtype=debugoptimized)
	@USERSWAP_CHAOS=$${USERSWAP_CHAOS:-200} PYTHONPATH=$(CURDIR)/build/debug-site $(PYTEST)

# Alignment is left out: the wrappers of system calls read what programs pass, aligned or not.
sanitize: $(BIN)/.tools  ## the tests on a build with the undefined-behaviour sanitizer
	$(call install-to,sanitize,-Csetup-args=-Dassertions=true -Csetup-args=-Db_sanitize=undefined -Csetup-args=-Db_lundef=false -Csetup-args=-Dc_args=-fno-sanitize=alignment)
	@UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=$(CURDIR)/build/sanitize-site $(PYTEST)

clean:  ## remove what was built, .venv/ too
	@rm -rf build $(VENV) $(COMPAT)
