# Every target installs what it needs on its first call; after that nothing here touches the network.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help install demo check test test-slow test-gpu wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## create .venv and install the project with its development tools

demo: $(STAMP) ## from game video to predicted frames and a report, no download (ARGS="key=value ..." changes it)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/vidgpt-demo $(ARGS)

check: $(STAMP) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP) ## the default tests, a few minutes on two cores
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(STAMP) ## the slow tests: whole commands, the built wheel
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP) ## the tests that need a GPU
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -m gpu $(ARGS)

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove caches and builds; .venv, runs and data stay
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache
	find vidtok vidgpt tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is not one of them: call make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
