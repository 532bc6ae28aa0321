"""Parameter and multiply-add counts of a model, from shapes alone; nothing is computed."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from activemlp_jax.models.mixer import DenseParameters

NORM_COST = 5  # operations that the published figures count per element of a LayerNorm's output


class Cost(NamedTuple):
    """Cost of a model for one image.

    `parameters` includes layers that only training uses; the other two counts do not. `macs` are
    the multiply-adds of convolutions and linear layers, including those of the token mixer.
    `published_macs` adds `NORM_COST` per normalized element, like the figures in the paper.
    """

    parameters: int
    macs: int
    published_macs: int


def count_cost(model: nn.Module, height: int, width: int) -> Cost:
    """Count parameters and multiply-adds of `model` for an image of `height` by `width` pixels.

    Raises:
      ValueError: the model does not accept images of that size.
    """
    macs = normalized = 0
    in_layer = False  # our layers call the flax layers that they extend, which must not count again

    def count(
        next_method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        nonlocal macs, normalized, in_layer
        module = context.module
        is_layer = isinstance(module, nn.Dense | nn.Conv | DenseParameters)
        if in_layer or not is_layer or context.method_name != "__call__":
            output = next_method(*args, **kwargs)
            if isinstance(module, nn.LayerNorm):
                normalized += output.size
            return output
        in_layer = True
        output = next_method(*args, **kwargs)
        in_layer = False
        # DenseParameters returns parameters, so only its input has the shape of the map.
        array = args[0] if isinstance(module, DenseParameters) else output
        macs += math.prod(array.shape[:-1]) * module.get_variable("params", "kernel").size
        return output

    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with nn.intercept_methods(count):
        jax.eval_shape(model.apply, variables, images)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return Cost(parameters, macs, macs + NORM_COST * normalized)
