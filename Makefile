# Every target makes what it needs, from a fresh clone, with only python3 and make there.
PYTHON ?= python3
# On this one, `make test-all` runs the tests of the core, the tracer and the tuned kernels once more.
OTHER ?= $(lastword python3.13 $(sort $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python)))
BIN := .venv/bin
# The CUDA extra that fits the NVIDIA driver, or nothing where there is none.
CUDA_MAJOR := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA \(UMD \)\{0,1\}Version: *\([0-9]*\).*/\2/p' | head -n 1)
CUDA := $(if $(filter 12,$(CUDA_MAJOR)),cuda12,$(if $(CUDA_MAJOR),cuda13))
# On this one, `make test-all` checks that what `make gpu` needs starts where only little is installed.
BARE ?= $(lastword python3.12 $(sort $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python)))
# `make gpu`: where its parts leave their results, and the compiled kernels that they take. It runs PYTHON's own packages
# if PYTHON is given, else those of .venv.
OUT ?= build/gpu
CUBINS ?= build/cubins
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
GPU_RUN = PAGED_REF_CUBINS=$(CUBINS) PYTHONPATH=src:tests
# The tests with a `gpu` mark, the most telling first (pytest runs a file that is named twice once).
GPU_TESTS = tests/tuned/test_gpu_moves.py tests/properties/test_gpu.py tests/tuned/test_flash_gpu.py \
  $(shell grep -rl --include='test_*.py' -e 'mark\.gpu' -e 'of_models' tests)
# Compiling takes most of the tests' time; where pytest-xdist is there, several processes do it.
XDIST = $(shell $(GPU_PYTHON) -c "import xdist" 2>/dev/null && printf %s "-n 4")
# `make cubins`: the CUDA version of the machine that the kernels are for, such as 13.0. Empty: that of .venv.
CUDA_VERSION ?=

.DEFAULT_GOAL := help
.PHONY: help book demo lesson test test-all test-other test-bare lint compare pictures clean
.PHONY: gpu gpu-smoke gpu-tests gpu-check gpu-bench gpu-here cubins

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

demo: .venv/run.stamp  ## the main job: standard and paged memory, side by side (no GPU needed)
	@$(BIN)/paged-ref demo

lesson: .venv/run.stamp  ## the guided course; N=5 runs lesson 5
	@$(BIN)/paged-ref lesson $(N)

# A process for each core, and a BLAS thread for each process: more threads than cores wait for each other. Compiled
# modules are kept even where the environment says otherwise: the tests start hundreds of processes.
TESTS := PYTHONDONTWRITEBYTECODE= OPENBLAS_NUM_THREADS=1
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
test: .venv/test.stamp  ## the tests that this machine can run, without the slow ones
	$(TESTS) $(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: test .venv/notebook.stamp book  ## `test`, then the slow tests; those of the core, too, on OTHER (python3.13)
	$(TESTS) $(BIN)/python -m pytest $(PARALLEL) -m slow
	@if $(OTHER) -c "" 2>/dev/null; then $(MAKE) --no-print-directory test-other; \
	else echo "make test-all: $(OTHER) does not run here; no second run of tests/core, tests/tracer and tests/tuned"; fi
	@if $(BARE) -c "" 2>/dev/null; then $(MAKE) --no-print-directory test-bare; \
	else echo "make test-all: $(BARE) does not run here; no check of a machine with little installed"; fi

test-other: build/other/test.stamp  # a part of `test-all`
	$(TESTS) build/other/bin/python -m pytest $(PARALLEL) tests/core tests/tracer tests/tuned

# No GPU: that the GPU tests are collected, kernels compile, and what `make gpu` runs starts (on tests/strict_gpu).
test-bare: build/bare/pip.stamp  # a part of `test-all`
	PYTHONPATH=src build/bare/bin/python -m pytest -m gpu $(GPU_TESTS)
	PYTHONPATH=src build/bare/bin/python -m pytest tests/core/attention/test_ptx.py tests/tuned/test_sanitized.py
	for part in "support.gpu_smoke --without speed" support.sanitized; do \
	  PYTHONPATH=src:tests build/bare/bin/python -m strict_gpu -m $$part --out build/bare/stand-in --seconds 900 || exit 1; \
	done
	PYTHONPATH=src build/bare/bin/python -m paged_ref bench host --rounds 1
	PYTHONPATH=src build/bare/bin/python -m paged_ref demo

lint: .venv/test.stamp .venv/lint.stamp  ## ruff format and check, mypy strict
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

compare: .venv/test.stamp .venv/compare.stamp  ## the tests against PyTorch and transformers (installs both)
	$(TESTS) $(BIN)/python -m pytest -m compare

pictures: .venv/run.stamp  ## lessons/pictures: frames as *.svg, whole runs as *.html, from real runs
	@mkdir -p lessons/pictures build
	@$(BIN)/paged-ref viz --record build/pictures.jsonl --size 100x30 --at 1 >/dev/null
	for picture in tables:S sharing:C swap:S prefix:H memory:S timeline:R; do \
	  $(BIN)/paged-ref viz build/pictures.jsonl --frame $${picture%:*} --at $${picture#*:} \
	    --svg lessons/pictures/$${picture%:*}.svg || exit 1; \
	done
	$(BIN)/paged-ref walk --svg lessons/pictures/walk.svg
	$(BIN)/paged-ref viz --html lessons/pictures/viz.html
	$(BIN)/paged-ref walk --html lessons/pictures/walk.html

# Sphinx reads a copy of book/, in which the extension writes the pages that are made from runs. A broken link fails it.
book: .venv/book.stamp  ## the book in build/book/index.html: the course with its output, side by side, reference
	@rm -rf build/book build/book-source && mkdir -p build && cp -R book build/book-source && mkdir build/book-source/extra
	@cp -R lessons/start_here build/book-source/start_here
	PAGED_REF_ROOT=$(CURDIR) $(BIN)/python -m sphinx -q -W --keep-going -j auto build/book-source build/book
	@echo "build/book/index.html"

gpu:  ## on a GPU, with results in OUT: smoke, then tests, memory and race checks, benchmarks; 4 minutes each at most
	@status=0; \
	for part in gpu-smoke gpu-tests gpu-check gpu-bench; do $(MAKE) --no-print-directory $$part || status=1; done; \
	exit $$status

gpu-smoke: gpu-here  ## on a GPU: does it work here? The checks that say most, in a minute or two
	$(GPU_RUN) timeout 240 $(GPU_PYTHON) -m support.gpu_smoke --out $(OUT) --seconds 230

gpu-here: $(if $(filter file,$(origin PYTHON)),.venv/run.stamp)
	@PYTHONPATH=src $(GPU_PYTHON) -c "import sys; from paged_ref.core import device; \
	  sys.exit(None if device.on_gpu else 'make: ' + device.reason + '; nothing was run')"
	@mkdir -p $(OUT) $(CUBINS)

gpu-tests: gpu-here $(if $(filter file,$(origin PYTHON)),.venv/test.stamp)  # a part of `gpu`
	$(GPU_RUN) timeout 240 $(GPU_PYTHON) -m pytest $(XDIST) -m gpu -rs --lines $(OUT)/tests.jsonl $(GPU_TESTS)

gpu-check: gpu-here  # a part of `gpu`
	@command -v compute-sanitizer >/dev/null || echo "compute-sanitizer is not installed: no memory and race checks"
	@status=0; command -v compute-sanitizer >/dev/null || exit 0; \
	for tool in memcheck racecheck; do \
	  $(GPU_RUN) timeout 120 compute-sanitizer --tool $$tool --error-exitcode 1 $(GPU_PYTHON) -m support.sanitized \
	    --out $(OUT) --file $$tool.jsonl --seconds 110 > $(OUT)/$$tool.txt 2>&1 || status=1; \
	  echo "$$tool:"; tail -n 4 $(OUT)/$$tool.txt; \
	done; exit $$status

gpu-bench: gpu-here  # a part of `gpu`
	@status=0; \
	for what in "100 kernels --minutes 1" "80 model" "60 long --contexts 4096 65536 --rounds 3"; do \
	  set -- $$what; seconds=$$1; name=$$2; shift 2; \
	  $(GPU_RUN) timeout $$seconds $(GPU_PYTHON) -m paged_ref bench $$name "$$@" --json $(OUT)/$$name.json || status=1; \
	done; exit $$status

cubins: .venv/test.stamp $(if $(CUDA_VERSION),build/cuda-$(CUDA_VERSION)/pip.stamp)  ## kernels for `make gpu` as files, without a GPU; CUDA_VERSION=13.0
	@mkdir -p $(CUBINS)
	for part in "support.gpu_smoke --without speed" support.sanitized; do \
	  STRICT_GPU_COMPILE=1 $(GPU_RUN) $(or $(and $(CUDA_VERSION),build/cuda-$(CUDA_VERSION)/bin/python),$(BIN)/python) \
	    -m strict_gpu -m $$part --out build/stand-in --seconds 3600 || exit 1; \
	done
	@du -sh $(CUBINS)

clean:  ## remove what the other targets made
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/pip.stamp:
	$(PYTHON) -m venv .venv || (echo "make: $(PYTHON) cannot make a virtual environment; install its venv module" && false)
	@touch $@

.venv/run.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.$(if $(CUDA),[$(CUDA)])'
	@touch $@

.venv/test.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test,$(or $(CUDA),ptx)]'
	@touch $@

build/other/test.stamp: pyproject.toml
	$(OTHER) -m venv build/other
	build/other/bin/pip install --quiet --editable '.[test,$(or $(CUDA),ptx)]'
	@touch $@

build/cuda-%/pip.stamp: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --editable '.[test,ptx]' 'cuda-toolkit[nvvm]==$*.*' 'nvidia-nvjitlink==$*.*'
	@touch $@

# As on many GPU machines: NumPy 2.5, and none of prompt_toolkit, greenlet, pyte, msgspec, hypothesis. torch, triton and
# transformers would be there, too; they are gigabytes, and nothing here imports them.
build/bare/pip.stamp: pyproject.toml
	$(BARE) -m venv build/bare
	build/bare/bin/pip install --quiet 'numpy==2.5.*' numba 'numba-cuda[cu13]' cupy-cuda13x rich pytest safetensors tokenizers
	@touch $@

.venv/lint.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[lint]'
	@touch $@

.venv/notebook.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[notebook,completion]'
	@touch $@

.venv/book.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[book]'
	@touch $@

.venv/compare.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[compare]'
	@touch $@
