# Two commands: `make train` and `make test`. The rest is for people who change kernels.
# TORCH_INDEX=<address> takes torch from that package index; without it pip's own settings decide, and on a machine
# without an NVIDIA GPU the CPU build is preferred where pip can find one.
SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX ?=
TORCH_SPEC := torch>=2.11,<2.14
BIN := .venv/bin
PY := $(BIN)/python

.PHONY: train test test-long lint build install clean

.venv/.torch:
	$(PYTHON) -m venv .venv
	@set -e; if [ -n "$(TORCH_INDEX)" ]; then $(PY) -m pip install -q "$(TORCH_SPEC)" --index-url "$(TORCH_INDEX)"; \
	elif ! command -v nvidia-smi >/dev/null 2>&1 && \
	  { $(PY) -m pip install -q "torch==2.13.0+cpu" 2>/dev/null || $(PY) -m pip install -q "torch==2.12.0+cpu" 2>/dev/null; }; then :; \
	else $(PY) -m pip install -q "$(TORCH_SPEC)"; fi
	@touch $@

.venv/.train: .venv/.torch pyproject.toml setup.py
	$(PY) -m pip install -q -e ".[train]"
	@touch $@

.venv/.test: .venv/.train
	$(PY) -m pip install -q -e ".[test]"
	@touch $@
