PYTHON ?= python3.11
BACKEND ?= jax
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/digits_$(BACKEND)
SOURCES := keras_vmoe tests benchmarks examples setup.py

# Quickstart installs what its backend needs; everything else installs all.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.quickstart-$(BACKEND): setup.py pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[$(BACKEND),data,plots,cli]"
	touch $@

$(VENV)/.test: setup.py pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e \
		".[jax,tensorflow,torch,data,plots,cli,test]"
	touch $@

.PHONY: quickstart
quickstart: $(VENV)/.quickstart-$(BACKEND)  ## Train a V-MoE on real digits.
	TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/keras-vmoe train --backend $(BACKEND) \
		--run_dir $(RUN_DIR)

.PHONY: test
test: $(VENV)/.test  ## The fast tests, on all three backends.
	for backend in jax tensorflow torch; do \
		echo "backend: $$backend"; \
		KERAS_BACKEND=$$backend $(BIN)/python -m pytest -q -m "not slow" \
			|| exit 1; \
	done

.PHONY: test-slow
test-slow: $(VENV)/.test  ## The exhaustive tests, on all three backends.
	for backend in jax tensorflow torch; do \
		echo "backend: $$backend"; \
		KERAS_BACKEND=$$backend $(BIN)/python -m pytest -q -m slow \
			|| exit 1; \
	done

.PHONY: lint
lint: $(VENV)/.test  ## Style, and that every file compiles.
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python -m compileall -q $(SOURCES)

.PHONY: wheel
wheel: $(VENV)/.test  ## Build the wheel and try it in a bare environment.
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/bare
	build/bare/bin/python -m pip install --quiet dist/*.whl jax
	cd build && KERAS_BACKEND=jax bare/bin/python -c \
		"import keras_vmoe; print(keras_vmoe.__version__)"

.PHONY: examples
examples: $(VENV)/.test  ## Run the examples, in a short form.
	KERAS_BACKEND=jax $(BIN)/python examples/moe_in_your_model.py --epochs 2
