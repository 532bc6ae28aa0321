"""The Active Token Mixer's operator: read features at learned positions along one axis.

`sample_axis` is the only entry. What it computes is said by `sampling.definition`; the other
forms in `sampling` compute the same in ways that suit a machine.

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

from activemlp_jax.ops import dense, gather, gpu, reference, tpu


class Form(NamedTuple):
    """A way to compute the operator and its derivatives; see `sampling` for what each takes."""

    forward: Callable[[jax.Array, jax.Array, str], jax.Array]
    backward: Callable[[jax.Array, jax.Array, jax.Array, str], tuple[jax.Array, jax.Array]]


def _gather_dense_backward(
    x: jax.Array, offset: jax.Array, cotangent: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    return (
        dense.x_cotangent(x, offset, cotangent, axis),
        gather.offset_cotangent(x, offset, cotangent, axis),
    )


FORMS = {
    "gather": Form(gather.forward, gather.backward),
    "dense": Form(dense.forward, dense.backward),
    "gather_dense": Form(gather.forward, _gather_dense_backward),
    "pallas_tpu": Form(tpu.forward, tpu.backward),
    "pallas_gpu": Form(gpu.forward, gpu.backward),
}
IMPLEMENTATIONS = ("definition", *FORMS)


@partial(jax.jit, static_argnums=(0, 1, 2))  # traces a shape once for all blocks
def _run(impl: str, part: str, axis: str, *arrays: jax.Array) -> Any:
    """`part` of the form `impl`, or of that of the platform which the program is compiled for.

    On GPUs scattered additions have an order of chance, which would make runs differ in their last
    digits: where kernels cannot be used there, the transpose is dense.
    """
    if impl != "auto":
        return getattr(FORMS[impl], part)(*arrays, axis)
    names = {"cpu": "gather", "tpu": "dense", "default": "gather_dense"}
    # A program for any batch size is one for several platforms too, which kernels are refused in.
    if arrays[1].dtype == jnp.float32 and not is_symbolic_dim(arrays[0].shape[0]):
        names["tpu"] = "pallas_tpu"
        if gpu.runs_here():
            names["cuda"] = "pallas_gpu"
    forms = {name: partial(getattr(FORMS[form], part), axis=axis) for name, form in names.items()}
    return jax.lax.platform_dependent(*arrays, **forms)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sample(x: jax.Array, offset: jax.Array, axis: str, impl: str) -> jax.Array:
    return _run(impl, "forward", axis, x, offset)


def _sample_forward(x: jax.Array, offset: jax.Array, axis: str, impl: str) -> Any:
    return _sample(x, offset, axis, impl), (x, offset)


def _sample_backward(axis: str, impl: str, arguments: Any, cotangent: jax.Array) -> Any:
    return _run(impl, "backward", axis, *arguments, cotangent)


_sample.defvjp(_sample_forward, _sample_backward)


def sample_axis(x: ArrayLike, offset: ArrayLike, axis: str, impl: str = "auto") -> jax.Array:
    """Read features at positions shifted along one axis, by linear interpolation.

    With `p = own coordinate + offset` and `f = p - floor(p)`, the result is
    `(1 - f) * x[floor(p)] + f * x[floor(p) + 1]`; outside the map features are zero. Any finite
    offset is safe; a NaN or infinite offset gives NaN where it stands and nowhere else. The
    derivative by the offset is `x[floor(p) + 1] - x[floor(p)]`, at exact integers too.

    Args:
      x: `[B, H, W, C]`, floating.
      offset: `[B, H, W, G]`, floating, in pixels; G divides C, and group g moves the channels
        `g*C/G` to `(g+1)*C/G - 1`.
      axis: 'h' or 'w', the axis the offsets move along.
      impl: 'auto', the form for the platform that the program is compiled for, or one of
        'definition', 'gather', 'dense', 'gather_dense', 'pallas_tpu' and 'pallas_gpu'. Only
        'definition' has derivatives in forward mode and second ones.

    Returns:
      `[B, H, W, C]`, dtype of `x`; offsets and interpolation are computed in float32 or wider.

    Raises:
      ValueError: G does not divide C, the leading shapes differ, `axis` or `impl` is unknown, or
        a kernel, 'pallas_tpu' or 'pallas_gpu', is to compute in float64.

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
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"sample_axis: impl is {impl!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}"
        )
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, offset.dtype), jnp.float32)
    if impl.startswith("pallas") and dtype != jnp.float32:
        raise ValueError(f"sample_axis: impl {impl!r} computes in float32, not in {dtype}")
    if impl == "definition":
        return reference.sample(x, offset.astype(dtype), axis)
    return _sample(x, offset.astype(dtype), axis, impl)
