"""What is known of the machine, and how its memory is used."""

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_that_was_freed_is_not_asked_of_the_system_again():
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how]))
        for how in ("kept", "returned")
    }
    assert faults["kept"] < 1000 < faults["returned"], faults
