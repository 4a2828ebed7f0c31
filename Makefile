# `make demo` and `make test` do all the set-up on a fresh machine. `make help` lists the rest.
#
# PY           the interpreter: python3 when it has torch >= 2.11 and what else is needed, else .venv, which is made then
# PYTHON       what .venv is made with (default python3)
# TORCH_SPEC   the torch for .venv, a pip requirement (default: the CPU build where there is no NVIDIA GPU)
# PIP_ARGS     further arguments of pip install, such as --index-url URL
# TEST_ARGS    further arguments of pytest, such as "-k rms_norm"
# TEST_WORKERS processes that run tests (default: cores, at most 4)
# BENCH_ARGS   arguments of the benchmarks, such as "--quick" or "--json bench/results/cpu.json"
# GPU_ARGS     arguments of scripts/gpu_check.py, such as "--op rms_norm --steps native,memcheck"

SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
.PHONY: help build test test-integrations demo bench emulated check-kernels gpu-build gpu-check gpu-bench lint format asan wheel-check clean setup

PYTHON ?= python3
VENV := $(CURDIR)/.venv
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
TEST_WORKERS ?= $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))
export TORCH_SPEC PIP_ARGS

ifndef PY
PY := $(shell $(PYTHON) scripts/venv.py which $(VENV))
endif
ifeq ($(PY),$(VENV)/bin/python)
SETUP := $(VENV)/.ready
DEV_SETUP := $(VENV)/.ready-dev
ifeq ($(shell command -v cuobjdump),)
KERNELS_SETUP := $(VENV)/.ready-kernels
endif
endif
export PATH := $(dir $(PY)):$(PATH)
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))

help:  ## this list
	@echo "Interpreter: $(PY)"
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

$(VENV)/.ready: pyproject.toml scripts/venv.py
	$(PYTHON) scripts/venv.py make $(VENV) --group build --group run --group test
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PYTHON) scripts/venv.py make $(VENV) --group dev
	@touch $@

$(VENV)/.ready-kernels: $(VENV)/.ready
	$(PYTHON) scripts/venv.py make $(VENV) --group kernels
	@touch $@

setup: $(SETUP)  ## the Python environment

# Configured anew when the interpreter changes: torch's headers come from it.
build: $(SETUP)  ## the libraries, C++ tests and benchmarks, in build/
	@if [ "$$(cat build/.python 2>/dev/null)" != "$(PY)" ] || [ ! -f build/build.ninja ]; then \
	  cmake --fresh --preset cpu -DPython_EXECUTABLE=$(PY) && echo "$(PY)" > build/.python; fi
	cmake --build build

# One OpenMP thread per worker: two workers with two threads each on two cores would spin against each other. Tests that
# are about threads ask for them.
test: build  ## all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS) $(TEST_ARGS)

# vLLM pins versions of its own, so it gets an environment of its own, in which this checkout is installed as a plugin.
INTEGRATIONS := $(CURDIR)/.venv-integrations
$(INTEGRATIONS)/.ready: pyproject.toml scripts/venv.py
	$(PYTHON) scripts/venv.py integrations $(INTEGRATIONS)
	@touch $@

test-integrations: build $(INTEGRATIONS)/.ready  ## the plugins in the projects that they plug into: vLLM (several GB are installed the first time)
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations $(TEST_ARGS)

DEMO := build/demo-model
demo: build  ## a small random checkpoint, and text generated from it
	$(PY) -m kimi_native demo --dir $(DEMO)

bench: build  ## the benchmarks of the operators and of the model on the CPU
	$(PY) bench/run.py --device cpu $(BENCH_ARGS)
	$(PY) bench/bench_model.py $(BENCH_ARGS)

# The CUDA kernels in the emulator (tests/emulator): the tests of every operator that has some.
CUDA_OPS = $(patsubst csrc/cuda/%,%,$(basename $(wildcard csrc/cuda/*.cu)) $(patsubst %/,%,$(filter-out csrc/cuda/common/,$(sort $(dir $(wildcard csrc/cuda/*/*.cu))))))
emulated: $(SETUP)  ## the CUDA kernels without a GPU: the operators' tests, emulated on the CPU
	cmake --preset emulated -DPython_EXECUTABLE=$(PY) > build-emulated.log || { cat build-emulated.log; rm build-emulated.log; exit 1; }; rm build-emulated.log
	cmake --build --preset emulated
	rm -f build-emulated/launches*
	KIMI_NATIVE_LIB_DIR=$(CURDIR)/build-emulated/lib KIMI_LAUNCHES=build-emulated/launches OMP_NUM_THREADS=1 \
	  $(PY) -m pytest -n $(TEST_WORKERS) tests/test_emulator.py $(wildcard $(CUDA_OPS:%=tests/test_%.py) $(CUDA_OPS:%=tests/test_%_sm90.py)) $(TEST_ARGS)
	$(if $(TEST_ARGS),,$(PY) scripts/kernel_coverage.py check build-emulated/launches*)

check-kernels: build $(KERNELS_SETUP)  ## the machine code of the CUDA kernels: no spills, tensor cores and wide loads where they are meant to be
	$(PY) scripts/check_kernels.py

# Libraries that another machine built and that were copied here are used as they are.
gpu-build: $(SETUP)
	@if [ -f build-gpu/lib/_ops.so ] && [ ! -f build-gpu/build.ninja ]; then echo "build-gpu/lib: built elsewhere, used as it is"; \
	else cmake --preset gpu -DPython_EXECUTABLE=$(PY) && cmake --build --preset gpu; fi

gpu-check: $(SETUP)  ## on a GPU: all tests on both kinds of kernels, and compute-sanitizer
	$(PY) scripts/gpu_check.py $(GPU_ARGS)

gpu-bench: export KIMI_NATIVE_LIB_DIR = $(CURDIR)/build-gpu/lib
gpu-bench: gpu-build  ## on a GPU: operators and the full-size model against the ceilings and the peers; writes bench/results and docs/benchmarks.md
	$(PY) bench/run.py --device cuda --json $(BENCH_ARGS)
	$(PY) bench/bench_model_gpu.py --json --long
	$(PY) scripts/bench_report.py

CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
lint: build $(DEV_SETUP)  ## formats and types: clang-format, ruff, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(SETUP) $(DEV_SETUP)  ## rewrite the files as `make lint` wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(CXX_FILES)

asan: $(SETUP)  ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake --preset asan > build-asan.log || { cat build-asan.log; rm build-asan.log; exit 1; }; rm build-asan.log
	cmake --build --preset asan
	ctest --preset asan -j $(CORES)

wheel-check: $(SETUP)  ## build the wheel, install it in a clean environment, use it there
	PY=$(PY) scripts/wheel_check.sh

clean:  ## remove what was built (.venv stays)
	rm -rf build build-asan build-emulated build-gpu dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
