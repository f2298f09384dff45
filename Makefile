# Every target works on a fresh clone by itself: it makes .venv first where it is missing or out of date.
PYTHON ?= python3
SERVER ?= triton
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch is pinned: any other request may fetch several gigabytes of GPU packages.
TORCH := torch==2.13.0
WORKERS ?= 2

.PHONY: install demo test test-unit test-integration lint format docs bench study clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev,docs]'
	@touch $@

demo: install
	$(BIN)/fides demo --server $(SERVER)

test: test-unit test-integration

test-unit: install
	$(BIN)/python -m pytest -n $(WORKERS) -m "not integration" tests

# One worker at a time per server group, so that two cores are enough for the servers' own processes.
test-integration: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m integration tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/mkdocs build --strict

bench: install
	$(BIN)/python benchmarks/serving_triton.py
	$(BIN)/python benchmarks/serving_torchserve.py

study: install
	@echo "see docs/reference/studies.md for what each study measures and how long it takes"

clean:
	rm -rf $(VENV) site build dist
