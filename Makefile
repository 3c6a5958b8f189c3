# make demo    train a small LLaMA with Q-GaLore on real text and plot the loss
# make test    build if needed and run every test: C programs, sanitizers, valgrind, pytest
# make help    the rest
#
# Everything is installed into .venv. Nothing that is up to date is done again.

PYTHON ?= python3
# What pip is told to install as torch. Without a version pip takes the newest CUDA build, several GB.
TORCH ?= torch==2.13.0
# More arguments for pytest, e.g. make test PYTEST_ARGS="-k adam8 -x"
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check install --no-build-isolation
STAMPS := $(VENV)/.stamps
MAKEFLAGS += --no-print-directory
CSRC := $(shell find csrc -path csrc/tests -prune -o -type f \( -name '*.c' -o -name '*.h' -o -name '*.inc' -o -name '*.cpp' \
	-o -name '*.cu' -o -name '*.cuh' \) -print)

C_FILES := find csrc examples -path csrc/tests/build -prune -o -type f \( -name '*.c' -o -name '*.h' -o -name '*.inc' -o -name '*.cpp' \
	-o -name '*.cu' -o -name '*.cuh' \) -print0

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test ctest pytest build bench lint ruff mypy clang-format format sanitize gpu-check registers clean distclean

help:
	@echo "make demo       train a small LLaMA with Q-GaLore on real text, print held-out loss, plot the curve"
	@echo "make test       build if needed and run every test (C programs, sanitizers, valgrind, pytest)"
	@echo "make build      make .venv and build the extension in place"
	@echo "make ctest      the C test programs alone: plain, ASan + UBSan, valgrind"
	@echo "make pytest     the Python tests alone"
	@echo "make sanitize   the Python tests against an extension built with ASan + UBSan"
	@echo "make gpu-check  what needs a GPU: tests, compute-sanitizer, benchmarks, with the torch of PYTHON; some minutes"
	@echo "make registers  write csrc/cuda/registers.txt with the nvcc that is here"
	@echo "make bench      the benchmarks"
	@echo "make lint       ruff, mypy, clang-format;   make format applies ruff format and clang-format"
	@echo "make clean      remove what was built;   make distclean removes .venv too"
	@echo "Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) PYTEST_ARGS=$(PYTEST_ARGS)"

# OpenMP threads that wait by spinning make everything several times slower on a machine with other work.
demo pytest ctest sanitize: export OMP_WAIT_POLICY ?= passive

# A warning of a compiler newer than ours must not stop the demo.
demo: export Q_GALORE_WERROR ?= 0
demo: $(STAMPS)/plot $(STAMPS)/built
	$(PY) examples/run_pretrain.py --demo

test: ctest pytest

# Some of the tests run the CUDA kernels on the emulator.
pytest: $(STAMPS)/test $(STAMPS)/built
	@$(MAKE) -C csrc/tests emulated
	$(PY) -m pytest -rs $(PYTEST_ARGS)

build: $(STAMPS)/installed $(STAMPS)/built

bench: $(STAMPS)/plot $(STAMPS)/built
	$(PY) benchmarks/bench_kernels.py
	$(PY) benchmarks/bench_step.py
	$(PY) benchmarks/bench_refresh.py
	$(PY) benchmarks/bench_memory.py
	$(PY) benchmarks/bench_train.py
	$(PY) benchmarks/projector_error.py

ctest:
	$(MAKE) -C csrc/tests run
	$(MAKE) -C csrc/tests asan
	@if command -v valgrind > /dev/null; then $(MAKE) -C csrc/tests valgrind; \
	else echo "skipped: the C tests under valgrind (valgrind is not installed)"; fi

lint: ruff mypy clang-format

ruff: $(STAMPS)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

mypy: $(STAMPS)/dev
	$(VENV)/bin/mypy

clang-format: $(STAMPS)/dev
	$(C_FILES) | xargs -0 $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMPS)/dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(C_FILES) | xargs -0 $(VENV)/bin/clang-format -i

# The sanitized extension goes into build/sanitize and leaves the ordinary one alone. Both runtimes have to be loaded
# first; PYTHONMALLOC lets ASan see Python's own buffers; leaks are valgrind's business (make ctest).
SAN_ENV = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/sanitize

sanitize: $(STAMPS)/test $(CSRC)
	Q_GALORE_SANITIZE=address,undefined Q_GALORE_CUDA=0 $(PY) setup.py --quiet build --build-lib build/sanitize
	$(SAN_ENV) $(VENV)/bin/pytest -rs -p no:cacheprovider $(PYTEST_ARGS)

# Nothing is installed: the Python is one whose torch has CUDA.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

registers: $(STAMPS)/torch
	$(PY) csrc/tests/registers.py --write

# ---------------------------------------------------------------- what is made once

$(STAMPS)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "$(PYTHON) is too old: Python 3.10 or newer is needed (make PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' \
	    || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null \
	    || { echo "$(PYTHON) has no headers to build against (Debian: python3-dev)"; exit 1; }
	@command -v g++ > /dev/null || { echo "g++ is needed to build the binding (Debian: g++)"; exit 1; }
	@echo "installing $(TORCH) into $(VENV) (about half a minute, some hundred MB)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH) 'setuptools>=77'
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/installed: $(STAMPS)/torch pyproject.toml setup.py
	@echo "installing q-galore-torch into $(VENV)"
	@$(PIP) -e .
	@touch $@

$(STAMPS)/plot $(STAMPS)/test $(STAMPS)/dev: $(STAMPS)/%: $(STAMPS)/torch pyproject.toml setup.py
	@echo "installing q-galore-torch[$*] into $(VENV)"
	@$(PIP) -e '.[$*]'
	@touch $@

# setup.py recompiles only the files that changed.
$(STAMPS)/built: $(STAMPS)/torch pyproject.toml setup.py $(CSRC)
	@echo "building the extension"
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf build dist *.egg-info q_galore_torch/*.so $(STAMPS)/built
	@if [ -f csrc/tests/Makefile ]; then $(MAKE) -C csrc/tests clean; fi

distclean: clean
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
