"""Convolution of images whose kernel gradient compiles quickly on TPUs.

XLA takes three quarters of a minute to compile the stem's kernel gradient for a TPU as a
convolution, whose window is as large as the output. As one matmul of patches, it takes two seconds.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Pairs = tuple[tuple[int, int], ...]


def plain_conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Pairs) -> Any:
    """Convolve `x` `[B, H, W, C]` with `kernel` `[k, k, C, features]`."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Pairs) -> jax.Array:
    return plain_conv(x, kernel, strides, padding)


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Pairs) -> Any:
    return _conv(x, kernel, strides, padding), (x, kernel)


def grad_kernel_by_patches(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, strides: tuple[int, ...], padding: Pairs
) -> jax.Array:
    """Compute the gradient of `kernel` by one matmul of the patches of `x` with `grad`."""
    *sides, channels, features = kernel.shape
    patches = jax.lax.conv_general_dilated_patches(
        x, sides, strides, padding, dimension_numbers=DIMENSIONS
    )
    positions = ((0, 1, 2), (0, 1, 2))
    product = jax.lax.dot_general(patches, grad, (positions, ((), ())))
    return product.reshape(channels, *sides, features).transpose(1, 2, 0, 3)


def _backward(
    strides: tuple[int, ...], padding: Pairs, residuals: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Without the barrier, XLA would cut the patches in the forward pass and keep them until here.
    x, kernel = residuals
    x, grad = jax.lax.optimization_barrier((x, grad))
    _, transpose = jax.vjp(partial(plain_conv, strides=strides, padding=padding), x, kernel)
    grad_x, grad_kernel = transpose(grad)
    grad_kernel = jax.lax.platform_dependent(
        tpu=lambda: grad_kernel_by_patches(x, kernel, grad, strides, padding),
        default=lambda: grad_kernel,
    )
    return grad_x, grad_kernel


_conv.defvjp(_forward, _backward)


def conv_image(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **_: Any,
) -> jax.Array:
    """Compute `plain_conv`, for `nn.Conv(conv_general_dilated=...)` without dilation or groups."""
    return _conv(x, kernel, tuple(strides), tuple(padding))
