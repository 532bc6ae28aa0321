"""The Active Token Mixer's operator: read features at learned positions along one axis.

`sample_axis` is the only public function. `reference` defines what it computes; the other modules
of the package hold its implementations, which each suit one kind of platform.

Source: "Active Token Mixer" (AAAI 2023, arXiv 2203.06108), section 3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike

from activemlp_jax.ops import dense, gather, pallas_gpu, pallas_tpu, reference


class Implementation(NamedTuple):
    """One implementation of the operator; `activemlp_jax.ops` describes the two functions."""

    forward: Callable[[jax.Array, jax.Array, str], jax.Array]
    backward: Callable[[jax.Array, jax.Array, jax.Array, str], tuple[jax.Array, jax.Array]]


def _gather_dense_backward(
    x: jax.Array, offset: jax.Array, grad: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    return (
        dense.grad_x(x, offset, grad, axis),
        gather.grad_offset(x, offset, grad, axis),
    )


IMPLEMENTATIONS = {
    "gather": Implementation(gather.forward, gather.backward),
    "dense": Implementation(dense.forward, dense.backward),
    "gather_dense": Implementation(gather.forward, _gather_dense_backward),
    "pallas_tpu": Implementation(pallas_tpu.forward, pallas_tpu.backward),
    "pallas_gpu": Implementation(pallas_gpu.forward, pallas_gpu.backward),
}
NAMES = ("definition", *IMPLEMENTATIONS)


@partial(jax.jit, static_argnums=(0, 1, 2))  # traces once for all blocks of the same shape
def _run(impl: str, part: str, axis: str, *arrays: jax.Array) -> Any:
    """Run 'forward' or 'backward' of an implementation; 'auto' selects it by platform."""
    if impl != "auto":
        return getattr(IMPLEMENTATIONS[impl], part)(*arrays, axis=axis)
    # On GPUs a scatter-add is nondeterministic, so runs would differ in their last digits. Where a
    # GPU cannot run the kernels, the backward pass is therefore a dense sum.
    names = {"cpu": "gather", "tpu": "dense", "default": "gather_dense"}
    # A program for any batch size is exported for several platforms at once. JAX lowers each branch
    # for all of them, and Pallas cannot do that.
    if arrays[1].dtype == jnp.float32 and not is_symbolic_dim(arrays[0].shape[0]):
        names["tpu"] = "pallas_tpu"
        if pallas_gpu.runs_here():
            names["cuda"] = "pallas_gpu"
    functions = {
        platform: partial(getattr(IMPLEMENTATIONS[name], part), axis=axis)
        for platform, name in names.items()
    }
    return jax.lax.platform_dependent(*arrays, **functions)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sample(x: jax.Array, offset: jax.Array, axis: str, impl: str) -> jax.Array:
    return _run(impl, "forward", axis, x, offset)


def _sample_forward(x: jax.Array, offset: jax.Array, axis: str, impl: str) -> Any:
    return _sample(x, offset, axis, impl), (x, offset)


def _sample_backward(axis: str, impl: str, arguments: Any, grad: jax.Array) -> Any:
    return _run(impl, "backward", axis, *arguments, grad)


_sample.defvjp(_sample_forward, _sample_backward)


def sample_axis(x: ArrayLike, offset: ArrayLike, axis: str, impl: str = "auto") -> jax.Array:
    """Read features at positions shifted along one axis, by linear interpolation.

    With `p = coordinate + offset` and `f = p - floor(p)`, the result is
    `(1 - f) * x[floor(p)] + f * x[floor(p) + 1]`; features outside the map are zero. Any finite
    offset is safe. A NaN or infinite offset gives NaN at its own position and nowhere else. The
    derivative with respect to the offset is `x[floor(p) + 1] - x[floor(p)]`, also at exact
    integers.

    Args:
      x: `[B, H, W, C]`, floating.
      offset: `[B, H, W, G]`, floating, in pixels. G divides C, and group g shifts the channels
        `g*C/G` to `(g+1)*C/G - 1`.
      axis: 'h' or 'w', the axis to shift along.
      impl: 'auto' selects an implementation for the platform that the program is compiled for. The
        implementations are 'definition', 'gather', 'dense', 'gather_dense', 'pallas_tpu' and
        'pallas_gpu'. Only 'definition' supports forward-mode and second derivatives.

    Returns:
      `[B, H, W, C]` in the dtype of `x`. Offsets and interpolation use float32 or wider.

    Raises:
      ValueError: G does not divide C, the leading shapes differ, `axis` or `impl` is unknown, or
        `impl` is 'pallas_tpu' or 'pallas_gpu' and an input is float64.

    Source: Active Token Mixer, section 3.
    """
    x, offset = jnp.asarray(x), jnp.asarray(offset)
    chex.assert_rank([x, offset], 4, exception_type=ValueError)
    channels, groups = x.shape[-1], offset.shape[-1]
    if offset.shape[:3] != x.shape[:3]:
        raise ValueError(
            f"sample_axis: offset {offset.shape} must have the batch, height and width of x "
            f"{x.shape}"
        )
    if groups == 0 or channels % groups:
        raise ValueError(
            f"sample_axis: offset {offset.shape} has {groups} groups, which do not divide the "
            f"{channels} channels of x {x.shape}"
        )
    if axis not in ("h", "w"):
        raise ValueError(f"sample_axis: axis is {axis!r}, expected 'h' or 'w'")
    if impl not in ("auto", *NAMES):
        raise ValueError(
            f"sample_axis: impl is {impl!r}, expected 'auto' or one of {', '.join(NAMES)}"
        )
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, offset.dtype), jnp.float32)
    if impl.startswith("pallas") and dtype != jnp.float32:
        raise ValueError(f"sample_axis: impl {impl!r} computes in float32, not in {dtype}")
    if impl == "definition":
        return reference.sample(x, offset.astype(dtype), axis)
    return _sample(x, offset.astype(dtype), axis, impl)
