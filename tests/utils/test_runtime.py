"""Settings that commands make for their whole process."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from activemlp_jax.utils.runtime import collect_garbage_rarely

CACHE_DIR = "JAX_COMPILATION_CACHE_DIR"

# Prints the median number of page faults of calls of a program that needs 64 MiB.
FAULTS = """
import resource, statistics, sys
import jax
import jax.numpy as jnp
from activemlp_jax.utils.runtime import keep_freed_memory

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


CACHE = """
import jax
from activemlp_jax.utils.runtime import keep_compiled_programs

keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("chosen", "place"), [({}, "caches/activemlp_jax/jax"), ({CACHE_DIR: "elsewhere"}, "elsewhere")]
)
def test_compiled_programs_are_kept_in_the_users_cache_or_where_told(
    chosen: dict[str, str], place: str, tmp_path: Path
):
    environment = {name: value for name, value in os.environ.items() if name != CACHE_DIR}
    environment |= {"XDG_CACHE_HOME": "caches", **chosen}
    command = [sys.executable, "-c", CACHE]
    printed = subprocess.check_output(command, env=environment, text=True, cwd=tmp_path)
    assert printed.strip() == place


@pytest.fixture
def threshold():
    """Restore the garbage collector's thresholds after a test."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("threshold")
def test_objects_that_live_on_are_rarely_searched_for_garbage():
    searches = []

    def note(phase: str, _: object) -> None:
        searches.append(phase)

    gc.callbacks.append(note)
    found = []
    try:
        for set_up in (lambda: gc.set_threshold(700), collect_garbage_rarely):
            set_up()
            searches.clear()
            alive = [[] for _ in range(40_000)]
            found.append(searches.count("start"))
            del alive
    finally:
        gc.callbacks.remove(note)
    usual, rarely = found
    assert usual > 40, f"{usual} searches"
    assert rarely <= 1, f"{rarely} searches"


TESTS = """
import os
import jax
import conftest

print(os.environ["JAX_COMPILATION_CACHE_DIR"], jax.config.jax_compilation_cache_dir)
"""


def test_the_tests_have_a_cache_of_their_own_where_the_user_has_another(tmp_path: Path):
    tests = Path(__file__).parents[1]
    path = f"{tests}:{tests / 'helpers'}:{tests.parent}"
    environment = os.environ | {CACHE_DIR: str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-c", TESTS]
    printed = subprocess.check_output(command, env=environment, text=True)
    assert printed.split() == [str(tests.parent / ".cache" / "jax-tests")] * 2
