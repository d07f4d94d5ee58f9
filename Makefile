# Every target does its own set-up: a .venv with the exact versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find src -name '*.py' -o -name '*.toml' -o -name '*.typed')

.PHONY: demo test lint docs sabotage results clean constraints
.DEFAULT_GOAL := test

$(VENV)/.dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation ".[dev]"
	touch $@

# Installed, not linked: the tests run against what a user would get.
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@

demo: $(VENV)/.installed
	$(BIN)/laconic demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# ALL=1: those that take long, too.
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(if $(ALL),,not slow)"

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --quiet

# Break the code on purpose, one small edit at a time, and require red: minutes.
sabotage: $(VENV)/.installed
	$(BIN)/python tests/sabotage.py

# The committed results, one after the other, hours on two cores; finished ones are kept.
results: $(VENV)/.installed
	$(BIN)/laconic bench --results experiments/results

constraints:
	rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 setuptools && $(BIN)/pip install --quiet --no-build-isolation ".[dev]"
	(head -2 constraints.txt; $(BIN)/pip freeze --all --exclude laconic --exclude pip | sed 's/+cpu$$//') > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build site runs laconic-demo
