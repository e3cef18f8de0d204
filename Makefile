# Every target makes what it needs, from a fresh clone, with only python3 and make there.
PYTHON ?= python3
BIN := .venv/bin
# The CUDA extra that fits the NVIDIA driver, or nothing where there is none.
CUDA_MAJOR := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA \(UMD \)\{0,1\}Version: *\([0-9]*\).*/\2/p' | head -n 1)
CUDA := $(if $(filter 12,$(CUDA_MAJOR)),cuda12,$(if $(CUDA_MAJOR),cuda13))
# Where `make gpu` leaves its results.
OUT ?= build/gpu
GPU_TESTS := tests/kernels/test_gpu.py tests/kernels/test_attention.py tests/model/test_llama.py tests/engine/test_llm.py

.DEFAULT_GOAL := help
.PHONY: help demo lesson test lint compare pictures gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

demo: .venv/run.stamp  ## the main job: standard and paged memory, side by side (no GPU needed)
	@$(BIN)/paged-ref demo

lesson: .venv/run.stamp  ## the guided course; N=5 runs lesson 5
	@$(BIN)/paged-ref lesson $(N)

test: .venv/test.stamp  ## all tests that this machine can run
	$(BIN)/python -m pytest

lint: .venv/test.stamp .venv/lint.stamp  ## ruff format and check, mypy strict
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

compare: .venv/test.stamp .venv/compare.stamp  ## the tests against PyTorch and transformers (installs both)
	$(BIN)/python -m pytest -m compare

pictures: .venv/run.stamp  ## lessons/pictures/*.svg, from real runs
	@mkdir -p lessons/pictures build
	@$(BIN)/paged-ref viz --record build/pictures.jsonl --size 100x30 --at 1 >/dev/null
	for picture in tables:S sharing:C swap:S prefix:H memory:S timeline:R; do \
	  $(BIN)/paged-ref viz build/pictures.jsonl --frame $${picture%:*} --at $${picture#*:} \
	    --svg lessons/pictures/$${picture%:*}.svg || exit 1; \
	done
	$(BIN)/paged-ref walk --svg lessons/pictures/walk.svg

gpu:  ## all GPU tests and the GPU benchmark, from the source tree, with PYTHON's own packages
	mkdir -p $(OUT)
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu -rs --junitxml=$(OUT)/tests.xml $(GPU_TESTS)
	PYTHONPATH=src $(PYTHON) -m paged_ref bench kernels --json $(OUT)/kernels.json

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

.venv/lint.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[lint]'
	@touch $@

.venv/compare.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[compare]'
	@touch $@
