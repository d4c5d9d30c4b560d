# Two commands need nothing but python3 with pip, and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := xformers,train,viz,hf,docs,dev

.PHONY: demo test test-slow lint docs census support clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV) || $(MAKE) venv-without-ensurepip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $(READY)

# Debian's python3 lacks ensurepip unless python3-venv is installed
.PHONY: venv-without-ensurepip
venv-without-ensurepip:
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(VENV) install --quiet pip

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "slow or census"

census: $(READY)
	$(BIN)/python -m pytest -m census

# goes on with the rows that are missing under benchmarks/results/census
support: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/support.py
	$(BIN)/python benchmarks/tables.py

docs: $(READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo-output
