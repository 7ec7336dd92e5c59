# The verbs of this repository. Each makes the environment it needs, so a fresh machine needs Python and make only.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Versions that decide what is downloaded; what it says of torch's builds is done below.
CONSTRAINTS := tests/constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))

.PHONY: check test soak mutants ray demo bench docs clean

$(VENV)/pip.stamp: pyproject.toml $(CONSTRAINTS)
	@echo 'Setting up $(VENV) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e .
	@touch $@

# The CPU build of torch where any of pip's indexes serves one, otherwise the build that there is.
$(VENV)/test.stamp: $(VENV)/pip.stamp
	@$(BIN)/python -m pip install -qq 'torch==$(TORCH)+cpu' 2>/dev/null || \
		echo 'No index of pip serves a CPU build of torch $(TORCH): its default build may bring gigabytes of CUDA.'
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[test,docs]'
	@touch $@

$(VENV)/check.stamp: $(VENV)/test.stamp
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[check]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/pip.stamp
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

# Lint, types, import rules.
check: $(VENV)/check.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# All tests, those that load results with three versions of transformers included (each in an environment of its own).
test: $(VENV)/test.stamp
	$(BIN)/python tests/load_environments.py
	$(BIN)/python -m pytest -n auto --dist loadfile

# What the tests take a sample of, whole: hours. The results are in tests/soak/, and docs/reliability.md shows them.
soak: $(VENV)/test.stamp
	$(BIN)/python -m tests.every_error
	$(BIN)/python -m tests.real_limits
	$(BIN)/python -m tests.bit_flips --flips 5000 --out tests/soak/bit-flips.json
	$(BIN)/python -m tests.part_flips
	$(BIN)/python -m tests.interrupts
	$(BIN)/python -m tests.source_changes --again
	$(BIN)/python -m tests.races --again
	$(BIN)/python -m tests.same_bytes --again
	$(BIN)/python -m tests.kills
	$(BIN)/python -m tests.cuts
	$(BIN)/python -m tests.syncs
	$(BIN)/python -m tests.differential --files 50000
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --runs 5000000
	$(BIN)/python -m tests.day --minutes 60

# Changes places of the code at random, and sees whether a test notices: hours, as many as PLACES asks for in each package.
# What was tried before is not tried again. docs/reliability.md shows the results.
PLACES ?= 120
mutants: $(VENV)/test.stamp
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[mutants]'
	$(BIN)/python -m tests.mutants record
	for room in storage execute publish sources; do $(BIN)/python -m tests.mutants run $$room --limit $(PLACES) || exit 1; done

# The tests on a Ray cluster of three nodes. Ray takes 285 MB, which `make test` does without; once it is here, that runs them too.
ray: $(VENV)/test.stamp
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[ray]'
	$(BIN)/python -m pytest -m ray

# The main job on a small real checkpoint that ships in the repository.
demo: $(VENV)/pip.stamp
	@$(BIN)/python -m docs.demo

bench: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.run

docs: $(VENV)/docs.stamp
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .envs site out
