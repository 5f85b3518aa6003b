# make demo   the whole chain on real text: tokenizer, tokens, pretraining on 2 ranks, evaluation, curves
# make test   the tests, but for slow ones and those on a Slurm
# make test-slow   other cases of what make test shows, and what takes long: the demo, chaos
# make test-slurm   jobs on a real Slurm, which the tests start on this machine (apt-get install slurm-wlm munge)
# make lint   ruff, mypy, import-linter
# PYTHON chooses the interpreter that .venv is made with: make test PYTHON=python3.11
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_ARGS ?=
# Test files that run at once. Those of a file share what they start, so a file stays whole
PYTEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-slurm lint setup clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-slurm: $(STAMP)
	$(BIN)/python -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(STAMP)

# pip's download cache makes a second machine-wide set-up cheap; the stamp makes a second make instant.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
