"""Parameters and multiply-adds of a model, counted from its shapes; nothing is computed."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from activemlp_jax.models.layers import LayerNorm, LinearParameters

NORM_COST = 5  # operations the published counter adds for every element that passes a LayerNorm


class Cost(NamedTuple):
    """What a model takes for one image; what only training needs has parameters alone.

    `macs` are the multiply-adds of convolutions and linears, the operator's linears among them;
    `published_macs` adds `NORM_COST` for every normalised element, as the paper's figures do.
    """

    parameters: int
    macs: int
    published_macs: int


def count_cost(model: nn.Module, height: int, width: int) -> Cost:
    """Parameters and multiply-adds of `model` for one image of `height` by `width` pixels.

    Raises:
      ValueError: the model takes no images of that size.
    """
    macs = normalised = 0

    def count(
        next_method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        nonlocal macs, normalised
        output = next_method(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.has_variable("params", "kernel"):
            # What has a layer's parameters for several to be combined counts as the layer.
            of = args[0] if isinstance(module, LinearParameters) else output
            positions = math.prod(of.shape[:-1])
            macs += positions * module.get_variable("params", "kernel").size
        elif context.method_name == "__call__" and isinstance(module, LayerNorm):
            normalised += output.size
        return output

    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with nn.intercept_methods(count):
        jax.eval_shape(model.apply, variables, images)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return Cost(parameters, macs, macs + NORM_COST * normalised)
