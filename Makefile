PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TORCH := $(shell grep -i '^torch==' constraints-cpu.txt)

.PHONY: help quickstart test test-slurm lint format venv clean

help:
	@echo "make quickstart   both stages on real text, on CPU, ending in a table and a plot"
	@echo "make test         lint, type checks and tests, by WORKERS=$(WORKERS) processes, with PYTHON=$(PYTHON)"
	@echo "make test-slurm   the tests that need Slurm, on one that is started here"
	@echo "make format       format the code"

venv: $(VENV)/.installed
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

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck scripts/slurm/*.sh scripts/slurm/*.sbatch tests/slurm/*.sh .ci/run

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 40

test-slurm: venv
	tests/slurm/run.sh

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache quickstart_run
