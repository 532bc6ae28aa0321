"""JAX's side of the benchmarks: classifiers, their training step, and the operator alone."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.benchmark.hlo_cost import count_resources
from activemlp_jax.benchmark.timing import COPY, JAX, MATMUL, Contender, Workload, say
from activemlp_jax.data.sampler import EPOCH_MULTIPLE
from activemlp_jax.distributed import sharding
from activemlp_jax.models.active_mlp import VARIANTS, create_model
from activemlp_jax.models.flops import count_cost
from activemlp_jax.ops.sample_axis import NAMES, sample_axis
from activemlp_jax.training.config import check_config, default_config, set_variant
from activemlp_jax.training.init_from import draw_variables
from activemlp_jax.training.trainer import build_trainer
from activemlp_jax.utils.types import Params, Variables

CLASSES = 1000
TRAINING = ("gradient", "step")
OPERATOR_MODEL = "active_tiny"  # the operator is timed at the shapes of this model's stages


class Inputs(NamedTuple):
    """Inputs that JAX and PyTorch share."""

    variables: Variables  # random
    pixels: np.ndarray  # [B, H, W, 3], uint8
    labels: np.ndarray  # [B], int32


def recipe(workload: Workload) -> ConfigDict:
    """Make a config that trains the workload's model without drop path, erasing and mixing."""
    config = default_config()
    set_variant(config, workload.model)
    config.batch_size = config.eval_batch_size = workload.batch_size
    config.data.image_size = workload.image_size
    config.model.dtype = workload.dtype
    config.optimizer.schedule = "epochs"
    check_config(config)
    return config


def draw_inputs(workload: Workload) -> Inputs:
    """Draw initial weights as training does, and random pixels and labels."""
    rng = np.random.default_rng(0)
    shape = (workload.batch_size, workload.image_size, workload.image_size, 3)
    model = create_model(workload.model, CLASSES)
    variables = jax.jit(partial(draw_variables, recipe(workload), model))()
    labels = rng.integers(0, CLASSES, workload.batch_size, np.int32)
    return Inputs(variables, rng.integers(0, 256, shape, np.uint8), labels)


def as_images(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 pixels to float32 with roughly the mean and deviation of normalized images."""
    return (pixels.astype(np.float32) - 127.5) / 73.9


def compile_function(
    what: str,
    workload: Workload,
    function: Any,
    *arguments: Any,
    implementation: str = JAX,
    is_step: bool = False,
    flops: float | None = None,
    traffic: float | None = None,
) -> Contender:
    """Compile a jitted function of `arguments` into a `Contender`.

    With `is_step`, each run takes the first result of the previous run as its first argument.
    """
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    elapsed = time.perf_counter() - began

    def call(times: int) -> None:
        nonlocal arguments
        for _ in range(times):
            result = compiled(*arguments)
            if is_step:
                arguments = (result[0], *arguments[1:])
            elif jax.default_backend() == "cpu":  # there, PyTorch waits for every run too
                jax.block_until_ready(result)
        jax.block_until_ready(result)

    memory = count_resources(compiled, devices=1).memory
    return Contender(what, implementation, workload, call, flops, memory, elapsed, traffic)


def compile_matmul() -> Contender:
    """Compile a product of square matrices, large enough to reach the device's peak rate."""
    on_cpu = jax.default_backend() == "cpu"
    side, dtype = (2048, "float32") if on_cpu else (8192, "bfloat16")
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    workload = Workload(f"{side} x {side}", 0, 0, dtype)
    matmul = jax.jit(jnp.matmul)
    return compile_function(MATMUL, workload, matmul, square, square, flops=2.0 * side**3)


def compile_copy() -> Contender:
    """Compile an elementwise operation on an array larger than any cache, to time the memory."""
    megabytes = 128 if jax.default_backend() == "cpu" else 1024
    array = jnp.ones((megabytes, 2**18), jnp.float32)
    workload = Workload(f"{megabytes} MiB", 0, 0, "float32")
    copy = jax.jit(jnp.negative)
    return compile_function(COPY, workload, copy, array, traffic=2.0 * array.nbytes)


def compile_forward(workload: Workload, inputs: Inputs) -> Iterator[Contender]:
    """Compile the forward pass from images to logits, as in evaluation."""
    model = create_model(workload.model, CLASSES, dtype=jnp.dtype(workload.dtype))
    size = workload.image_size
    flops = 2.0 * count_cost(model, size, size).macs * workload.batch_size
    images = jnp.asarray(as_images(inputs.pixels))
    apply = jax.jit(model.apply)
    yield compile_function("forward", workload, apply, inputs.variables, images, flops=flops)


def compile_training(
    workload: Workload, inputs: Inputs, parts: Sequence[str]
) -> Iterator[Contender]:
    """Compile `parts` of `TRAINING`: the loss gradient, and the whole step that `train.py` runs."""
    config = recipe(workload)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    trainer = build_trainer(config, CLASSES, EPOCH_MULTIPLE * workload.batch_size, mesh)
    flops = trainer.step_flops
    batch = sharding.put_batch({"image": inputs.pixels, "label": inputs.labels}, mesh)
    variables = sharding.put_everywhere(inputs.variables, mesh)
    key = jax.random.key(0)

    def gradient(variables: Variables, task_inputs: Any) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> jax.Array:
            return trainer.task.loss({**variables, "params": params}, task_inputs, key)[0]

        return jax.value_and_grad(loss)(variables["params"])

    if "gradient" in parts:
        task_inputs = jax.jit(trainer.task.inputs)(batch, key)
        function = jax.jit(gradient)
        yield compile_function("gradient", workload, function, variables, task_inputs, flops=flops)
    if "step" in parts:
        state = trainer.first_state(variables)
        yield compile_function(
            "step", workload, trainer.train_step, state, batch, is_step=True, flops=flops
        )


class Case(NamedTuple):
    """Inputs of the operator in one stage of the model, along one axis."""

    workload: Workload  # its `model` is the name of the stage
    axis: str  # 'h' or 'w'
    features: jax.Array  # [B, H, W, C], in the workload's dtype
    offset: jax.Array  # [B, H, W, G], float32, pixels
    cotangent: jax.Array  # shape and dtype of `features`; input of the backward pass

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
    """Draw inputs by stage and axis; `deviation` is the offsets' standard deviation in pixels."""
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.float32)
    init = partial(create_model(OPERATOR_MODEL).init_with_output, method="features")
    maps, _ = jax.eval_shape(init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    shares = VARIANTS[OPERATOR_MODEL]["share_dims"]
    for stage, (leaf, share) in enumerate(zip(maps, shares, strict=True)):
        workload = Workload(f"{OPERATOR_MODEL} stage {stage + 1}", batch_size, image_size, dtype)
        offset_shape = (*leaf.shape[:-1], leaf.shape[-1] // share)
        for axis in ("h", "w"):
            x, cotangent = (jnp.asarray(rng.standard_normal(leaf.shape), dtype) for _ in range(2))
            offset = jnp.asarray(deviation * rng.standard_normal(offset_shape), jnp.float32)
            yield Case(workload, axis, x, offset, cotangent)


def compile_operator(case: Case) -> Iterator[Contender]:
    """Compile each JAX implementation for this backend, without and with the backward pass."""
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
