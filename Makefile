# Each target first makes what it needs: a virtual environment in .venv, with the right extra for this machine.
#
#   make quickstart     install, then `mbf quickstart`: one small model learns three tasks
#   make test           formatting, lint, types and tests; at most 10 minutes on two cores
#   make test-fast      the unit tests alone, without processes and real models; at most a minute on two cores
#   make test-all       the same with the slow tests: the full quickstart, and what needs torch, peft or npm
#   make bench          the benchmarks of benchmarks/README.md; the machine must be idle (about two hours)
#   make bench-check    compare what no machine changes (operations, bytes, counts) with the committed figures
#   make soak           kill a run at 200 random moments; the result goes into benchmarks/results/ (about 10 minutes)
#   make fuzz           fuzz each reader of strangers' files for ten minutes
#   make format         format the code and fix what the linter can fix
#   make release-check  build wheel and sdist into dist/, install each into empty environments, run the quickstart there
#
# PYTHON=python3.12 chooses the Python; EXTRA=cpu, cuda12, cuda13 or none chooses the mlx.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
comma := ,
extras = $(subst none,,$(EXTRA))

# Runs the Python to find out: a version manager leaves names that start nothing.
fits = $1 -c 'import sys; sys.version_info >= (3, 11) and print("yes")' 2>/dev/null
# Finds the CUDA version that the driver can run; mlx on a Mac needs no extra.
define find_extra
case "$$(uname -s)" in \
Darwin) echo none ;; \
*) driver=$$(sed -n 's/.*Module.* \([0-9][0-9]*\)\.[0-9.]* .*/\1/p' /proc/driver/nvidia/version 2>/dev/null | head -n 1); \
   if [ "$${driver:-0}" -ge 580 ]; then echo cuda13; elif [ "$${driver:-0}" -ge 550 ]; then echo cuda12; else echo cpu; fi ;; \
esac
endef

ifndef PYTHON
PYTHON := $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.14,$(if $(shell $(call fits,$p)),$p)))
endif
ifndef EXTRA
EXTRA := $(shell $(find_extra))
endif
WORKERS ?= 2
CASES ?= step one_billion scoring merge flatness startup export memory large_file saving plan_time
KILLS ?= 200
FUZZ_SECONDS ?= 600

# Stamp files inside the environment say what is installed. An environment that has lost its Python is made again.
READY := $(VENV)/.installed-$(EXTRA)
$(shell $(call fits,$(BIN)/python) >/dev/null || rm -f $(READY)*)

.PHONY: help quickstart test test-fast test-all bench bench-check soak fuzz format release-check install install-dev install-all venv clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

quickstart: install
	$(BIN)/mbf quickstart

test: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy mbf_mlx
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-fast: install-dev
	$(BIN)/python -m pytest -q -n $(WORKERS) -m fast

test-all: install-all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy mbf_mlx
	$(BIN)/python -m pytest -n $(WORKERS) -m "not release"

# An interrupted case continues after what it has measured; a finished one is measured again.
bench: install-all
	@for case in $(CASES); do echo "$$case"; \
	    $(BIN)/python benchmarks/$$case.py --out benchmarks/results/$$case.json || exit 1; done
	$(BIN)/python benchmarks/step.py --keys all --peers torch32 torch16 --out benchmarks/results/step_all_keys.json
	$(BIN)/python benchmarks/one_billion.py --memory --out benchmarks/results/one_billion_memory.json
	$(BIN)/python benchmarks/export_accuracy.py --epochs 1 --test-rows 60 --rows 40 --out benchmarks/results/export_accuracy.json
	$(BIN)/python benchmarks/export_memory.py --out benchmarks/results/export_memory.json

bench-check: install-dev
	$(BIN)/python benchmarks/check.py

soak: install-dev
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/soak.py --kills $(KILLS) --out benchmarks/results/soak.json

fuzz: install-dev
	@$(PIP) install atheris
	for reader in gguf safetensors task; do \
	    $(BIN)/python tests/fuzz/fuzz.py $$reader -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=1024 || exit 1; done

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

release-check: install-dev
	rm -rf dist
	$(BIN)/python -m build
	MBF_DIST=dist $(BIN)/python -m pytest -m release -rA tests/whole/test_release.py

# A changed pyproject.toml leads to a new installation.
install: $(READY)
install-dev: $(READY)-dev
install-all: $(READY)-all

$(READY): pyproject.toml | venv
	@echo "installing mbf-mlx$(if $(extras),[$(extras)]) into $(VENV); this takes a minute or two"
	@$(PIP) install --editable '.$(if $(extras),[$(extras)])'
	@touch $@

$(READY)-dev: pyproject.toml | venv
	@echo "installing mbf-mlx[$(if $(extras),$(extras)$(comma))dev] into $(VENV); this takes a minute or two"
	@$(PIP) install --editable '.[$(if $(extras),$(extras)$(comma))dev]'
	@touch $@ $(READY)

# torch goes first, in its own call: peft alone would bring the newest one, with CUDA. PIP_EXTRA_INDEX_URL names another index.
$(READY)-all: $(READY)-dev
	@echo "installing torch, peft and MKL, which only tests use"
	@$(PIP) install 'torch==2.13.0'
	@$(PIP) install 'peft>=0.21'
	@$(PIP) install --editable '.[bf16]'
	@touch $@

venv:
	@if [ -z "$$($(call fits,$(or $(PYTHON),python3)))" ]; then \
	    have=$$($(or $(PYTHON),python3) -c 'import platform; print(platform.python_version())' 2>/dev/null); \
	    echo "mbf-mlx needs Python 3.11 or newer; $(or $(PYTHON),python3) is $${have:-not here}." \
	         "Say which one to take with make PYTHON=python3.12" >&2; exit 1; fi
	@if ! $(call fits,$(BIN)/python) >/dev/null || ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	        echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	    echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); fi

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
