"""What is known of the machine, and how its memory is used."""

import subprocess
import sys

# What half of the calls of a program that takes 64 MiB ask of the system at most, in pages.
FAULTS = """
import resource, statistics, sys
import jax
import jax.numpy as jnp
from activemlp_jax.training.hardware import keep_freed_memory

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
