"""Benchmark of the operator alone: every implementation, at the shapes of a model's stages."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.benchmark.programs import compile_function
from activemlp_jax.benchmark.timing import JAX, Contender, Workload, say
from activemlp_jax.models.active_mlp import VARIANTS, create_model
from activemlp_jax.ops.sample_axis import NAMES, sample_axis

MODEL = "active_tiny"


class Case(NamedTuple):
    """Inputs of the operator at one stage along one axis."""

    workload: Workload  # its `model` is the name of the stage
    axis: str  # 'h' or 'w'
    features: jax.Array  # [B, H, W, C], in the workload's dtype
    offset: jax.Array  # [B, H, W, G], float32, pixels
    cotangent: jax.Array  # as `features`; input of the backward pass

    def title(self) -> str:
        """Describe the stage, its shape and the axis."""
        _, height, width, channels = self.features.shape
        shared = channels // self.offset.shape[-1]
        return (
            f"{self.workload.model}, {height} x {width}, {channels} channels, "
            f"{shared} an offset, along {self.axis}"
        )

    def traffic(self, what: str) -> float:
        """Count the bytes of 'forward' or 'forward+backward' if each array is accessed once."""
        features, offset = self.features.nbytes, self.offset.nbytes
        forward = 2.0 * features + offset
        # The backward pass reads features, offsets and cotangent, and writes two gradients.
        return forward if what == "forward" else forward + 3.0 * features + 2.0 * offset


def draw_cases(batch_size: int, image_size: int, dtype: str, deviation: float) -> Iterator[Case]:
    """Draw inputs for each stage of `MODEL` and axis; offsets deviate by `deviation` pixels."""
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.float32)
    init = partial(create_model(MODEL).init_with_output, method="features")
    maps, _ = jax.eval_shape(init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    for stage, (leaf, share) in enumerate(zip(maps, VARIANTS[MODEL]["share_dims"], strict=True)):
        workload = Workload(f"{MODEL} stage {stage + 1}", batch_size, image_size, dtype)
        offset_shape = (*leaf.shape[:-1], leaf.shape[-1] // share)
        for axis in ("h", "w"):
            x, cotangent = (jnp.asarray(rng.standard_normal(leaf.shape), dtype) for _ in range(2))
            offset = jnp.asarray(deviation * rng.standard_normal(offset_shape), jnp.float32)
            yield Case(workload, axis, x, offset, cotangent)


def compile_operator(case: Case) -> Iterator[Contender]:
    """Compile the JAX implementations for this backend, forward and with gradients."""
    for name in NAMES:
        kind, _, platform = name.partition("_")
        if kind == "pallas" and platform != jax.default_backend():
            say(f"without {JAX} {name}, which is interpreted here")
            continue
        sample = partial(sample_axis, axis=case.axis, impl=name)

        def both(x: Any, offset: Any, cotangent: Any, sample: Any = sample) -> Any:
            result, pull = jax.vjp(sample, x, offset)
            return result, pull(cotangent)

        inputs = (case.features, case.offset)
        for what, function, arguments in (
            ("forward", sample, inputs),
            ("forward+backward", both, (*inputs, case.cotangent)),
        ):
            yield compile_function(
                f"{case.axis} {what}",
                case.workload,
                jax.jit(function),
                *arguments,
                implementation=f"{JAX} {name}",
                traffic=case.traffic(what),
            )
