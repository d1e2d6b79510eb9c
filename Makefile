# make venv | demo | demo-train | test | test-light | test-slow | test-tpu | test-ray | test-gpu | speculators | lint | docs | wheel | clean.
# Needs python3 (3.11 or newer), pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes. Two suit two cores and 8 GB; 0 runs all in one process.
WORKERS ?= 2

.PHONY: venv demo demo-train test test-light test-slow test-tpu test-ray test-gpu speculators lint docs wheel clean

venv: $(VENV)/.installed-test

demo: $(VENV)/.installed-demo
	$(BIN)/python -m infer.demo

demo-train: $(VENV)/.installed-demo $(VENV)/.installed-train
	$(BIN)/python -m infer.demo --train

test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m 'not tpu and not slow and not ray' -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# Without torch, on any Python: PYENV_VERSION=3.13.0 make test-light PYTHON=python3 VENV=.venv313
test-light: $(VENV)/.installed-test-light
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m 'not tpu and not slow and not torch and not ray' -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# Repeats at length what others show in short.
test-slow: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# Compiles for TPUs with libtpu; needs none.
test-tpu: $(VENV)/.installed-test $(VENV)/.installed-tpu
	JAX_PLATFORMS=cpu XLA_FLAGS= $(BIN)/python -m pytest -m tpu -n $(WORKERS) $(PYTEST_ARGS)

# Starts Ray on this machine, in an environment of its own: Ray is large, and nothing else needs it.
RAY := $(VENV)-ray
test-ray:
	$(MAKE) VENV=$(RAY) $(RAY)/.installed-test-light $(RAY)/.installed-ray
	JAX_PLATFORMS=cpu $(RAY)/bin/python -m pytest -m ray tests/integrations $(PYTEST_ARGS)

# Runs on a GPU, in one process, with CUDA's jax (CUDA=cuda13 for newer drivers). Tests that need eight devices are left out.
CUDA ?= cuda
test-gpu: $(VENV)/.installed-test $(VENV)/.installed-$(CUDA)
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest -m 'not tpu and not slow and not real' \
	    tests/decoding tests/nn tests/drafters tests/engine/test_engine.py tests/commands/test_check_device.py $(PYTEST_ARGS)

# The values that tests/drafters/test_speculators.py compares with, by speculators itself, which pins other packages.
SPECULATORS := $(VENV)-speculators
speculators: $(VENV)/.installed-test
	test -x $(SPECULATORS)/bin/speculators || { $(PYTHON) -m venv $(SPECULATORS) && \
	    $(SPECULATORS)/bin/python -m pip install --quiet speculators==0.9.0; }
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.drafters.test_speculators
	$(SPECULATORS)/bin/python tests/drafters/speculators/make.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile

# The site, into build/site; a warning or a broken link is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# The package as people install it: sdist, the wheel made from it, and the demo out of an environment that has the wheel alone.
wheel: $(VENV)/.installed-build
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m build --outdir dist .
	@du -k dist/*
	$(MAKE) VENV=$(VENV)-wheel $(VENV)-wheel/.made
	$(VENV)-wheel/bin/python -m pip install --quiet dist/*.whl
	cd dist && ../$(VENV)-wheel/bin/fasteagle demo --max-new 16

clean:
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-ray .venv-maker build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is named by the extra of pyproject.toml that it installs: once, and again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

# Debian has python3 without its venv module; virtualenv out of a folder of its own then does the same and leaves the
# system's Python as it is.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV) || { \
	    $(PYTHON) -m pip install --quiet --target .venv-maker virtualenv && \
	    PYTHONPATH=.venv-maker $(PYTHON) -m virtualenv --clear $(VENV); }
	@touch $@
