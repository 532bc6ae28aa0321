"""Reading a compiled program's collectives, memory and costs from its HLO text and statistics."""

import jax
import jax.numpy as jnp
import pytest

from activemlp_jax.benchmark.hlo_cost import (
    Resources,
    Traffic,
    count_bounds,
    count_collectives,
    count_resources,
)
from activemlp_jax.utils.hardware import Chip

# Lines as compilers write them for eight devices, with shortened names.
PROGRAM = """
  %all-reduce = (f32[8,4]{1,0}, f32[], bf16[16]{0}) all-reduce(%a, %b, %c), replica_groups={}, u=1
  %all-reduce.1 = f32[2,3]{1,0:T(2,128)S(1)} all-reduce(%d), replica_groups=[2,4]<=[8], t=%add
  %ars = (f32[5]{0}, f32[6]{0}) all-reduce-start(%e, %f), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %ard = (f32[5]{0}, f32[6]{0}) all-reduce-done(%ars)
%s = ((u8[4],u8[8]),(u8[16],u8[32])) all-gather-start(%g,%h), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %agd = (f32[16]{0}, f32[32]{0}) all-gather-done(%ags)
  %rs = f32[4]{0} reduce-scatter(%h), replica_groups=[2,4]<=[8]
  %rss = ((f32[16]{0}), f32[4]{0}, u32[]) reduce-scatter-start(%h), replica_groups=[2,4]<=[8]
  %cp = (bf16[10]{0}, bf16[10]{0}, u32[], u32[]) collective-permute-start(%i), channel_id=6
  %x = f32[9]{0} add(%all-reduce.1, %y), metadata={op_name="all-reduce(z)"}
"""


def test_collectives_are_counted_by_kind_with_the_bytes_they_give_and_send():
    first, second, third = 4 * (32 + 1) + 2 * 16, 4 * 6, 4 * 11
    gathered = 16 + 32
    assert count_collectives(PROGRAM, 8) == {
        "all-reduce": Traffic(
            3, first + second + third, 2 * (7 / 8 * first + 3 / 4 * second + 1 / 2 * third)
        ),
        "all-gather": Traffic(1, gathered, 3 / 4 * gathered),
        "reduce-scatter": Traffic(2, 2 * 16, 3 * 2 * 16),
        "collective-permute": Traffic(1, 20, 20),
    }


def test_a_compiled_program_says_what_it_needs():
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return a @ b

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    resources = count_resources(jax.jit(product).lower(shape, shape).compile(), 1)
    assert resources.arguments == 2 * 4 * 64 * 64
    assert resources.results == 4 * 64 * 64
    assert resources.flops == pytest.approx(2 * 64**3, rel=0.01)
    assert resources.memory >= resources.arguments + resources.results
    assert resources.collectives == {}


def test_donated_buffers_count_once():
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    resources = count_resources(add.lower(shape).compile(), 1)
    assert (resources.arguments, resources.results) == (4 * 64 * 64, 0)


def test_a_step_takes_as_long_as_the_slowest_of_its_parts():
    chip = Chip(flops=100.0, memory=1e9, bandwidth=10.0, interconnect=5.0)
    traffic = {"all-reduce": Traffic(1, 20, 30.0), "all-gather": Traffic(1, 8, 6.0)}
    resources = Resources(0, 0, 0, 0, 0.0, 40.0, traffic, gathers=0, scatters=0)
    bounds = count_bounds(resources, flops=300.0, chip=chip)
    assert bounds.compute == 3.0
    assert bounds.memory == 4.0
    assert bounds.interconnect == (30 + 6) / 5
    assert bounds.step == max(bounds)
