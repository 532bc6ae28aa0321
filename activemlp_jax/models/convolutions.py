"""The network's convolutions, with the original's initial weights and rules of their own.

As `layers`, whose words on `dtype` and derivatives hold here too.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.models.layers import Dtype, add_bias, wide, written


def conv_init(groups: int = 1) -> nn.initializers.Initializer:
    """Normal with standard deviation sqrt(2 / fan_out), fan_out = k * k * out / groups."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        height, width, _, features = shape
        fan_out = height * width * features // groups
        return jax.random.normal(key, shape, dtype) * jnp.asarray(np.sqrt(2 / fan_out), dtype)

    return init


NHWC = ("NHWC", "HWIO", "NHWC")
FEW_CHANNELS = 16  # an image's are fewer, a stage's are not


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    sides = ((padding, padding),) * 2
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, sides, dimension_numbers=NHWC)


def _patches(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    """`[B, H', W', size * size * C]`: what a convolution reads for each place.

    A row of `stride` neighbouring pixels is one row of numbers, so that few slices are enough.
    """
    batch, height, width, channels = x.shape
    blocks = -(-size // stride)  # such rows, or parts of one, that a line of a patch touches
    out_height, out_width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
    rows, columns = out_height + blocks - 1, out_width + blocks - 1
    behind = (rows * stride - height - padding, columns * stride - width - padding)
    sides = [(0, 0, 0), *((padding, side, 0) for side in behind), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), sides)
    x = x.reshape(batch, rows, stride, columns, stride * channels)
    parts = []
    for i in range(size):
        line = x[:, i // stride : i // stride + out_height, i % stride]
        for j in range(blocks):
            read = min(stride, size - j * stride) * channels
            parts.append(line[:, :, j : j + out_width, :read])
    return jnp.concatenate(parts, axis=-1)


def convolve_by_patches(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """`convolve` as one product of patches."""
    patches = _patches(x, len(kernel), stride, padding)
    flat = kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.dot_general(patches, flat, (((3,), (0,)), ((), ())))


POSITIONS = (((0, 1, 2), (0, 1, 2)), ((), ()))  # to sum a product over


def cotangent_by_slices(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int, padding: int
) -> jax.Array:
    """The derivative of `convolve` by the kernel, as one product of patches."""
    patches = _patches(x, len(kernel), stride, padding)
    # A CPU transposes the first operand: let that be the smaller one.
    return jax.lax.dot_general(cotangent, patches, POSITIONS).T.reshape(kernel.shape)


def cotangent_by_filters(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int, padding: int
) -> jax.Array:
    """The derivative of `convolve` by the kernel, as one product of patches that filters cut."""
    size, _, channels, features = kernel.shape
    patches = jax.lax.conv_general_dilated_patches(
        x, (size,) * 2, (stride,) * 2, ((padding, padding),) * 2, dimension_numbers=NHWC
    )
    products = jax.lax.dot_general(patches, cotangent, POSITIONS)
    return products.reshape(channels, size, size, features).transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A convolution, `[B, H, W, C]` by `[size, size, C, features]`.

    CPUs are faster at one product of patches, which a stride of 2 or more makes few of. A TPU's
    compiler takes three quarters of a minute for the derivative by the kernel of an image's
    convolution, as one with the cotangent for a kernel: there that is a product of patches, too.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(convolve_by_patches, stride=stride, padding=padding),
        default=functools.partial(_convolve, stride=stride, padding=padding),
    )


def _convolve_forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> Any:
    return convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(
    stride: int, padding: int, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    of_image = x.shape[-1] < FEW_CHANNELS
    if of_image:
        # A TPU's compiler would take the patches in the forward pass, and keep them until here.
        x, cotangent = jax.lax.optimization_barrier((x, cotangent))

    def by_convolution(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
        transposed = jax.linear_transpose(lambda k: _convolve(x, k, stride, padding), kernel)
        return transposed(cotangent)[0]

    by_filters = functools.partial(cotangent_by_filters, stride=stride, padding=padding)
    kernel_cotangent = jax.lax.platform_dependent(
        x,
        kernel,
        cotangent,
        cpu=functools.partial(cotangent_by_slices, stride=stride, padding=padding),
        tpu=by_filters if of_image else by_convolution,
        default=by_convolution,
    )
    transposed = jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)
    return transposed(cotangent)[0], kernel_cotangent


convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(nn.Module):
    """A square convolution with bias: `[B, H, W, C]` to `[B, H', W', features]`.

    Pads `padding` pixels on every side.
    """

    features: int
    size: int
    stride: int
    padding: int
    dtype: Dtype
    kernel_init: nn.initializers.Initializer = conv_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, dtype = x.shape[-1], wide(self.dtype)
        shape = (self.size, self.size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        function = _convolve if self.stride == 1 else convolve
        out = function(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        return add_bias(out, bias)


def conv(
    features: int, size: int, stride: int, padding: int, dtype: Dtype, name: str | None = None
) -> Conv:
    """A square convolution with bias; `padding` pixels on every side."""
    return Conv(features, size, stride, padding, dtype, name=name)


@jax.custom_vjp
def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 with padding 1 of `x` `[B, H, W, C]` by `kernel` `[3, 3, 1, C]`, in its dtype."""
    _, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = jnp.zeros((), kernel.dtype)
    for i in range(3):
        for j in range(3):
            shifted = x[:, i : i + height, j : j + width].astype(kernel.dtype)
            total = total + shifted * kernel[i, j].reshape(1, 1, 1, channels)
    return total


def _depthwise_forward(x: jax.Array, kernel: jax.Array) -> Any:
    return _depthwise(x, kernel), (x, kernel)


def _depthwise_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    # A TPU's compiler would make the padded map in the forward pass, and keep it until here. The
    # layer rounds to the dtype of x, so that the cotangent is of that dtype, too.
    x, cotangent = jax.lax.optimization_barrier((x, cotangent.astype(x.dtype)))
    _, height, width, _ = x.shape
    padded = written(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(kernel.dtype))
    sums = [
        (padded[:, i : i + height, j : j + width] * cotangent).sum((0, 1, 2))
        for i in range(3)
        for j in range(3)
    ]
    x_cotangent = _depthwise(cotangent, kernel[::-1, ::-1]).astype(x.dtype)
    return x_cotangent, jnp.stack(sums).reshape(kernel.shape)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel alone, with padding 1: `[B, H, W, C]` to the same.

    Nine shifted multiply-adds, which XLA makes one loop of; its grouped convolution is an order
    of magnitude slower on a CPU. The parameters are those of the convolution.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, sum_dtype = x.shape[-1], wide(self.dtype)  # as a convolution's sum
        kernel = self.param("kernel", conv_init(groups=channels), (3, 3, 1, channels), sum_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), sum_dtype)
        return add_bias(_depthwise(x.astype(self.dtype), kernel), bias).astype(self.dtype)
