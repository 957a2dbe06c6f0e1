# Every target sets up what it needs. A machine with Python 3.12 and make is enough.
#   make demo MODEL=path/to/checkpoint PROMPTS=prompts.txt
#   make test ARGS="-m slow"       arguments are handed to pytest
#   make PYTHON=/path/to/python3.12 setup

find_python = for p in python3.12 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 && { command -v "$$p"; break; }; done
PYTHON ?= $(shell $(find_python))
VENV := .venv
PY := $(VENV)/bin/python
COMPILER := $(VENV)/gpu-compiler
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup gpu-compiler demo test lint format types docs notebooks wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST) | awk -F': *' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## make .venv with the pinned dependencies and this package, editable

$(STAMP): pyproject.toml constraints.txt
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { \
		python='$(PYTHON)'; \
		"$${python:-false}" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 || { \
			echo "error: Python 3.12 is needed and was not found; install it or run: make PYTHON=/path/to/python3.12" >&2; \
			exit 1; }; \
		"$$python" -m venv --clear $(VENV); }
	$(PY) -m pip install --disable-pip-version-check --quiet -e '.[test,dev,notebooks,docs]' -c constraints.txt
	@touch $@

gpu-compiler: $(COMPILER)/.stamp  ## XLA for NVIDIA GPUs, beside the packages, to compile for H200s without one (Linux)

# Not among the packages: JAX would look for a GPU and, on a machine without one, complain at every start.
$(COMPILER)/.stamp: $(STAMP)
	rm -rf $(COMPILER) && mkdir -p $(COMPILER)
	if [ "$$(uname -s)" = Linux ]; then $(PY) -m pip install --disable-pip-version-check --quiet --no-deps \
		--target $(COMPILER) jax-cuda13-plugin jax-cuda13-pjrt -c constraints.txt; fi
	@touch $@

demo: setup  ## show equal bits across meshes (MODEL=checkpoint folder, PROMPTS=file; both optional)
	$(PY) -m tbik_jax.demo $(if $(MODEL),--model '$(MODEL)') $(if $(PROMPTS),--prompts '$(PROMPTS)')

test: setup gpu-compiler  ## run the tests that need no GPU, two files at a time (ARGS=... goes to pytest; -n 0 takes one)
	$(PY) -m pytest --durations=40 -n 2 --dist loadfile $(ARGS)

lint: setup  ## check style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup  ## fix style and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: setup  ## check types
	$(PY) -m mypy

docs: setup  ## build the documentation into site, without network and without a warning
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --clean

notebooks: setup  ## execute the notebooks into notebooks/*.ipynb, with their plots
	$(PY) -m jupytext --to ipynb --execute --run-path . notebooks/*.py

wheel: setup  ## build the sdist, and the wheel from it, into dist
	rm -rf build dist
	$(PY) -m build --no-isolation

clean:  ## remove build products, executed notebooks, caches and demo checkpoints; .venv stays
	rm -rf build dist site notebooks/*.ipynb *.egg-info .demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
