"""JAX's side of the benchmarks: classifiers, their train step, a matrix product and a copy."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.benchmark.hlo_cost import count_resources
from activemlp_jax.benchmark.measuring import COPY, JAX, MATMUL, Contender, Workload
from activemlp_jax.data.sampler import EPOCH_MULTIPLE
from activemlp_jax.distributed import sharding
from activemlp_jax.models.active_mlp import create_model
from activemlp_jax.models.flops import count_cost
from activemlp_jax.training.config import check_config, default_config, set_variant
from activemlp_jax.training.init_from import draw_variables
from activemlp_jax.training.trainer import build_trainer, train_flops
from activemlp_jax.utils.types import Params, Variables

CLASSES = 1000


class Inputs(NamedTuple):
    """Inputs that JAX and PyTorch share.

    Args:
      variables: random variables of the model.
      pixels: `[B, H, W, 3]`, uint8.
      labels: `[B]`, int32.
    """

    variables: Variables
    pixels: np.ndarray
    labels: np.ndarray


def recipe(workload: Workload) -> ConfigDict:
    """Config that trains the model without drop path, erasing and mixing."""
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


def compile_function(
    what: str,
    implementation: str,
    workload: Workload,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    flops: float | None = None,
    traffic: float | None = None,
) -> Contender:
    """Compile a function of arrays into a contender.

    Args:
      what: what the function does; contenders that do the same are compared.
      implementation: name of the implementation, with `JAX` as first word.
      workload: model and input.
      function: function to jit.
      arguments: arguments of `function`.
      flops: floating-point operations of a run, from the model's multiply-adds.
      traffic: bytes that a run moves at least.
    """
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    elapsed = time.perf_counter() - began

    # On a CPU, PyTorch waits for every run too.
    waits_for_each = jax.default_backend() == "cpu"

    def call(times: int) -> None:
        for _ in range(times):
            result = compiled(*arguments)
            if waits_for_each:
                jax.block_until_ready(result)
        jax.block_until_ready(result)

    memory = count_resources(compiled, devices=1).memory
    return Contender(what, implementation, workload, call, flops, memory, elapsed, traffic)


def compile_matmul() -> Contender:
    """Compile a product of square matrices, large enough for the device's peak rate."""
    on_cpu = jax.default_backend() == "cpu"
    side, dtype = (2048, "float32") if on_cpu else (8192, "bfloat16")
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    workload = Workload(f"{side} x {side}", 0, 0, dtype)
    return compile_function(MATMUL, JAX, workload, jnp.matmul, (square, square), 2.0 * side**3)


def compile_copy() -> Contender:
    """Compile a read of one array and a write of another, too large for any cache."""
    megabytes = 128 if jax.default_backend() == "cpu" else 1024
    array = jnp.ones((megabytes, 2**18), jnp.float32)
    workload = Workload(f"{megabytes} MiB", 0, 0, "float32")
    return compile_function(COPY, JAX, workload, jnp.negative, (array,), traffic=2.0 * array.nbytes)


def compile_forward(workload: Workload, inputs: Inputs) -> Iterator[Contender]:
    """Compile the forward pass from images to logits, as in evaluation."""
    model = create_model(workload.model, CLASSES, dtype=jnp.dtype(workload.dtype))
    size = workload.image_size
    flops = 2.0 * count_cost(model, size, size).macs * workload.batch_size
    images = jnp.asarray(as_images(inputs.pixels))
    yield compile_function("forward", JAX, workload, model.apply, (inputs.variables, images), flops)


def as_images(pixels: np.ndarray) -> np.ndarray:
    """Convert bytes to float32 with about the mean and deviation of normalized images."""
    return (pixels.astype(np.float32) - 127.5) / 73.9


TRAINING = ("gradient", "step")


def compile_training(
    workload: Workload, inputs: Inputs, parts: Sequence[str] = TRAINING
) -> Iterator[Contender]:
    """Compile `parts` of training: the loss gradient, and the whole step that `train.py` runs."""
    config = recipe(workload)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    examples = EPOCH_MULTIPLE * workload.batch_size
    trainer = build_trainer(config, CLASSES, examples, mesh)
    flops = train_flops(config, trainer.model)
    batch = sharding.put_batch({"image": inputs.pixels, "label": inputs.labels}, mesh)
    key = jax.random.key(0)

    def gradient(variables: Variables, task_inputs: Any) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> jax.Array:
            return trainer.task.loss({**variables, "params": params}, task_inputs, key)[0]

        return jax.value_and_grad(loss)(variables["params"])

    task_inputs = jax.jit(trainer.task.inputs)(batch, key)
    variables = sharding.put_everywhere(inputs.variables, mesh)
    arguments = (variables, task_inputs)
    if "gradient" in parts:
        yield compile_function("gradient", JAX, workload, gradient, arguments, flops)
    if "step" not in parts:
        return

    began = time.perf_counter()
    compiled = trainer.train_step.lower(trainer.state, trainer.batch).compile()
    elapsed = time.perf_counter() - began
    state = trainer.first_state(variables)

    def call(times: int) -> None:
        nonlocal state
        for _ in range(times):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    memory = count_resources(compiled, devices=1).memory
    yield Contender("step", JAX, workload, call, flops, memory, elapsed)
