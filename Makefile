# Needs python3 and make; everything else is installed into .venv here.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTHONS ?= 3.10 3.11 3.12 3.13

.PHONY: demo test check lint types coverage matrix timings clean

demo: $(VENV)/.installed  ## upgrade a server under load, ten times and with two bad versions
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: lint types coverage  ## what continuous integration checks

lint: $(VENV)/.installed
	$(BIN)/ruff check handoff tests examples
	$(BIN)/ruff format --check handoff tests examples

types: $(VENV)/.installed
	$(BIN)/mypy

coverage: $(VENV)/.installed
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report --include='handoff/core/*' --fail-under=95
	$(BIN)/coverage report

matrix:  ## run the tests on every Python from 3.10 to 3.13 that is installed
	@set -e; for version in $(PYTHONS); do \
	    export PYENV_VERSION=$$version; \
	    if python$$version -c '' 2>/dev/null; then \
	        $(MAKE) --no-print-directory test PYTHON=python$$version VENV=.venv-$$version; \
	    else \
	        echo "Python $$version is not installed here"; \
	    fi; \
	done

timings: $(VENV)/.installed  ## measure what an upgrade costs
	$(BIN)/python tests/timings.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-3.* .coverage* .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
