# Two commands for a fresh machine: `make demo` and `make test`. Each creates .venv if needed.
#
#   PYTHON=python3.12   Python to use instead of python3 (3.11 to 3.13)
#   PIP_FLAGS=...       extra pip flags, such as an index with a CPU build of torch
#   DEMO_FLAGS=...      extra flags for the demo's train.py, such as --workdir=runs/again
#   TEST_FLAGS=...      extra pytest flags, such as -n 0 for one process instead of two

PYTHON ?= python3
PIP_FLAGS ?=
DEMO_FLAGS ?=
TEST_FLAGS ?=

.PHONY: demo test lint clean

# JAX locks a compilation cache only if the cache has a size limit, and all processes that share a
# cache must agree on that. So a cache that the user has set is used unchanged, and the tests have
# their own.
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

# The TPU compiler, for the tests of compile_check; tests that need it are skipped if it cannot be
# installed. It is outside .venv because JAX would otherwise look for a TPU at every start.
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
