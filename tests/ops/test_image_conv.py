"""Convolution of images, compared with XLA's convolution."""

import goldens
import jax
import jax.numpy as jnp
import pytest

from activemlp_jax.ops.image_conv import conv_image, grad_kernel_by_patches, plain_conv

STRIDES, PADDING = (4, 4), ((2, 2), (2, 2))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sides", [(32, 32), (37, 50)], ids=str)
def test_values_and_gradients_are_those_of_a_convolution(sides: tuple[int, int]):
    x = jnp.asarray(goldens.normal(0, "x", (2, *sides, 3)))
    kernel = jnp.asarray(goldens.normal(0, "kernel", (7, 7, 3, 8)))
    expected, transpose = jax.vjp(lambda x, k: plain_conv(x, k, STRIDES, PADDING), x, kernel)
    grad = jnp.asarray(goldens.normal(0, "grad", expected.shape))
    ours, our_transpose = jax.vjp(lambda x, k: conv_image(x, k, STRIDES, PADDING), x, kernel)
    goldens.assert_close(ours, expected, 1e-12, "value")
    for name, found, wanted in zip(
        ("grad_x", "grad_kernel"), our_transpose(grad), transpose(grad), strict=True
    ):
        goldens.assert_close(found, wanted, 1e-12, name)
    found = grad_kernel_by_patches(x, kernel, grad, STRIDES, PADDING)  # the implementation for TPUs
    goldens.assert_close(found, transpose(grad)[1], 1e-12, "grad_kernel by patches")
