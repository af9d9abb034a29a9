PYTHON ?= python3.11
BACKEND ?= jax
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/digits_$(BACKEND)
SOURCES := keras_vmoe tests benchmarks examples docs setup.py
# Hundreds of processes import the same files: they are compiled once.
unexport PYTHONDONTWRITEBYTECODE

# Python compiles what is imported; the rest of these packages is large.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

# Quickstart installs what its backend needs; everything else installs all.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip

$(VENV)/.quickstart-$(BACKEND): setup.py pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -e ".[$(BACKEND),data,plots,cli,serving]"
	touch $@

$(VENV)/.test: setup.py pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -e \
		".[jax,tensorflow,torch,data,checkpoints,plots,cli,serving,onnx,litert,docs,test]"
	touch $@

.PHONY: quickstart
quickstart: $(VENV)/.quickstart-$(BACKEND)  ## Train a V-MoE on real digits.
	TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/keras-vmoe train --backend $(BACKEND) \
		--run_dir $(RUN_DIR)

.PHONY: check-quickstart
check-quickstart:  ## The quickstart, and that it reaches its accuracy.
	rm -rf build/quickstart && mkdir -p build
	$(MAKE) quickstart RUN_DIR=build/quickstart > build/quickstart.log
	awk '/^test accuracy:/ { print; good = $$3 >= 0.97 } END { exit !good }' \
		build/quickstart.log

# A process per core, which tests/conftest.py feeds.
# What belongs to one backend, or to none, the others leave out.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
	--ignore=tests/browser --ignore=tests/wheel

.PHONY: test
test: $(VENV)/.test  ## The fast tests, on all three backends.
	KERAS_BACKEND=jax $(PYTEST) -m "not slow"
	KERAS_BACKEND=tensorflow $(PYTEST) -m "not slow"
	KERAS_BACKEND=torch $(PYTEST) -m "not slow"

.PHONY: test-slow
test-slow: $(VENV)/.test  ## The exhaustive tests, on all three backends.
	KERAS_BACKEND=jax $(PYTEST) -m slow
	KERAS_BACKEND=tensorflow $(PYTEST) -m slow
	KERAS_BACKEND=torch $(PYTEST) -m slow

KILLS ?= 60
.PHONY: test-kills
test-kills: $(VENV)/.test  ## Kills a run as often as KILLS says; CI: 3 times.
	KERAS_BACKEND=jax KILLS=$(KILLS) $(BIN)/python -m pytest -q \
		tests/training/test_kills.py

.PHONY: browser
browser:  ## Chromium, where there is none (Debian's package, as root).
	command -v chromium || command -v google-chrome || \
		{ apt-get update -qq && apt-get install -y -qq chromium; }

.PHONY: test-browser
test-browser: docs browser  ## The site and the reports, in Chromium.
	KERAS_BACKEND=torch $(BIN)/python -m pytest -q tests/browser

.PHONY: lint
lint: $(VENV)/.test  ## Style, types, and that every file compiles.
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m compileall -q $(SOURCES)

.PHONY: docs
docs: $(VENV)/.test  ## The site, into build/site: no network, no warnings.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.PHONY: wheel
wheel: $(VENV)/.test  ## Build the wheel and the sdist, into dist/.
	rm -rf dist
	$(BIN)/python -m build --outdir dist . > /dev/null

.PHONY: test-wheel
test-wheel: wheel  ## The wheel in bare environments, with each extra.
	rm -rf build/bare
	KERAS_BACKEND=torch $(BIN)/python -m pytest -q tests/wheel

# Backends and Jupyter as on Colab; the wheel that lies beside the notebooks is
# installed by them.
.PHONY: notebooks
notebooks: wheel  ## Run the notebooks without a clone; EPOCHS=1 is short.
	rm -rf build/notebooks && mkdir -p build/notebooks
	cp dist/*.whl examples/*.ipynb build/notebooks
	$(BIN)/python -m tests.wheel.bare build/notebooks/venv \
		build/notebooks/*.whl jax,tensorflow pip ipykernel nbclient
	cd build/notebooks && venv/bin/python -c \
		"from nbclient import cli; cli.main()" --inplace *.ipynb

.PHONY: record-notebooks
record-notebooks: notebooks  ## Keep the notebooks with their new outputs.
	cp build/notebooks/*.ipynb examples
	$(BIN)/jupyter nbconvert --to notebook --inplace examples/*.ipynb \
		--ClearMetadataPreprocessor.enabled=True \
		--ClearMetadataPreprocessor.clear_notebook_metadata=False

.PHONY: examples
examples: $(VENV)/.test notebooks  ## Run the examples; EPOCHS=1 is short.
	KERAS_BACKEND=jax $(BIN)/python examples/moe_in_your_model.py --epochs 1
	mkdir -p build
	$(BIN)/python examples/augmentations.py build/augmentations.jpg
