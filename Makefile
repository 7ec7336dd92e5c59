# The verbs of this repository. Each makes the environment it needs, so a fresh machine needs Python and make only.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Versions that decide what is downloaded: torch is pinned to a CPU build, since a range may pull gigabytes of CUDA.
CONSTRAINTS := tests/constraints.txt

.PHONY: check test demo bench docs clean

$(VENV)/pip.stamp: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/test.stamp: $(VENV)/pip.stamp
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test]'
	touch $@

$(VENV)/check.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[check]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/pip.stamp
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

# Lint, types, import rules.
check: $(VENV)/check.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# All tests, those that load results with three versions of transformers included (each in an environment of its own).
test: $(VENV)/test.stamp
	$(BIN)/python tests/load_environments.py
	$(BIN)/python -m pytest

# The main job on a small real checkpoint that ships in the repository.
demo: $(VENV)/pip.stamp
	$(BIN)/python docs/demo.py

bench: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.run

docs: $(VENV)/docs.stamp
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .envs site out
