PYTHON ?= python3
OLDEST ?= python3.10
BIN := .venv/bin

# Threads that wait for each other sleep instead of spinning: on a busy machine spinning makes small models crawl.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0

.PHONY: demo test check docs oldest engines bench bench-speed clean

demo: .venv/installed  ## calibrate tiny-flux, plan, generate in full and cached, write report.html
	$(BIN)/dpcache demo

test: .venv/installed  ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

check: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed  ## the documentation as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo open site/index.html in a browser, or for its search: python -m http.server -d site

.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

oldest:  ## the core on the oldest Python, torch, diffusers and transformers that it is for, in .venv-oldest
	test -d .venv-oldest || $(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . transformers \
	  accelerate peft pytest pytest-xdist hypothesis scikit-image ftfy
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses auto --maxprocesses 4 -p no:cacheprovider \
	  tests/pipelines/test_table.py tests/pipelines/test_since.py tests/test_planner.py tests/test_costs.py tests/test_curves.py tests/test_recipe.py \
	  tests/test_journal.py

engines: .venv/installed  ## the plug-in in cache-dit, SGLang, vLLM-Omni and xDiT, from their own wheels, on the CPU
	$(BIN)/python integrations/engines/check.py --install .engines --only-install
	for engine in .engines/*; do \
	  PYTHONPATH=$$engine OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_engines.py || exit 1; \
	done
	for engine in .engines/cache-dit-*; do \
	  PYTHONPATH=$$engine OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_engines_plugin.py tests/test_export.py || exit 1; \
	done
	$(BIN)/python integrations/engines/check.py --install .engines

bench: .venv/installed  ## every default at every K, and peers beside them: docs/defaults.md, benchmarks/results/peers.md; hours
	$(BIN)/python -m benchmarks.defaults
	$(BIN)/python -m benchmarks.peers

bench-speed: .venv/installed  ## how fast: docs/performance.md; about 15 minutes on an idle machine
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed

clean:
	rm -rf .venv .venv-oldest .engines site .mypy_cache .ruff_cache .pytest_cache
