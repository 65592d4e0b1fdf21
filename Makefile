# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both set up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup
export OMP_NUM_THREADS ?= 1

.PHONY: demo test quick lint setup clean

demo: $(SETUP)
	$(BIN)/autopar demo -o reports/demo

test: lint quick
	$(BIN)/python -m pytest -q -m "dist or netns or gpu" -p no:cacheprovider

quick: $(SETUP)
	$(BIN)/python -m pytest -q -m "not dist and not netns and not gpu" -p no:cacheprovider

lint: $(SETUP)
	$(BIN)/ruff check autopar costmodels tests
	$(BIN)/ruff format --check autopar costmodels tests
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(SETUP)

$(SETUP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
