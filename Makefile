# Everything runs in a virtual environment of its own; only Python 3.11+, git and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LATEST := .venv-latest
TREE := build/tree/offload
QUESTION := What is the capital of France?

.PHONY: demo test test-long test-latest lint types bench constraints clean

demo: $(INSTALLED)
	@echo "> $(QUESTION)"
	@$(BIN)/offload generate demo --expert-slots 25% --temp 0 -n 96 -p "$(QUESTION)"
	@if [ -t 1 ]; then echo; echo "Go on with: $(BIN)/offload chat demo --expert-slots 25%"; fi

test: lint types
	$(BIN)/python -m pytest -n auto --dist worksteal

# What takes minutes; before a release.
test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long -s

# The newest releases that pyproject.toml allows; what they deprecate is an error (tests/latest.py).
test-latest:
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install -qq --upgrade pip
	PYTHONWARNINGS=ignore $(LATEST)/bin/python -m pip install -qq --upgrade --upgrade-strategy eager \
		--editable '.[dev]'
	$(LATEST)/bin/python -m pytest -p tests.latest -n auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads the tree as it is installed, where cache/ and quant/ lie in offload/.
types: $(INSTALLED)
	@rm -rf $(TREE) && mkdir -p $(TREE)
	@cd $(TREE) && ln -s ../../../offload/* ../../../cache ../../../quant .
	@$(BIN)/mypy > build/types.txt; status=$$?; sed -e 's#^build/tree/##' \
		-e 's#^offload/cache/#cache/#' -e 's#^offload/quant/#quant/#' build/types.txt; exit $$status

bench: $(INSTALLED)
	$(BIN)/python benchmarks/decode.py

constraints: $(INSTALLED)
	$(BIN)/python -m tests.constraints

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) $(LATEST) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
