"""What commands set for their whole process."""

import gc
import subprocess
import sys

import pytest

from activemlp_jax.process import collect_garbage_rarely

# What half of the calls of a program that takes 64 MiB ask of the system at most, in pages.
FAULTS = """
import resource, statistics, sys
import jax
import jax.numpy as jnp
from activemlp_jax.process import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
program = jax.jit(lambda x: jnp.outer(x, x))
asked = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(jnp.ones(4096)).block_until_ready()
    asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(asked))
"""


def test_the_memory_of_a_program_is_not_asked_of_the_system_again():
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how]))
        for how in ("kept", "returned")
    )
    assert kept < 1000 < returned, (kept, returned)


@pytest.fixture
def threshold():
    """Whatever a test sets is undone."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("threshold")
def test_objects_that_live_on_are_rarely_searched_for_garbage():
    searches = []
    gc.callbacks.append(lambda phase, _: searches.append(phase))
    found = []
    try:
        for set_up in (lambda: gc.set_threshold(700), collect_garbage_rarely):
            set_up()
            searches.clear()
            alive = [[] for _ in range(40_000)]
            found.append(searches.count("start"))
            del alive
    finally:
        gc.callbacks.pop()
    usual, rarely = found
    assert usual > 40, f"{usual} searches"
    assert rarely <= 1, f"{rarely} searches"
