# make demo [PROMPT="..."]   a sentence in, a clip in out/ out, then every operation checked and timed
# make test                  ruff and the tests
# make bench [ARGS="..."]    every operation and the model in 10 minutes, or e.g. ARGS="--op norm_modulate --shape toy"
# make lint                  ruff only
# make build                 the compiled libraries: C++, and CUDA where nvcc is found
# make sanitize [SANITIZER=thread]   the tests of the C++ kernels under AddressSanitizer with UndefinedBehaviorSanitizer
#                            (SANITIZER=address) and under ThreadSanitizer; one of them by its name
# make gpu [OUT=dir] [MINUTES=8]   on a bare GPU machine: build, GPU tests, benchmarks; no network, no .venv
#
# The first use creates .venv; TORCH="torch==2.12.0" chooses another torch, PYTHON another interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= $(or $(file <.venv/.torch),torch==2.13.0)
OUT ?= out/gpu
MINUTES ?= 8
ARGS ?= --op all --minutes 9
ROWS := out/bench/$(shell date +%Y%m%d-%H%M%S).jsonl
PROMPT ?=
# The demo reads it from the environment, as it was typed: quotes, blanks and $ mean nothing here.
override PROMPT := $(value PROMPT)
export PROMPT

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
NVCC := $(shell command -v nvcc || ls $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc 2>/dev/null)
comma := ,
TARGETS := cpu$(if $(NVCC),$(comma)cuda)
SELF := $(MAKE)
SOURCES := setup.py $(shell find csrc -type f)

say = printf '==> %s\n' $(1)
failed = { printf '\n%s\n    %s\n' $(1) $(2) >&2; exit 1; }

.PHONY: help demo test lint bench build sanitize gpu check-machine FORCE

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# The clip first: where the libraries are not built yet, plain PyTorch makes it while they compile. Its threads sleep
# when they wait for each other, or each would take a processor from the compiler and wait for one itself. The build has a
# process group of its own, so that it ends with the demo, whole.
demo: .venv/.model
	@if $(SELF) -sq build; then exec $(PY) -m sora_model.demo; fi; \
	$(call say,'compiling csrc/ in the background: build/demo.log'); mkdir -p build; \
	set -m; nice $(SELF) -s build > build/demo.log 2>&1 & building=$$!; set +m; \
	trap 'kill -- -$$building 2>/dev/null || true' EXIT; \
	OMP_WAIT_POLICY=passive SORA_KERNELS_IMPL=reference $(PY) -m sora_model.demo clip; \
	$(call say,'waiting for the compiler'); \
	wait $$building || { cat build/demo.log >&2; exit 1; }; \
	$(PY) -m sora_model.demo check

test: build .venv/.installed
	@$(call say,'ruff'); .venv/bin/ruff check . || $(call failed,'ruff found the problems above.','.venv/bin/ruff check --fix . repairs most of them.')
	@$(call say,'pytest'); OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -p no:benchmark -m 'not gpu and not slow' \
	  || $(call failed,'Tests failed; see above.','$(PY) -m pytest tests/test_NAME.py -x runs one file alone.')

lint: .venv/.installed
	@.venv/bin/ruff check .

bench: build .venv/.installed
	@mkdir -p $(dir $(ROWS))
	@$(PY) -m benchmarks.run --json $(ROWS) $(ARGS)

gpu:
	@$(PYTHON) -c 'import torch' 2>/dev/null \
	  || $(call failed,'$(PYTHON) has no torch.','Name an interpreter that has torch and triton with PYTHON=.')
	@$(PYTHON) -m benchmarks.gpu --out "$(OUT)" --minutes "$(MINUTES)"

build: .venv/.built

sanitize: .venv/.installed
	@$(PY) tests/sanitize.py $(SANITIZER)

.venv/.built: .venv/.model $(SOURCES)
	@$(call say,'building csrc/ for $(TARGETS)')
	@SORA_KERNELS_BUILD=$(TARGETS) $(PY) setup.py -q build_ext --inplace \
	  || $(call failed,'Building csrc/ failed; the first error is above.','Correct it and run make build again.')
	@touch $@

install = SORA_KERNELS_BUILD= $(PIP) install --no-build-isolation -c .venv/constraints.txt -e $(1) \
  || $(call failed,'Installing the dependencies failed; see above.','Check the network and run make again.')

.venv/.installed: .venv/.model
	@$(call say,'installing the other extras$(comma) for tests and benchmarks')
	@$(call install,'.[triton$(comma)model$(comma)safety$(comma)redteam$(comma)diffusers$(comma)bench$(comma)dev]')
	@touch $@

.venv/.model: .venv/.torch pyproject.toml
	@$(call say,'installing the package')
	@$(PY) -c 'import torch; print("torch==" + torch.__version__)' > .venv/constraints.txt
	@$(call install,'.[model$(comma)safety]' 'ninja>=1.11' 'pybind11>=3.0')
	@touch $@

# Installed again when TORCH= names another torch than last time.
.venv/.torch: .venv/.created $(if $(filter-out $(file <.venv/.torch),$(TORCH)),FORCE)
	@$(call say,'installing $(TORCH)')
	@$(PIP) install $(TORCH) 'setuptools>=77' wheel \
	  || $(call failed,'Installing $(TORCH) failed; see above.','Check the network or choose another with TORCH=.')
	@printf '%s' '$(TORCH)' > $@

.venv/.created: | $(if $(wildcard .venv/.created),,check-machine)
	@$(call say,'creating .venv with $(PYTHON)')
	@$(PYTHON) -m venv .venv \
	  || $(call failed,'$(PYTHON) cannot create a virtual environment.','Debian: apt install python3-venv.')
	@touch $@

FORCE:

check-machine:
	@command -v $(PYTHON) >/dev/null \
	  || $(call failed,'$(PYTHON) not found.','Install Python 3.10 or newer or name yours with PYTHON=.')
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || $(call failed,"$$($(PYTHON) --version 2>&1) is too old.",'Install Python 3.10 or newer or name yours with PYTHON=.')
	@$(PYTHON) -c 'import venv, ensurepip' \
	  || $(call failed,'$(PYTHON) cannot create virtual environments.','Debian: apt install python3-venv.')
	@command -v $${CXX:-g++} >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null \
	  || $(call failed,'No C++ compiler found.','Debian: apt install g++; or name yours with CXX=.')
