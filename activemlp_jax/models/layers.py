"""Layers of the network, with the original's initial weights.

`dtype` is that of the computation; parameters are float32, or float64 where `dtype` is. Several
layers have a derivative rule of their own: the same derivative in fewer passes over memory, and
with less to compile. So derivatives are for reverse mode, and first ones only.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any

LAYER_NORM_EPSILON = 1e-5

# The original cuts this normal at +-2, a hundred standard deviations out: no cut at all.
linear_init = nn.initializers.normal(stddev=0.02)


def conv_init(groups: int = 1) -> nn.initializers.Initializer:
    """Normal with standard deviation sqrt(2 / fan_out), fan_out = k * k * out / groups."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        height, width, _, features = shape
        fan_out = height * width * features // groups
        return jax.random.normal(key, shape, dtype) * jnp.asarray(np.sqrt(2 / fan_out), dtype)

    return init


def wide(dtype: Dtype) -> Dtype:
    """float32, or wider where `dtype` is: for parameters, positions, statistics and logits."""
    return jnp.promote_types(dtype, jnp.float32)


def _along_last(vector: jax.Array, rank: int) -> jax.Array:
    return vector.reshape((1,) * (rank - 1) + (-1,))


def _written(x: jax.Array) -> jax.Array:
    """`x`, which a CPU writes to memory here.

    It would otherwise compute it again in each of the loops and transposes that read it. Other
    compilers know better when to.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[.., I]` and `[I, O]` to `[.., O]`."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> Any:
    x = _written(x)
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    cotangent = _written(cotangent)
    x_cotangent = jax.lax.dot_general(cotangent, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    positions = ((tuple(range(x.ndim - 1)),) * 2, ((), ()))
    # A CPU transposes the first operand: let that be the smaller one.
    if x.shape[-1] < cotangent.shape[-1]:
        return x_cotangent, jax.lax.dot_general(x, cotangent, positions)
    return x_cotangent, jax.lax.dot_general(cotangent, x, positions).T


_matmul.defvjp(_matmul_forward, _matmul_backward)


Affine = tuple[jax.Array, jax.Array | None]  # kernel `[I, O]` and bias `[O]` of a linear layer


def _affine_parameters(
    module: nn.Module, shape: tuple[int, int], bias: bool, dtype: Dtype
) -> Affine:
    kernel = module.param("kernel", linear_init, shape, dtype)
    return kernel, module.param("bias", nn.initializers.zeros, shape[1:], dtype) if bias else None


def affine(x: jax.Array, layer: Affine) -> jax.Array:
    """`[.., I]` to `[.., O]`, in the dtype of `x`."""
    kernel, bias = layer
    out = _matmul(x, kernel.astype(x.dtype))
    return out if bias is None else out + _along_last(bias.astype(x.dtype), out.ndim)


class Linear(nn.Module):
    """A linear layer on the last axis: `[.., I]` to `[.., features]`."""

    features: int
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        layer = _affine_parameters(self, shape, self.use_bias, wide(self.dtype))
        return affine(x.astype(self.dtype), layer)


class LinearParameters(nn.Module):
    """Kernel and bias of a linear layer on the last axis of `x` `[.., I]`, to combine layers."""

    features: int
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> Affine:
        shape = (x.shape[-1], self.features)
        return _affine_parameters(self, shape, self.use_bias, wide(self.dtype))


def linear(features: int, dtype: Dtype, use_bias: bool = True, name: str | None = None) -> Linear:
    """A linear layer on the last axis."""
    return Linear(features, use_bias, dtype, name=name)


def _standardise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` with mean 0 and variance 1 along the last axis, and what it was multiplied with."""
    mean = x.mean(axis=-1, keepdims=True)
    # E[x^2] - E[x]^2 would be faster, but cancels.
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    mean, factor = _written(mean), _written(jax.lax.rsqrt(variance + LAYER_NORM_EPSILON))
    return (x - mean) * factor, factor


@jax.custom_vjp
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    standard, _ = _standardise(x)
    return standard * _along_last(scale, x.ndim) + _along_last(bias, x.ndim)


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    return _layer_norm(x, scale, bias), (x, scale)


def _layer_norm_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    x, scale = residuals
    cotangent = _written(cotangent)
    standard, factor = _standardise(x)
    given = cotangent * _along_last(scale, x.ndim)
    along = (given * standard).mean(axis=-1, keepdims=True)
    x_cotangent = factor * (given - given.mean(axis=-1, keepdims=True) - standard * along)
    positions = tuple(range(x.ndim - 1))
    return x_cotangent, (cotangent * standard).sum(positions), cotangent.sum(positions)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """A LayerNorm over the last axis; statistics in float32 or wider."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, dtype = (x.shape[-1],), wide(self.dtype)
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        return _layer_norm(x.astype(dtype), scale, bias).astype(self.dtype)


def norm(dtype: Dtype, name: str | None = None) -> LayerNorm:
    """A LayerNorm over the last axis, epsilon 1e-5."""
    return LayerNorm(dtype, name=name)


NHWC = ("NHWC", "HWIO", "NHWC")
FEW_CHANNELS = 16  # an image's are fewer, a stage's are not


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    sides = ((padding, padding),) * 2
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, sides, dimension_numbers=NHWC)


def _kernel_cotangent(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int, padding: int
) -> jax.Array:
    transposed = jax.linear_transpose(lambda k: _convolve(x, k, stride, padding), kernel)
    return transposed(cotangent)[0]


def kernel_cotangent_by_patches(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int, padding: int
) -> jax.Array:
    """The derivative by the kernel as one product of patches, what is read for a place each.

    As a convolution, with the cotangent for a kernel, it would take a TPU's compiler three quarters
    of a minute. Patches are worth their memory for few channels only.
    """
    size, _, channels, features = kernel.shape
    patches = jax.lax.conv_general_dilated_patches(
        x, (size,) * 2, (stride,) * 2, ((padding, padding),) * 2, dimension_numbers=NHWC
    )
    positions = (((0, 1, 2), (0, 1, 2)), ((), ()))
    products = jax.lax.dot_general(patches, cotangent, positions)
    return products.reshape(channels, size, size, features).transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_image(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A convolution of few channels: `[B, H, W, C]` by `[k, k, C, features]`."""
    return _convolve(x, kernel, stride, padding)


def _convolve_image_forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> Any:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_image_backward(
    stride: int, padding: int, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    # A TPU's compiler would take the patches in the forward pass, and keep them until here.
    x, cotangent = jax.lax.optimization_barrier((x, cotangent))
    transposed = jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)
    kernel_cotangent = jax.lax.platform_dependent(
        x,
        kernel,
        cotangent,
        tpu=functools.partial(kernel_cotangent_by_patches, stride=stride, padding=padding),
        default=functools.partial(_kernel_cotangent, stride=stride, padding=padding),
    )
    return transposed(cotangent)[0], kernel_cotangent


convolve_image.defvjp(_convolve_image_forward, _convolve_image_backward)


class Conv(nn.Module):
    """A square convolution with bias: `[B, H, W, C]` to `[B, H', W', features]`.

    `padding` pixels on every side.
    """

    features: int
    size: int
    stride: int
    padding: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, dtype = x.shape[-1], wide(self.dtype)
        shape = (self.size, self.size, channels, self.features)
        kernel = self.param("kernel", conv_init(), shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        convolve = convolve_image if channels < FEW_CHANNELS else _convolve
        out = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        return out + _along_last(bias.astype(self.dtype), out.ndim)


def conv(
    features: int, size: int, stride: int, padding: int, dtype: Dtype, name: str | None = None
) -> Conv:
    """A square convolution with bias; `padding` pixels on every side."""
    return Conv(features, size, stride, padding, dtype, name=name)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.sqrt(0.5)))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact, erf form, computed in float32 or wider; dtype of `x`, as its derivative."""
    exact = x.astype(wide(x.dtype))
    return (exact * _normal_cdf(exact)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # A TPU's compiler would evaluate erf inside the products that read this, forward and backward:
    # a few percent more memory traffic, and an eighth more time to compile.
    written = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(gelu(x), tpu=written, default=lambda y: y), x


def _gelu_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    # To evaluate erf again takes less time than to write it down and read it, which the compiler
    # would do unless this is another x.
    x, cotangent = jax.lax.optimization_barrier((x, cotangent))
    exact = x.astype(wide(x.dtype))
    density = jnp.exp(-0.5 * jnp.square(exact)) * (1 / np.sqrt(2 * np.pi))
    return ((cotangent * (_normal_cdf(exact) + exact * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


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
    # A TPU's compiler would make the padded map in the forward pass, and keep it until here.
    x, cotangent = jax.lax.optimization_barrier((x, cotangent))
    _, height, width, _ = x.shape
    padded = _written(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(kernel.dtype))
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
        out = _depthwise(x.astype(self.dtype), kernel) + _along_last(bias, x.ndim)
        return out.astype(self.dtype)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear: `[..., C]` to `[..., features]`."""

    hidden: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(linear(self.hidden, self.dtype, name="fc1")(x))
        return linear(self.features, self.dtype, name="fc2")(x)
