# Two commands: `make train` and `make test`. The rest is for people who change kernels.
#
#   make train       install into .venv, build, train the preset examples/tiny.yaml on two processes
#   make test        the same set-up, then lint and the test suite
#   make test-long   full products and long counts
#   make compile-gpu  compile every GPU kernel for sm_80, sm_90, sm_100, without a GPU; ARCH=90 for one
#   make gpu         on a machine with a CUDA device: build, op tests, benchmarks (PART=build|test|sanitize|...)
#   make build lint clean
#
# TORCH_INDEX=<address> takes torch from that package index. Without it pip's own settings decide, and on a machine
# without an NVIDIA GPU the CPU build is taken where pip can find one.
SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX ?=
TORCH_SPEC := torch>=2.11,<2.14
PART ?=
BUDGET ?=
GPU_PY ?= $(if $(wildcard .venv/.train),.venv/bin/python,$(PYTHON))
ARCH ?= 80 90 100
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
WORKERS ?= 2

.PHONY: train test test-long lint build compile-gpu gpu clean

train: .venv/.train .venv/.built
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --nproc-per-node 2 -m swiftk.train

test: lint
	TRITON_INTERPRET=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m "not long" tests/triton
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m "not long" --ignore tests/triton

test-long: .venv/.test .venv/.built
	TRITON_INTERPRET=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m long tests/triton
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m long --ignore tests/triton

lint: .venv/.test .venv/.built
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy -p swiftk

build: .venv/.built

compile-gpu: .venv/.train .venv/.built
	$(PY) -m swiftk.bench compile-gpu --arch $(ARCH)

gpu:
	@$(GPU_PY) -c "from importlib.util import find_spec; \
	lack = ', '.join(name for name in ('torch', 'pytest') if not find_spec(name)); \
	raise SystemExit(lack and f'make gpu: $(GPU_PY) has no {lack}: make .venv/.test, or GPU_PY=PATH (a python with torch for CUDA, pytest, transformers)' or None)"
	$(GPU_PY) -m swiftk.bench gpu --parts $(PART) $(if $(BUDGET),--budget $(BUDGET))

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache swiftk.egg-info
	rm -f _swiftk_C*.so _swiftk_cuda*.so

# Stamps: each names what it must be newer than, so a second `make` does nothing.
.venv/.torch:
	@echo "Installing torch into .venv: 200 MB, gigabytes for an NVIDIA GPU; minutes without a word"
	$(PYTHON) -m venv .venv
	@set -e; if [ -n "$(TORCH_INDEX)" ]; then $(PIP) "$(TORCH_SPEC)" --index-url "$(TORCH_INDEX)"; \
	elif command -v nvidia-smi >/dev/null 2>&1; then $(PIP) "$(TORCH_SPEC)"; \
	else for v in 2.13.0 2.12.1 2.12.0 2.11.0; do $(PIP) "torch==$$v+cpu" 2>/dev/null && break; done; \
	  $(PY) -c "import torch" 2>/dev/null || $(PIP) "$(TORCH_SPEC)"; fi
	$(PIP) "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	@touch $@

.venv/.train: .venv/.torch pyproject.toml setup.py
	@echo "Installing the trainer's packages and building the kernels: about five minutes on two cores"
	$(PIP) --no-build-isolation -e ".[train,serve]"
	@touch $@

.venv/.test: .venv/.train
	@echo "Installing the packages of the tests: a minute"
	$(PIP) --no-build-isolation -e ".[test]"
	@touch $@

.venv/.built: .venv/.train $(NATIVE)
	@echo "Building the kernels where they have changed: up to two minutes"
	$(PY) setup.py -q build_ext --inplace
	@touch $@
