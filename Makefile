# Everything runs in a virtual environment of its own; only Python 3.11+, git and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUESTION := What is the capital of France?

.PHONY: demo test test-long lint types bench clean

demo: $(INSTALLED)
	@echo "> $(QUESTION)"
	@$(BIN)/offload generate demo --expert-slots 25% --temp 0 -n 96 -p "$(QUESTION)"
	@if [ -t 1 ]; then echo; echo "Go on with: $(BIN)/offload chat demo --expert-slots 25%"; fi

test: lint types
	$(BIN)/python -m pytest -n auto --dist worksteal

# What takes minutes; before a release.
test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long -s

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/decode.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
