"""Layers of the network, with the original's initial weights.

`dtype` is that of the computation; parameters are float32, or float64 where `dtype` is. Where
`dtype` is bfloat16, products add up in float32 and round their result, and all other sums over
positions or images, forward and backward, are float32 sums. Several layers have a derivative rule
of their own: the same derivative in fewer passes over memory, and with less to compile. So
derivatives are for reverse mode, and first ones only.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any

LAYER_NORM_EPSILON = 1e-5

# The original cuts this normal at +-2, a hundred standard deviations out: no cut at all.
linear_init = nn.initializers.normal(stddev=0.02)


def wide(dtype: Dtype) -> Dtype:
    """float32, or wider where `dtype` is: for parameters, positions, statistics and logits."""
    return jnp.promote_types(dtype, jnp.float32)


def along_last(vector: jax.Array, rank: int) -> jax.Array:
    """`vector` `[C]` as `[1, .., 1, C]` of that rank."""
    return vector.reshape((1,) * (rank - 1) + (-1,))


def written(x: jax.Array) -> jax.Array:
    """`x`, which a CPU writes to memory here.

    It would otherwise compute it again in each of the loops and transposes that read it. Other
    compilers know better when to.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x` `[.., C]` plus `bias`, `[C]` or of the rank of `x`, in the dtype of `x`.

    The addition is in float32 or wider, and so is the sum over all positions that is the bias's
    gradient: in bfloat16 a sum of a few hundred thousand numbers is wrong by half.
    """
    dtype = wide(x.dtype)
    bias = along_last(bias, x.ndim) if bias.ndim == 1 else bias
    return (x.astype(dtype) + bias.astype(dtype)).astype(x.dtype)


Precision = jax.lax.Precision | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
    """`[.., I]` and `[I, O]` to `[.., O]`."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision)


def _matmul_forward(x: jax.Array, kernel: jax.Array, precision: Precision) -> Any:
    x = written(x)
    return _matmul(x, kernel, precision), (x, kernel)


def _matmul_backward(
    precision: Precision, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    cotangent = written(cotangent)
    dot = functools.partial(jax.lax.dot_general, precision=precision)
    x_cotangent = dot(cotangent, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    positions = ((tuple(range(x.ndim - 1)),) * 2, ((), ()))
    # A CPU transposes the first operand: let that be the smaller one.
    if x.shape[-1] < cotangent.shape[-1]:
        return x_cotangent, dot(x, cotangent, positions)
    return x_cotangent, dot(cotangent, x, positions).T


_matmul.defvjp(_matmul_forward, _matmul_backward)


Affine = tuple[jax.Array, jax.Array | None]  # kernel `[I, O]` and bias `[O]` of a linear layer


def _affine_parameters(
    module: nn.Module, shape: tuple[int, int], bias: bool, dtype: Dtype
) -> Affine:
    kernel = module.param("kernel", linear_init, shape, dtype)
    return kernel, module.param("bias", nn.initializers.zeros, shape[1:], dtype) if bias else None


def affine(x: jax.Array, layer: Affine, precision: Precision = None) -> jax.Array:
    """`[.., I]` to `[.., O]`, in the dtype of `x`."""
    kernel, bias = layer
    out = _matmul(x, kernel.astype(x.dtype), precision)
    return out if bias is None else add_bias(out, bias)


class Linear(nn.Module):
    """A linear layer on the last axis: `[.., I]` to `[.., features]`.

    `precision` is that of the products, as `jax.lax.dot_general` takes it.
    """

    features: int
    use_bias: bool
    dtype: Dtype
    precision: Precision = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        layer = _affine_parameters(self, shape, self.use_bias, wide(self.dtype))
        return affine(x.astype(self.dtype), layer, self.precision)


class LinearParameters(nn.Module):
    """Kernel and bias of a linear layer on the last axis of `x` `[.., I]`, to combine layers."""

    features: int
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> Affine:
        shape = (x.shape[-1], self.features)
        return _affine_parameters(self, shape, self.use_bias, wide(self.dtype))


def linear(
    features: int, dtype: Dtype, precision: Precision = None, name: str | None = None
) -> Linear:
    """A linear layer with bias on the last axis."""
    return Linear(features, True, dtype, precision, name=name)


def _standardise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` with mean 0 and variance 1 along the last axis, and what it was multiplied with."""
    mean = x.mean(axis=-1, keepdims=True)
    # E[x^2] - E[x]^2 would be faster, but cancels.
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    mean, factor = written(mean), written(jax.lax.rsqrt(variance + LAYER_NORM_EPSILON))
    return (x - mean) * factor, factor


@jax.custom_vjp
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    standard, _ = _standardise(x)
    return standard * along_last(scale, x.ndim) + along_last(bias, x.ndim)


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    return _layer_norm(x, scale, bias), (x, scale)


def _layer_norm_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    x, scale = residuals
    cotangent = written(cotangent)
    standard, factor = _standardise(x)
    given = cotangent * along_last(scale, x.ndim)
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
    result = jax.lax.platform_dependent(
        gelu(x), tpu=jax.lax.optimization_barrier, default=lambda y: y
    )
    return result, x


def _gelu_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    # To evaluate erf again takes less time than to write it down and read it, which the compiler
    # would do unless this is another x.
    x, cotangent = jax.lax.optimization_barrier((x, cotangent))
    exact = x.astype(wide(x.dtype))
    density = jnp.exp(-0.5 * jnp.square(exact)) * (1 / np.sqrt(2 * np.pi))
    return ((cotangent * (_normal_cdf(exact) + exact * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear: `[..., C]` to `[..., features]`."""

    hidden: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(linear(self.hidden, self.dtype, name="fc1")(x))
        return linear(self.features, self.dtype, name="fc2")(x)
