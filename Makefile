# Two commands need nothing but python3 with pip, and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := xformers,train,viz,hf,serve,export,docs,dev

# for `make test-oldest`: the oldest Python that is supported
OLDEST ?= python3.10
VENV_OLDEST := .venv-oldest
READY_OLDEST := $(VENV_OLDEST)/.ready

.PHONY: demo test test-slow test-oldest lint wheel plugin-check audit constraints notebook
.PHONY: levels map docs docs-serve census support reliability clean
.PHONY: release-check versions api-check twine-check

$(READY): pyproject.toml setup.py $(wildcard sparsiattn/kernels/native/*.[ch])
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# the template and sparsiattn as wheels in a clean environment, torch borrowed from .venv
plugin-check: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77"
	OMP_NUM_THREADS=1 $(BIN)/python tools/plugin_check.py

# PART=1/4 runs the first of four parts
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not census" \
		$(if $(PART),--part $(PART))

# warnings are no errors there: old libraries have old ones
test-oldest: $(READY_OLDEST)
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest -n auto -o filterwarnings=default \
		$(if $(PART),--part $(PART))

# uv, because pip takes half an hour to find versions that fit together
$(READY_OLDEST): pyproject.toml constraints/oldest.txt
	$(OLDEST) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV_OLDEST)/bin/uv pip install --quiet --python $(VENV_OLDEST)/bin/python \
		-c constraints/oldest.txt --editable ".[train,viz,hf,serve,export,dev]"
	touch $(READY_OLDEST)

# sdist, a wheel from it, and that at work in a clean environment; both stay in dist/
wheel: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77"
	OMP_NUM_THREADS=1 $(BIN)/python tools/wheel_check.py dist

# the compiled code for every level of processor, under qemu-user where this one is another
levels: $(READY)
	$(BIN)/python -m pytest -m "" -rs tests/kernels/test_levels.py

# known vulnerabilities of what development runs with; asks PyPI
audit: $(READY)
	$(PYTHON) -m venv --without-pip $(VENV)/audit
	$(BIN)/python -m pip --python $(VENV)/audit install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --requirement constraints/dev.txt --no-deps --disable-pip

# every check of a release, one after the other, then a table; STEPS="wheel docs" runs these alone
release-check:
	MAKE="$(MAKE)" $(PYTHON) tools/release_check.py $(STEPS)

# every file states the version of pyproject.toml
versions: $(READY)
	$(BIN)/python tools/versions.py

# public names against tests/project/api.json
api-check: $(READY)
	$(BIN)/python -m pytest -q tests/project/test_api.py

# metadata of what `make wheel` left in dist/, as the index reads them; asks PyPI for twine
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
twine-check: $(READY)
	$(PYTHON) -m venv --without-pip $(VENV)/twine
	$(BIN)/python -m pip --python $(VENV)/twine install --quiet --disable-pip-version-check twine
	$(VENV)/twine/bin/twine check --strict dist/sparsiattn-$(VERSION)[-.]*

# examples/quickstart.ipynb, run again with its outputs
notebook: $(READY)
	$(BIN)/python tools/notebook.py examples/quickstart.ipynb

# writes constraints/dev.txt from what is installed
constraints: $(READY)
	$(BIN)/python tools/pins.py

census: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m census

# goes on with the rows that are missing under benchmarks/results/census
support: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/support.py
	$(BIN)/python benchmarks/tables.py

# docs/assets/packages.svg, from the import graph
map: $(READY)
	$(BIN)/python tools/package_map.py

docs: $(READY)
	$(BIN)/mkdocs build --strict

docs-serve: $(READY)
	$(BIN)/mkdocs serve

# hours of drawn cases, threads, kills: benchmarks/results/reliability-cpu.json
reliability: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reliability

clean:
	rm -rf $(VENV) $(VENV_OLDEST) build dist site demo-output
