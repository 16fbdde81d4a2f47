# make quickstart   set up, then train a digit classifier with CLARS (about 2 minutes after installation)
# make test         set up, then run the tests
# make test-lowest  the tests that meet the libraries, with the lowest versions that pyproject.toml allows
# make check        lint, format and types
# make docs         the API reference, from the docstrings, into build/api
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

# Tests begin some hundred processes: without bytecode on disk each would compile the project's 360 files anew.
export PYTHONDONTWRITEBYTECODE =

# What accelerate would otherwise guess, with a warning: one process on all cores.
LAUNCH := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
          --num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)

.PHONY: quickstart test test-lowest check docs setup setup-test setup-lowest clean
.DELETE_ON_ERROR:

quickstart: setup
	$(BIN)/accelerate launch $(LAUNCH) \
	  scripts/train_imagenet.py --config configs/quickstart.yaml

# A worker a core, and one thread a worker: tests are many small things, and threads would wait for each other. A file stays
# on one worker, so that what it sets up is set up once; files that share it stay together (tests/conftest.py).
test: setup-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

# Where a library's older version would show: its interfaces, private names, files, and the loops of Trainer.
LOWEST_TESTS := tests/test_torch_internals.py tests/test_torch_traces.py tests/test_three_ways_in.py tests/test_norms_exact.py \
                tests/test_safe_checkpoints.py tests/test_hub_push.py tests/test_hub_push_ways.py \
                tests/test_live_view.py tests/test_data.py tests/test_own_losses.py tests/test_settings_refused.py \
                tests/test_norms_in_use.py tests/test_norms_in_the_graph.py tests/test_norms_known_graphs.py \
                tests/test_norms_compiled.py tests/test_norms_compiled_tracing.py

test-lowest: setup-lowest
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadgroup $(LOWEST_TESTS) $(PYTEST_ARGS)

check: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/build_api_reference.py build/api

docs: setup-test
	$(BIN)/python scripts/build_api_reference.py build/api

setup: $(VENV)/.quickstart
setup-test: $(VENV)/.test

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12" if not (3, 11) <= v <= (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[quickstart]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/.quickstart

# uv is the resolver that can choose the lowest versions; it is installed beside them.
LOWEST := $(VENV)-lowest
setup-lowest: $(LOWEST)/.test
$(LOWEST)/.test: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
