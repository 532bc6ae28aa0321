"""What is known of the machine, and how its memory is used."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from activemlp_jax.training.hardware import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**28)))
    libc.memset(block, 1, ctypes.c_size_t(2**28))
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


glibc_alone = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt"
)


def faults(how: str, **variables: str) -> int:
    own = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.check_output(command, env={**own, **variables}))


@glibc_alone
def test_memory_that_was_freed_is_not_asked_of_the_system_again():
    kept, returned = faults("kept"), faults("returned")
    assert kept < 1000 < returned, (kept, returned)


@glibc_alone
def test_a_number_of_heaps_that_the_environment_sets_stays():
    assert faults("kept", MALLOC_ARENA_MAX="16") > 1000
