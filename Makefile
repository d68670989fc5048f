# Setclip: everything a newcomer types. `make` alone lists the targets.
#
# PYTHON          the interpreter that makes .venv (3.11 or newer)
# INDEX_URL       a package index in place of the default one
# EXTRA_INDEX_URL a package index beside it. CPU builds of torch and torchvision, where the default index has none:
#                     make demo EXTRA_INDEX_URL=URL (the install page of pytorch.org names one)
# DEMO_FLAGS      flags for the demo, e.g. "--fast True" (python -m setclip.demo --help)
# PYTEST_FLAGS    flags for pytest, e.g. "-m 'not slow'"

PYTHON ?= $(shell command -v python3.11 || echo python3)
INDEX_URL ?=
EXTRA_INDEX_URL ?=
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := $(if $(INDEX_URL),--index-url $(INDEX_URL)) $(if $(EXTRA_INDEX_URL),--extra-index-url $(EXTRA_INDEX_URL))

# OpenMP's threads spin while they wait, which is slow where cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install img2dataset open-clip vllm demo test test-llm test-slurm check clean

help: ## list the targets
	@echo "Setclip. Targets:"
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22
	@echo "Variables are described at the top of the Makefile."

install: $(VENV)/.installed ## make .venv and install Setclip in it

img2dataset: $(VENV)/.installed ## make .venv-img2dataset, the downloader's own environment (data_prep.fetch)
	@$(if $(INDEX_URL),PIP_INDEX_URL=$(INDEX_URL)) $(if $(EXTRA_INDEX_URL),PIP_EXTRA_INDEX_URL=$(EXTRA_INDEX_URL)) \
		$(BIN)/python -m data_prep.fetch setup

open-clip: $(VENV)/.installed ## make .venv-open-clip, where open_clip's own trainer runs (benchmarks.train, benchmarks.loader)
	@$(if $(INDEX_URL),PIP_INDEX_URL=$(INDEX_URL)) $(if $(EXTRA_INDEX_URL),PIP_EXTRA_INDEX_URL=$(EXTRA_INDEX_URL)) \
		$(BIN)/python -m benchmarks.open_clip_environment

vllm: $(VENV)/.installed ## make .venv-vllm, the language models' own environment (data_prep.parse_llm, data_prep.describe)
	@$(if $(INDEX_URL),PIP_INDEX_URL=$(INDEX_URL)) $(if $(EXTRA_INDEX_URL),PIP_EXTRA_INDEX_URL=$(EXTRA_INDEX_URL)) \
		$(BIN)/python -m data_prep.llm setup

demo: $(VENV)/.installed ## run the whole road on the embedded corpus and write demo/report.html
	@$(BIN)/python -m setclip.demo --out demo --overwrite True $(DEMO_FLAGS)
	@echo "Open $(CURDIR)/demo/report.html in a browser."

test: $(VENV)/.installed img2dataset open-clip ## run all tests that need only Python packages
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-llm: vllm ## run the tests with the real vLLM, which `make test` leaves out
	@$(BIN)/python -m pytest -m "llm and not soak" --numprocesses 2 --dist loadgroup $(PYTEST_FLAGS)

test-slurm: $(VENV)/.installed ## run the tests of the job scripts on a real Slurm of four virtual nodes (needs root and Debian)
	@$(BIN)/python tests/slurm_cluster.py install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_slurm.py -m slurm $(PYTEST_FLAGS)

check: $(VENV)/.installed ## lint, format check and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## remove .venv, the demo and caches; data/ and runs/ stay
	@rm -rf $(VENV) .venv-img2dataset .venv-open-clip .venv-vllm demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed once, and again when the requirements change.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: expected Python 3.11 or newer as $(PYTHON); name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "Installing Setclip in $(VENV) (once; a minute or two, 2 GB) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -e ".[test]"
	@touch $@
