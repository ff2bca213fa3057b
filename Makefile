# Every target makes the virtual environment and installs what it needs. Python 3.11 or later and pip are all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# Two OpenMP runtimes that spin on two cores slow each other down by an order of magnitude.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
# pip leaves bytecode to the first import (--no-compile). Where the environment forbids writing it, every one of the demo's processes would
# compile torch and timm anew, more than ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo demo-quick efficiency bench-adaptation bench-compress bench-runtime bench-training grid bench-store bench-scale bench-poison bench-tokenizer bench-loading bench-compare bench-peers attacks audit licences lock faults fuzz load coverage docs test-docs web test-web test test-all test-wheel lint fix clean

install: $(STAMP)

$(STAMP): pyproject.toml mobileclip/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[all]'
	touch $(STAMP)

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[all,dev,qnn]'
	touch $(DEV)

demo: $(STAMP)
	$(BIN)/mclip demo --out out/demo

demo-quick: $(STAMP)
	$(BIN)/mclip demo --quick --out out/demo-quick

efficiency: $(STAMP)
	$(BIN)/python -m benchmarks.suites.efficiency --run out/demo --out out/efficiency

bench-adaptation: $(STAMP)
	$(BIN)/python -m benchmarks.suites.adaptation --run out/demo --out out/adaptation

bench-compress: $(STAMP)
	$(BIN)/python -m benchmarks.suites.compression --run out/demo --out out/bench-compress

bench-runtime: $(STAMP)
	$(BIN)/python -m benchmarks.suites.runtime --run out/demo --out out/bench-runtime

bench-training: $(STAMP)
	$(BIN)/python -m benchmarks.suites.training --run out/demo --out out/bench-training

grid: $(STAMP)
	$(BIN)/python -m benchmarks.suites.grid --run out/demo --out out/grid

bench-store: $(DEV)
	$(BIN)/python -m benchmarks.suites.store --run out/demo --out out/bench-store

bench-scale: $(STAMP)
	$(BIN)/python -m benchmarks.suites.scale --out out/bench-scale

bench-poison: $(STAMP)
	$(BIN)/python -m benchmarks.suites.poison --run out/demo --out out/bench-poison

bench-tokenizer: $(STAMP)
	$(BIN)/python -m distill.fetch
	$(BIN)/python -m benchmarks.suites.tokenizer --out out/tokenizer.json

bench-loading: $(STAMP)
	$(BIN)/python -m benchmarks.suites.loading --out out/loading.json

web: $(STAMP)
	cd runtime/web && ONNXRUNTIME_NODE_INSTALL=skip npm ci --no-audit --no-fund --ignore-scripts && npm run --silent types
	$(BIN)/python runtime/web/collect.py out/web out/demo/bundle out/demo/pairs

test-web: $(DEV) web
	$(BIN)/python -m tests.web.run out/web out/demo/bundle out/demo/teacher-bundle

bench-compare: $(STAMP)
	$(BIN)/python -m benchmarks.suites.compare_power --bundle out/demo/bundle --out out/bench-compare

bench-peers: $(STAMP)
	$(BIN)/python -m benchmarks.suites.peers --run out/demo --out out/bench-peers

# A site in out/site that opens without a server or a network; pictures where there is a demo run and a Chromium.
docs: $(DEV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[docs]'
	$(BIN)/python -m tests.docs.pictures docs/pictures
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "out/site/index.html"

test-docs: $(DEV)
	$(BIN)/python -m tests.docs.run

faults: $(DEV)
	$(BIN)/python -m tests.faults.run

# SECONDS on two processors, shared among all readers of strangers' files.
SECONDS ?= 600
fuzz: $(DEV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

load: $(STAMP)
	$(BIN)/python -m benchmarks.suites.load --run out/demo --out out/load

attacks: $(DEV)
	$(BIN)/python -m tests.attacks.run

# Asks a vulnerability database about what CI installs; says which packages the index at hand does not know.
audit: $(STAMP)
	test -x .audit/bin/pip-audit || ($(PYTHON) -m venv .audit && .audit/bin/python -m pip install --quiet pip-audit)
	.audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --progress-spinner off

licences: $(DEV)
	$(BIN)/python -m tests.attacks.licences

# The versions that this environment has become the ones that CI installs.
lock: $(DEV)
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel > .lock.part
	(head -n 1 requirements.lock; cat .lock.part) > .lock.whole && mv .lock.whole requirements.lock && rm .lock.part

test: $(DEV)
	$(BIN)/python -m distill.fetch
	$(BIN)/python -m pytest -q -n 2 -m "not slow" --durations=12

# Lines and branches that the default tests reach, by folder; processes that end by a signal do not report.
coverage: $(DEV)
	$(BIN)/python -m distill.fetch
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q -n 2 -m "not slow" -p no:cacheprovider
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m tests.coverage_by_folder

test-all: $(DEV)
	$(BIN)/python -m distill.fetch
	$(BIN)/python -m pytest -q -n 2 -m "not network"

test-wheel: $(DEV)
	$(BIN)/python -m pytest -q tests/test_wheel.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(DEV)
	$(BIN)/ruff check --fix .

clean:
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
