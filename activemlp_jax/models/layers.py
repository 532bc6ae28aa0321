"""Layers of the network, with the original's initialization.

`dtype` is the dtype of the computation; parameters are float32, or float64 if `dtype` is. In
bfloat16, matmuls accumulate in float32 and round their result. All other sums over positions or
images are float32, in both passes. Several layers have custom derivative rules: the same derivative
in fewer passes over memory and with less to compile. They support only first derivatives, in
reverse mode.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any

LAYER_NORM_EPSILON = 1e-5

# The original truncates this normal at +-2, a hundred standard deviations, which has no effect.
linear_init = nn.initializers.normal(stddev=0.02)


def wide(dtype: Dtype) -> Dtype:
    """Dtype of parameters, positions, statistics and logits: float32, or `dtype` if wider."""
    return jnp.promote_types(dtype, jnp.float32)


def along_last(vector: jax.Array, rank: int) -> jax.Array:
    """Reshape `vector` `[C]` to `[1, .., 1, C]` of rank `rank`."""
    return vector.reshape((1,) * (rank - 1) + (-1,))


def written(x: jax.Array) -> jax.Array:
    """Materialize `x` on CPUs.

    Otherwise XLA's CPU compiler recomputes it in each loop and transpose that reads it. Its other
    compilers choose better by themselves.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Add `bias`, `[C]` or of the rank of `x`, to `x` `[.., C]`; returns the dtype of `x`.

    The addition uses float32 or wider. So does the gradient of the bias, a sum over all positions:
    in bfloat16, a sum of a few hundred thousand numbers is wrong by half.
    """
    dtype = wide(x.dtype)
    bias = along_last(bias, x.ndim) if bias.ndim == 1 else bias
    return (x.astype(dtype) + bias.astype(dtype)).astype(x.dtype)


Precision = jax.lax.Precision | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
    """Multiply `x` `[.., I]` by `kernel` `[I, O]`, to `[.., O]`."""
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
    # CPUs transpose the first operand, so it should be the smaller one.
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
    """Apply a linear layer to `x` `[.., I]`; returns `[.., O]` in the dtype of `x`."""
    kernel, bias = layer
    out = _matmul(x, kernel.astype(x.dtype), precision)
    return out if bias is None else add_bias(out, bias)


class Linear(nn.Module):
    """Linear layer on the last axis: `[.., I]` to `[.., features]`.

    `precision` is passed to `jax.lax.dot_general`.
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
    """Linear layer for inputs `[.., I]` that returns its kernel and bias instead of applying them.

    A caller can combine them with those of other layers.
    """

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
    """Create a linear layer with bias on the last axis."""
    return Linear(features, True, dtype, precision, name=name)


def _standardize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale `x` to mean 0 and variance 1 along the last axis; also return the factor."""
    mean = x.mean(axis=-1, keepdims=True)
    # E[x^2] - E[x]^2 would be faster, but suffers from cancellation.
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    mean, factor = written(mean), written(jax.lax.rsqrt(variance + LAYER_NORM_EPSILON))
    return (x - mean) * factor, factor


@jax.custom_vjp
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    standard, _ = _standardize(x)
    return standard * along_last(scale, x.ndim) + along_last(bias, x.ndim)


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    return _layer_norm(x, scale, bias), (x, scale)


def _layer_norm_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    x, scale = residuals
    cotangent = written(cotangent)
    standard, factor = _standardize(x)
    scaled = cotangent * along_last(scale, x.ndim)
    projection = (scaled * standard).mean(axis=-1, keepdims=True)
    x_cotangent = factor * (scaled - scaled.mean(axis=-1, keepdims=True) - standard * projection)
    positions = tuple(range(x.ndim - 1))
    return x_cotangent, (cotangent * standard).sum(positions), cotangent.sum(positions)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, with statistics in float32 or wider."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, dtype = (x.shape[-1],), wide(self.dtype)
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        return _layer_norm(x.astype(dtype), scale, bias).astype(self.dtype)


def norm(dtype: Dtype, name: str | None = None) -> LayerNorm:
    """Create a LayerNorm over the last axis, epsilon 1e-5."""
    return LayerNorm(dtype, name=name)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.sqrt(0.5)))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (with erf) in float32 or wider; value and cotangent have the dtype of `x`."""
    exact = x.astype(wide(x.dtype))
    return (exact * _normal_cdf(exact)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # On TPUs, XLA would evaluate erf inside the matmuls that read this, in both passes: a few
    # percent more memory traffic, and an eighth more compile time.
    result = jax.lax.platform_dependent(
        gelu(x), tpu=jax.lax.optimization_barrier, default=lambda y: y
    )
    return result, x


def _gelu_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    # Evaluating erf again is faster than storing and loading it. XLA would store it if the barrier
    # did not hide that this is the x of the forward pass.
    x, cotangent = jax.lax.optimization_barrier((x, cotangent))
    exact = x.astype(wide(x.dtype))
    density = jnp.exp(-0.5 * jnp.square(exact)) * (1 / np.sqrt(2 * np.pi))
    return ((cotangent * (_normal_cdf(exact) + exact * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class Mlp(nn.Module):
    """Linear layer, exact GELU, linear layer: `[.., C]` to `[.., features]`."""

    hidden: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(linear(self.hidden, self.dtype, name="fc1")(x))
        return linear(self.features, self.dtype, name="fc2")(x)
