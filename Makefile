# Two commands: `make demo` and `make test`. Each sets up its own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint schemas cli-docs clean

demo: $(VENV)/ready
	$(BIN)/dde-cache demo --out demo-out

# A file's tests stay in one process: they share what takes longest to make. The processes share nothing.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

schemas: $(VENV)/ready
	$(BIN)/python -m dde_cache.schemas

cli-docs: $(VENV)/ready
	$(BIN)/python -m dde_cache.cli.reference > docs/cli.md

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("expected Python 3.11 or newer, got " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info
