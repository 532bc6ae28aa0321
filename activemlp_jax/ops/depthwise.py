"""Depthwise convolution as shifted multiply-adds, which XLA fuses into one loop.

On a CPU, XLA's grouped convolution is an order of magnitude slower. On a TPU, the derivative that
JAX derives from the multiply-adds makes a whole step access a fifth more memory, because XLA pads
the map in the forward pass and keeps it; hence the custom VJP.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def plain_depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve each channel of `x` `[B, H, W, C]` with its own `kernel` `[3, 3, 1, C]`, padding 1.

    Returns:
      `[B, H, W, C]`, summed in float32 or wider and not rounded.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    _, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = jnp.zeros((), dtype)
    for i in range(3):
        for j in range(3):
            shifted = padded[:, i : i + height, j : j + width].astype(dtype)
            total = total + shifted * kernel[i, j].astype(dtype).reshape(1, 1, 1, channels)
    return total


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute `plain_depthwise`, with a custom VJP."""
    return plain_depthwise(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> Any:
    return depthwise(x, kernel), (x, kernel)


def _backward(residuals: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The barrier keeps XLA from padding the map before the gradient is available. The cast loses
    # nothing, because the layer rounds its output to the dtype of x.
    x, grad = jax.lax.optimization_barrier((residuals[0], grad.astype(residuals[0].dtype)))
    kernel = residuals[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(dtype)
    # On CPUs, XLA would pad and cast again for each of the sums.
    padded = jax.lax.platform_dependent(
        padded, cpu=jax.lax.optimization_barrier, default=lambda array: array
    )
    sums = [
        (padded[:, i : i + height, j : j + width] * grad).sum((0, 1, 2))
        for i in range(3)
        for j in range(3)
    ]
    grad_kernel = jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)
    return plain_depthwise(grad, kernel[::-1, ::-1]).astype(x.dtype), grad_kernel


depthwise.defvjp(_forward, _backward)


def _as_conv(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Give `function(x, kernel)` the arguments that `nn.Conv` passes to its convolution."""

    def convolve(
        x: jax.Array,
        kernel: jax.Array,
        strides: Sequence[int],
        padding: Sequence[tuple[int, int]],
        **_: Any,
    ) -> jax.Array:
        options = (*strides, *padding)
        assert options == (1, 1, (1, 1), (1, 1)), options
        return function(x, kernel)

    return convolve


# For `nn.Conv(conv_general_dilated=...)`.
conv_by_shifts, plain_conv_by_shifts = _as_conv(depthwise), _as_conv(plain_depthwise)
