# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv as needed.
#
#   PYTHON=python3.12   another Python than python3 (3.11 to 3.13)
#   PIP_FLAGS=...       more flags for pip, such as an index with a CPU build of torch
#   DEMO_FLAGS=...      more flags for the demo's train.py, such as --workdir=runs/again
#   TEST_FLAGS=...      more flags for pytest, such as -n 0 for one process instead of two

PYTHON ?= python3
PIP_FLAGS ?=
DEMO_FLAGS ?=
TEST_FLAGS ?=

.PHONY: demo test lint clean

# JAX locks a cache of compiled programs only where its size has a limit. All processes that share a
# cache have to agree on that, so the user's own cache is taken as it is; the tests have another.
ifndef JAX_COMPILATION_CACHE_DIR
demo: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
demo: export JAX_COMPILATION_CACHE_MAX_SIZE := 8589934592
endif
demo: .venv/demo-installed
	.venv/bin/python train.py --config configs/digits.py $(DEMO_FLAGS)

test: .venv/test-installed .cache/libtpu-tried
	.venv/bin/python -m pytest -n 2 --dist loadgroup $(TEST_FLAGS)

lint: .venv/dev-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

clean:
	rm -rf .venv .cache

# The compiler for TPUs, for the tests of compile_check, which skip what it is needed for where it
# cannot be installed. Outside .venv, as JAX would look for a TPU at every start.
.cache/libtpu-tried: .venv/bin/python constraints.txt
	mkdir -p .cache
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--constraint constraints.txt $(PIP_FLAGS) --target .cache/libtpu libtpu \
		|| echo "no TPU compiler; its tests will be skipped"
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-installed: EXTRA =
.venv/test-installed: EXTRA = [test]
.venv/dev-installed: EXTRA = [dev]
.venv/%-installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv; pip says nothing until it is done, which may take some minutes"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt $(PIP_FLAGS) --editable '.$(EXTRA)'
	touch $@
