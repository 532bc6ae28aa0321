"""The operator alone, by each of its implementations, at the shapes that a model has."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.benchmark.measuring import JAX, Contender, Workload
from activemlp_jax.benchmark.programs import compile_function
from activemlp_jax.models.active_mlp import VARIANTS, create_model
from activemlp_jax.ops.sample_axis import IMPLEMENTATIONS, sample_axis

MODEL = "active_tiny"


class Case(NamedTuple):
    """A stage and an axis, with what is moved there.

    Args:
      workload: whose model is the stage's name.
      axis: 'h' or 'w'.
      features: `[B, H, W, C]`, in the workload's dtype as JAX has it.
      offset: `[B, H, W, G]`, float32, pixels.
      cotangent: `[B, H, W, C]`, as `features`: where the backward pass starts.
    """

    workload: Workload
    axis: str
    features: jax.Array
    offset: jax.Array
    cotangent: jax.Array

    def title(self) -> str:
        """In words."""
        _, height, width, channels = self.features.shape
        shared = channels // self.offset.shape[-1]
        return (
            f"{self.workload.model}, {height} x {width}, {channels} channels, "
            f"{shared} an offset, along {self.axis}"
        )

    def traffic(self, what: str) -> float:
        """Bytes, if each array is read or written once.

        Args:
          what: 'forward', with the result, or 'forward+backward', with both gradients too.
        """
        features, offset = self.features.nbytes, self.offset.nbytes
        forward = 2.0 * features + offset
        # The maps and offsets are read again, and the cotangent: nothing else is between.
        return forward if what == "forward" else forward + 3.0 * features + 2.0 * offset


def draw_cases(batch_size: int, image_size: int, dtype: str, deviation: float) -> Iterator[Case]:
    """Noise for every stage of `MODEL` and both axes.

    Args:
      batch_size: images.
      image_size: of the model's input, in pixels.
      dtype: of features.
      deviation: standard deviation of the offsets, in pixels.

    Raises:
      ValueError: the model takes no images of that size.
    """
    model = create_model(MODEL)
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.float32)

    def features(images: jax.Array) -> list[jax.Array]:
        return model.init_with_output(jax.random.key(0), images, method="features")[0]

    maps = jax.eval_shape(features, images)
    rng = np.random.default_rng(0)
    for stage, (found, share) in enumerate(zip(maps, VARIANTS[MODEL]["share_dims"], strict=True)):
        workload = Workload(f"{MODEL} stage {stage + 1}", batch_size, image_size, dtype)
        offsets = (*found.shape[:-1], found.shape[-1] // share)
        for axis in ("h", "w"):
            x, cotangent = (jnp.asarray(rng.standard_normal(found.shape), dtype) for _ in range(2))
            offset = jnp.asarray(deviation * rng.standard_normal(offsets), jnp.float32)
            yield Case(workload, axis, x, offset, cotangent)


def compile_operator(case: Case, say: Callable[[str], None]) -> Iterator[Contender]:
    """Every implementation of JAX that this backend has, forward and with its gradients.

    Args:
      case: to compute.
      say: told which implementation is left out, and why.
    """
    for name in IMPLEMENTATIONS:
        kind, _, platform = name.partition("_")
        if kind == "pallas" and platform != jax.default_backend():
            say(f"without {JAX} {name}, which is interpreted here")
            continue
        forward = partial(sample_axis, axis=case.axis, impl=name)

        def both(
            x: jax.Array,
            offset: jax.Array,
            cotangent: jax.Array,
            forward: Callable[..., jax.Array] = forward,
        ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            result, pull = jax.vjp(forward, x, offset)
            return result, pull(cotangent)

        arguments = (case.features, case.offset)
        for what, function, given in (
            ("forward", forward, arguments),
            ("forward+backward", both, (*arguments, case.cotangent)),
        ):
            yield compile_function(
                f"{case.axis} {what}",
                f"{JAX} {name}",
                case.workload,
                function,
                given,
                traffic=case.traffic(what),
            )
