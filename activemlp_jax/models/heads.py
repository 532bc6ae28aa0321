"""Segmentation heads, from the four maps of the backbone to logits: UperNet and Semantic FPN.

Source: "Unified Perceptual Parsing for Scene Understanding" (ECCV 2018), "Panoptic Feature Pyramid
Networks" (CVPR 2019), as implemented in mmsegmentation 0.11, which the original trains with.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from activemlp_jax.models.layers import Conv, Dtype
from activemlp_jax.models.resizing import pool_adaptive, resize_bilinear, resize_nearest

BATCH_NORM_MOMENTUM = 0.1
POOLING_BINS = (1, 2, 3, 6)


class BatchNorm(nn.Module):
    """Batch norm with one mean and variance per channel, as PyTorch defines it.

    The collection `batch_stats` holds the running statistics `mean` and `var`, and `count`, the
    number of batches. The running variance is unbiased (divided by n - 1); flax's is biased. With
    `train`, the whole global batch is normalized by its own statistics, and the running statistics
    are updated if `batch_stats` is mutable.

    Source: `torch.nn.BatchNorm2d` and `SyncBatchNorm`.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        features, dtype = (x.shape[-1],), self.param_dtype
        scale = self.param("scale", nn.initializers.ones, features, dtype)
        bias = self.param("bias", nn.initializers.zeros, features, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, dtype)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

        x = x.astype(dtype)
        if train:
            values = x.size // x.shape[-1]
            if values == 1:
                raise ValueError("batch norm needs more than one value per channel to train")
            mean = x.mean(axis=(0, 1, 2))
            var = jnp.square(x - mean.reshape(1, 1, 1, -1)).mean(axis=(0, 1, 2))
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                keep = 1 - BATCH_NORM_MOMENTUM
                unbiased_var = var * (values / (values - 1))
                running_mean.value = keep * running_mean.value + BATCH_NORM_MOMENTUM * mean
                running_var.value = keep * running_var.value + BATCH_NORM_MOMENTUM * unbiased_var
                count.value = count.value + 1
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        x = (x - mean.reshape(1, 1, 1, -1)) * factor.reshape(1, 1, 1, -1)
        return (x + bias.reshape(1, 1, 1, -1)).astype(self.dtype)


class ConvNormRelu(nn.Module):
    """Square convolution of stride 1 without bias that keeps the size, then batch norm and ReLU."""

    features: int
    size: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        size = (self.size, self.size)
        x = Conv(self.features, size, use_bias=False, **dtypes, name="conv")(x)
        return nn.relu(BatchNorm(**dtypes, name="bn")(x, train))


class Classifier(nn.Module):
    """Last layer of a head: dropout of whole channels, then pixel logits in float32 or wider."""

    num_classes: int
    dropout_rate: float
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout_rate, broadcast_dims=(1, 2), deterministic=not train)(x)
        return Conv(
            self.num_classes,
            (1, 1),
            dtype=self.param_dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(stddev=0.01),
            name="conv_seg",
        )(x)


class UperNetHead(nn.Module):
    """UperNet: turns four maps of decreasing resolution into logits of the first's resolution."""

    num_classes: int
    channels: int
    dropout_rate: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def _block(self, size: int, name: str) -> ConvNormRelu:
        return ConvNormRelu(self.channels, size, self.dtype, self.param_dtype, name=name)

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        last = maps[-1]
        pooled = [
            resize_bilinear(
                self._block(1, f"pool_{i}")(pool_adaptive(last, bins), train), *last.shape[1:3]
            )
            for i, bins in enumerate(POOLING_BINS)
        ]
        context = jnp.concatenate([last, *pooled], axis=-1)
        levels = [self._block(1, f"lateral_{i}")(x, train) for i, x in enumerate(maps[:-1])]
        levels.append(self._block(3, "bottleneck")(context, train))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] += resize_bilinear(levels[i], *levels[i - 1].shape[1:3])
        outputs = [self._block(3, f"output_{i}")(x, train) for i, x in enumerate(levels[:-1])]
        outputs.append(levels[-1])
        outputs = [resize_bilinear(x, *outputs[0].shape[1:3]) for x in outputs]
        fused = self._block(3, "fusion")(jnp.concatenate(outputs, axis=-1), train)
        classifier = Classifier(
            self.num_classes, self.dropout_rate, self.param_dtype, name="classifier"
        )
        return classifier(fused, train)


class FcnHead(nn.Module):
    """Auxiliary head of UperNet: one convolution with batch norm and ReLU, and a classifier."""

    num_classes: int
    channels: int
    dropout_rate: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = ConvNormRelu(self.channels, 3, self.dtype, self.param_dtype, name="hidden")(x, train)
        classifier = Classifier(
            self.num_classes, self.dropout_rate, self.param_dtype, name="classifier"
        )
        return classifier(x, train)


class FpnNeck(nn.Module):
    """Feature pyramid: makes four maps of one width, adding the smaller maps to the larger."""

    channels: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def _conv(self, size: int, name: str) -> Conv:
        return Conv(
            self.channels,
            (size, size),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name=name,
        )

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        levels = [self._conv(1, f"lateral_{i}")(x) for i, x in enumerate(maps)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] += resize_nearest(levels[i], *levels[i - 1].shape[1:3])
        return [self._conv(3, f"output_{i}")(x) for i, x in enumerate(levels)]


class FpnHead(nn.Module):
    """Semantic FPN: doubles each map until it is as large as the first, and adds all maps."""

    num_classes: int
    channels: int
    dropout_rate: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        total = None
        for i, x in enumerate(maps):
            for step in range(max(i, 1)):
                block = ConvNormRelu(
                    self.channels, 3, self.dtype, self.param_dtype, name=f"scale_{i}_{step}"
                )
                x = block(x, train)
                if i:
                    x = resize_bilinear(x, 2 * x.shape[1], 2 * x.shape[2])
            # If a side is odd, twice the side of the next smaller map is one pixel too long.
            total = x if total is None else total + resize_bilinear(x, *total.shape[1:3])
        assert total is not None, "expected four maps"
        classifier = Classifier(
            self.num_classes, self.dropout_rate, self.param_dtype, name="classifier"
        )
        return classifier(total, train)
