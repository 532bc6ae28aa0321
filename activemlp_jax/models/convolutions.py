"""The network's convolutions, with the original's initialization and custom derivative rules.

`dtype` and derivatives follow the rules in `layers`.
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
    """Normal initializer, standard deviation sqrt(2 / fan_out), fan_out = k * k * out / groups."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        height, width, _, features = shape
        fan_out = height * width * features // groups
        return jax.random.normal(key, shape, dtype) * jnp.asarray(np.sqrt(2 / fan_out), dtype)

    return init


NHWC = ("NHWC", "HWIO", "NHWC")
MIN_STAGE_CHANNELS = 16  # an input with fewer channels is taken to be an image


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    pads = ((padding, padding),) * 2
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=NHWC)


def _patches(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    """Patches that a convolution reads, one per output pixel: `[B, H', W', size * size * C]`."""
    # Runs of `stride` adjacent pixels of a row are sliced together, so few slices are needed.
    batch, height, width, channels = x.shape
    runs = -(-size // stride)  # per row of a patch; the last may be partial
    out_height, out_width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
    rows, columns = out_height + runs - 1, out_width + runs - 1
    pads_after = (rows * stride - height - padding, columns * stride - width - padding)
    pads = [(0, 0, 0), *((padding, after, 0) for after in pads_after), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), pads)
    x = x.reshape(batch, rows, stride, columns, stride * channels)
    parts = []
    for i in range(size):
        row = x[:, i // stride : i // stride + out_height, i % stride]
        for j in range(runs):
            length = min(stride, size - j * stride) * channels
            parts.append(row[:, :, j : j + out_width, :length])
    return jnp.concatenate(parts, axis=-1)


def convolve_by_patches(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Compute `convolve` by one matmul of patches."""
    patches = _patches(x, len(kernel), stride, padding)
    flat = kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.dot_general(patches, flat, (((3,), (0,)), ((), ())))


SUM_OVER_POSITIONS = (((0, 1, 2), (0, 1, 2)), ((), ()))  # dimension numbers of `dot_general`


def cotangent_by_slices(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int, padding: int
) -> jax.Array:
    """Kernel cotangent of `convolve`, by one matmul of patches that are cut by slices."""
    patches = _patches(x, len(kernel), stride, padding)
    # CPUs transpose the first operand, so it should be the smaller one.
    return jax.lax.dot_general(cotangent, patches, SUM_OVER_POSITIONS).T.reshape(kernel.shape)


def cotangent_by_filters(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int, padding: int
) -> jax.Array:
    """Kernel cotangent of `convolve`, by one matmul of patches that are cut by a convolution."""
    size, _, channels, features = kernel.shape
    patches = jax.lax.conv_general_dilated_patches(
        x, (size,) * 2, (stride,) * 2, ((padding, padding),) * 2, dimension_numbers=NHWC
    )
    product = jax.lax.dot_general(patches, cotangent, SUM_OVER_POSITIONS)
    return product.reshape(channels, size, size, features).transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolve `x` `[B, H, W, C]` with `kernel` `[size, size, C, features]`.

    On CPUs, this is one matmul of patches, which is faster if the stride is at least 2 and patches
    are few. On TPUs, so is the kernel gradient if `x` is an image: as a convolution with the
    cotangent as its kernel, it takes XLA three quarters of a minute to compile.
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
    is_image = x.shape[-1] < MIN_STAGE_CHANNELS
    if is_image:
        # On TPUs, XLA would cut the patches in the forward pass and keep them until here.
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
        tpu=by_filters if is_image else by_convolution,
        default=by_convolution,
    )
    transposed = jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)
    return transposed(cotangent)[0], kernel_cotangent


convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(nn.Module):
    """Square convolution with bias: `[B, H, W, C]` to `[B, H', W', features]`.

    Pads every side by `padding` pixels.
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
    """Create a square convolution with bias that pads every side by `padding` pixels."""
    return Conv(features, size, stride, padding, dtype, name=name)


@jax.custom_vjp
def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve `x` `[B, H, W, C]` with `kernel` `[3, 3, 1, C]`, padding 1, in the kernel dtype."""
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
    # On TPUs, XLA would pad the map in the forward pass and keep it until here. The cast loses
    # nothing, because the layer rounds its output to the dtype of x.
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
    """Depthwise 3x3 convolution with padding 1 and bias, from `[B, H, W, C]` to the same shape.

    Computed as nine shifted multiply-adds, which XLA fuses into one loop; its grouped convolution
    is an order of magnitude slower on a CPU. The parameters are those of a grouped convolution.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, sum_dtype = x.shape[-1], wide(self.dtype)  # convolutions accumulate in it
        kernel = self.param("kernel", conv_init(groups=channels), (3, 3, 1, channels), sum_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), sum_dtype)
        return add_bias(_depthwise(x.astype(self.dtype), kernel), bias).astype(self.dtype)
