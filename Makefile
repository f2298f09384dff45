# Every target works on a fresh clone by itself: it makes .venv first where it is missing or out of date.
PYTHON ?= python3
SERVER ?= triton
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch is pinned: any other request may fetch several gigabytes of GPU packages.
TORCH := torch==2.13.0
WORKERS ?= 2

.PHONY: install demo test test-unit test-integration lint format docs bench study model-repository clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev,docs]'
	@touch $@

demo: install
	$(BIN)/fides demo --server $(SERVER)

# One thread per process: the workers below and the servers they start share the cores already.
test-unit test-integration: export OMP_NUM_THREADS = 1
test-unit test-integration: export OMP_WAIT_POLICY = PASSIVE

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
	$(BIN)/python benchmarks/verifier_cost.py
	$(BIN)/python benchmarks/detector_cost.py

# Slow studies behind the figures in the docs; each can be run alone. About two and a half hours on 2 cores.
study: install
	$(BIN)/python benchmarks/digits_seeds.py --seeds 5 --workers 1
	$(BIN)/python benchmarks/monitor_study.py
	$(BIN)/python benchmarks/classical_pairs.py
	for pair in build/classical/*.npz; do $(BIN)/python benchmarks/detection_study.py $$pair --seeds 1 || exit 1; done
	$(BIN)/python -m examples.digits
	$(BIN)/python -m examples.mnist
	$(BIN)/python -m examples.glyphs
	$(BIN)/python -m benchmarks.gdtl_ablation --mnist build/mnist
	$(BIN)/python benchmarks/triton_failure.py
	$(BIN)/python benchmarks/audit_run.py

# Makes the digits service and bundle of model_repository/ again, from seed 0.
model-repository: install
	rm -rf build/digits
	$(BIN)/fides demo --server inprocess --keep build/digits
	cp build/digits/service.onnx model_repository/digits_base/1/model.onnx
	rm -rf model_repository/fides_verify/bundle
	cp -r build/digits/bundle model_repository/fides_verify/bundle

clean:
	rm -rf $(VENV) site build dist
