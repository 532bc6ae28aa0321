"""Rematerialization that frees activations part by part, not only when a step ends."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function(module, *arrays)` like `nn.remat`, and do not let XLA defer its gradients.

    XLA would defer weight-gradient matmuls to the end of the step, which keeps the activations of
    every recomputed part alive.
    """

    def forward(module: nn.Module, *arrays: Any) -> Any:
        return nn.vjp(function, module, *arrays)

    def backward(transposed: Callable[..., Any], grads: Any) -> Any:
        # The barrier makes earlier layers wait for all gradients of this part.
        return jax.lax.optimization_barrier(transposed(grads))

    return nn.remat(nn.custom_vjp(function, forward, backward))
