"""Fast ActiveMLP in PyTorch, which `benchmark --compare` times next to JAX.

It is `torch_reference/active_mlp.py` with faster operators, compiled by `torch.compile`. Needs the
optional dependencies [torch].
"""

import gc
import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from activemlp_jax.benchmark.programs import CLASSES, Case, Inputs, as_images, recipe
from activemlp_jax.benchmark.timing import Contender, Workload, say
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.torch_reference.active_mlp import ActiveTokenMixer, Block, TorchActiveMLP
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.weights.torch_names import to_torch

# Samples maps `[B, H, W, C]` at offsets `[B, H, W, G]` along an axis, 1 or 2, and returns their
# convolution with a weight `[C, C, 1, 1]` and a bias.
Operator = Callable[[Tensor, Tensor, int, Tensor, Tensor | None], Tensor]
Compiler = Callable[[Any], Any]


def check_machine() -> None:
    """Raise UserError if PyTorch lacks JAX's device, or the compiler that it needs is missing."""
    backend = jax.default_backend()
    if backend != "cpu" and not (backend == "gpu" and torch.cuda.is_available()):
        raise UserError(f"--compare: JAX computes on {backend}, which this PyTorch does not")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"--compare: torch.compile needs a C++ compiler, and there is no {compiler}; install "
            "one, or name it by CXX"
        )


def sample_groups(x: Tensor, offset: Tensor, dim: int) -> Tensor:
    """Compute `sample_axis` in PyTorch by gathering whole groups of channels.

    On a CPU under `torch.compile`, this takes 40 to 80% of the time of gathering every channel by
    its own index.

    Args:
      x: `[B, H, W, C]`.
      offset: `[B, H, W, G]`, finite, pixels.
      dim: 1 for the height, 2 for the width.

    Returns:
      `[B, H, W, C]`, dtype of `x`.
    """
    length, groups = x.shape[dim], offset.shape[-1]
    grouped = x.unflatten(-1, (groups, -1))
    # In bfloat16, numbers from 32 on are a quarter pixel apart.
    offset = offset.float()
    base = torch.arange(length, dtype=offset.dtype, device=x.device)
    position = base.view([-1 if d == dim else 1 for d in range(4)]) + offset
    floor = position.floor()
    fraction = (position - floor).unsqueeze(-1)
    result = torch.zeros((), device=x.device)
    for neighbor, weight in ((floor, 1 - fraction), (floor + 1, fraction)):
        inside = ((neighbor >= 0) & (neighbor < length)).unsqueeze(-1)
        index = neighbor.clamp(0, length - 1).long().unsqueeze(-1).expand_as(grouped)
        result = result + weight * torch.where(inside, grouped.gather(dim, index), 0)
    return result.to(x.dtype).flatten(-2)


def gather_operator(
    x: Tensor, offset: Tensor, dim: int, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Apply `sample_groups`, then the 1x1 convolution as a linear layer."""
    return functional.linear(sample_groups(x, offset, dim), weight[:, :, 0, 0], bias)


def deform_operator(
    deform_conv2d: Callable[..., Tensor],
    x: Tensor,
    offset: Tensor,
    dim: int,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Sample and convolve in one call, as the original does, with one offset per channel.

    Args:
      deform_conv2d: torchvision's function.
      x: `[B, H, W, C]`.
      offset: `[B, H, W, G]`, pixels.
      dim: 1 for the height, 2 for the width.
      weight: `[C, C, 1, 1]`.
      bias: `[C]`, or None.
    """
    # torchvision has no bfloat16 kernel, and casts to float32 in mixed precision too.
    offset = offset.float().repeat_interleave(x.shape[-1] // offset.shape[-1], dim=-1)
    zeros = torch.zeros_like(offset)
    pair = (offset, zeros) if dim == 1 else (zeros, offset)  # vertical, then horizontal
    offsets = torch.stack(pair, dim=-1).flatten(-2).permute(0, 3, 1, 2).contiguous()
    maps = x.float().permute(0, 3, 1, 2).contiguous()
    result = deform_conv2d(maps, offsets, weight.float(), None if bias is None else bias.float())
    return result.to(x.dtype).permute(0, 2, 3, 1)


class PeerMixer(ActiveTokenMixer):
    """ATM layer that samples and convolves with a given operator."""

    def __init__(self, dim: int, operator: Operator):
        super().__init__(dim)
        self.operator = operator

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Mix `x` `[B, H, W, C]` with `offset` `[B, H, W, 2G]`; returns `[B, H, W, C]`."""
        offset_w, offset_h = offset.chunk(2, dim=-1)
        w = self.operator(x, offset_w, 2, self.atm_w.weight, self.atm_w.bias)
        h = self.operator(x, offset_h, 1, self.atm_h.weight, self.atm_h.bias)
        c = self.atm_c(x)
        fusion = self.fusion((w + h + c).mean(dim=(1, 2)))
        weight = fusion.view(-1, 1, 1, x.shape[-1], 3).softmax(dim=-1)
        return self.proj(w * weight[..., 0] + h * weight[..., 1] + c * weight[..., 2])


def build_peer(name: str, inputs: Inputs, operator: Operator, device: torch.device) -> nn.Module:
    """Build the classifier `name` with the weights of `inputs`, and channels-last convolutions."""
    model = TorchActiveMLP(**VARIANTS[name], num_classes=CLASSES)
    for block in model.modules():
        if isinstance(block, Block):
            block.atm = PeerMixer(block.norm1.normalized_shape[0], operator)
    state_dict = to_torch(jax.device_get(inputs.variables))
    model.load_state_dict({key: torch.tensor(value) for key, value in state_dict.items()})
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model.to(device)


def choose_device() -> torch.device:
    """Choose the kind of device that JAX uses, and set PyTorch up to be as fast as possible."""
    on_cpu = jax.default_backend() == "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    # On a GPU, JAX multiplies float32 in TF32 too.
    torch.set_float32_matmul_precision("highest" if on_cpu else "high")
    return torch.device("cpu" if on_cpu else "cuda")


def compile_function(function: Any) -> Any:
    """Compile a function for static shapes."""
    return torch.compile(function, dynamic=False)


def compile_model(model: nn.Module) -> nn.Module:
    """Compile `model` as a whole on a CPU; on a GPU, compile its parts, each once per shape.

    The blocks of a stage share a program, so the largest models take no longer to compile than the
    smallest. Outside the parts are only additions and convolutions, and on a GPU the latter are
    library calls.
    """
    if jax.default_backend() == "cpu":
        return compile_function(model)
    # Enough for four stages and all operators, with and without gradients.
    torch._dynamo.config.recompile_limit = 64
    for part in model.modules():
        if isinstance(part, Block | nn.Sequential):  # the latter compute offsets
            part.compile(dynamic=False)
    return model


@cache
def find_deform_conv2d() -> Callable[..., Tensor] | None:
    """Import torchvision's `deform_conv2d`; if that fails, print why and return None."""
    try:
        return importlib.import_module("torchvision.ops").deform_conv2d
    except (ImportError, OSError, RuntimeError) as error:  # the last two: built for another PyTorch
        say(f"without torchvision's deform_conv2d: {one_line(error)}")
        return None


EAGER = ("deform_conv2d",)  # not compiled, as in the original


def list_operators() -> dict[str, Operator]:
    """Return the operators to build the models with, by name; on a CPU, only gathering."""
    operators: dict[str, Operator] = {"gather": gather_operator}
    if jax.default_backend() != "cpu" and (function := find_deform_conv2d()):
        operators["deform_conv2d"] = partial(deform_operator, function)
    return operators


def _allocated_bytes() -> int:
    """Return the bytes that PyTorch has allocated on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def capture(once: Callable[[], Any]) -> Callable[[], Any]:
    """Record `once` as a CUDA graph; return a function that replays it.

    A replay needs no Python between kernels and does not wait for the GPU. If PyTorch cannot record
    `once`, the reason is printed and `once` itself is returned.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # PyTorch needs a run on a side stream before recording
        once()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            once()
    except RuntimeError as error:
        say(f"without a CUDA graph: {one_line(error)}")
        return once

    def replay() -> Callable[[], Any]:
        graph.replay()
        return once  # keeps the graph's tensors alive

    return replay


def _make_contender(
    what: str,
    implementation: str,
    workload: Workload,
    once: Callable[[], Any],
    flops: float | None,
    held: int,
    traffic: float | None = None,
) -> Contender:
    """Make a contender: run `once` to compile it, and again to measure memory beyond `held`."""
    on_gpu = jax.default_backend() != "cpu"

    def call(times: int) -> None:
        for _ in range(times):
            once()
        if on_gpu:
            torch.cuda.synchronize()

    began = time.perf_counter()
    call(1)
    elapsed, memory = time.perf_counter() - began, None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        call(1)
        memory = torch.cuda.max_memory_allocated() - held
        once = capture(once)
    title = f"torch {implementation}"
    return Contender(what, title, workload, call, flops, memory, elapsed, traffic)


class Peer:
    """A PyTorch classifier with its inputs; each method is one run of a function to time.

    Args:
      model: the model, on the device.
      compiled: the compiled model.
      inputs: inputs of all contenders.
      workload: model and input.
    """

    def __init__(self, model: nn.Module, compiled: Any, inputs: Inputs, workload: Workload):
        self.model, self.compiled, self.config = model, compiled, recipe(workload)
        self.parameters: list[Tensor] = list(model.parameters())
        device = self.parameters[0].device
        self.images = torch.from_numpy(as_images(inputs.pixels)).to(device)
        self.labels = torch.from_numpy(inputs.labels).long().to(device)
        mixed = workload.dtype == "bfloat16"
        self.mixed = torch.autocast(device.type, torch.bfloat16, enabled=mixed)

    def forward(self) -> Tensor:
        """Compute the logits."""
        with torch.inference_mode(), self.mixed:
            return self.compiled(self.images)

    def gradient(self) -> None:
        """Compute the gradient of the loss."""
        self.model.zero_grad(set_to_none=True)
        with self.mixed:
            logits = self.compiled(self.images).float()
        smoothing = self.config.label_smoothing
        functional.cross_entropy(logits, self.labels, label_smoothing=smoothing).backward()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW with the settings of training."""
        settings = self.config.optimizer
        return torch.optim.AdamW(
            self.parameters,
            lr=settings.warmup_learning_rate,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=self.parameters[0].is_cuda,
        )

    @cached_property
    def average(self) -> list[Tensor]:
        """Average of the weights, which starts as the weights."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def step(self) -> None:
        """Update the weights and their average."""
        average = self.average  # made before the first update
        self.gradient()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, self.parameters, 1 - self.config.ema_decay)


def prepare_models(
    jax_contenders: Sequence[Contender],
    inputs: Inputs,
    compiler: Compiler = compile_model,
) -> Iterator[Contender]:
    """Compile PyTorch's counterparts of JAX's contenders.

    Args:
      jax_contenders: forward, or gradient and step, of one workload.
      inputs: inputs of all contenders.
      compiler: compiles the models, except for operators in `EAGER`.
    """
    # Otherwise torch reaches its limit of programs per function, and later models are not compiled.
    torch._dynamo.reset()
    if torch.cuda.is_available():
        gc.collect()  # CUDA graphs of earlier models hold their memory
        torch.cuda.empty_cache()
    workload, device = jax_contenders[0].workload, choose_device()
    for name, operator in list_operators().items():
        held = _allocated_bytes()
        model = build_peer(workload.model, inputs, operator, device)
        peer = Peer(model, model if name in EAGER else compiler(model), inputs, workload)
        for contender in jax_contenders:
            once = getattr(peer, contender.what)
            yield _make_contender(contender.what, name, workload, once, contender.flops, held)


def prepare_operators(case: Case, compiler: Compiler = compile_function) -> Iterator[Contender]:
    """Compile the operator in PyTorch, forward and with gradients.

    `deform_conv2d` has an identity kernel, and its time includes the multiplication by the kernel.

    Args:
      case: inputs of the operator.
      compiler: compiles `sample_groups` for 'gather'; 'gather eager' is not compiled.
    """
    torch._dynamo.reset()
    device, held = choose_device(), _allocated_bytes()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[case.workload.dtype]
    dim = {"h": 1, "w": 2}[case.axis]

    def put(array: jax.Array, dtype: torch.dtype) -> Tensor:
        return torch.tensor(np.asarray(array, np.float32)).to(device, dtype)

    x, offset = put(case.features, dtype), put(case.offset, torch.float32)
    cotangent = put(case.cotangent, dtype)
    functions = {"gather eager": sample_groups, "gather": compiler(sample_groups)}
    if deform_conv2d := find_deform_conv2d():
        identity = torch.eye(x.shape[-1], dtype=dtype, device=device)[:, :, None, None]
        deform = partial(deform_operator, deform_conv2d)
        functions["deform_conv2d"] = lambda x, offset, dim: deform(x, offset, dim, identity, None)
    for name, function in functions.items():
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, offset)]

        def forward(function: Any = function) -> Tensor:
            with torch.inference_mode():
                return function(x, offset, dim)

        def both(function: Any = function, leaves: list[Tensor] = leaves) -> None:
            for leaf in leaves:
                leaf.grad = None
            function(*leaves, dim).backward(cotangent)

        for what, once in (("forward", forward), ("forward+backward", both)):
            title = f"{case.axis} {what}"
            traffic = case.traffic(what)
            yield _make_contender(title, name, case.workload, once, None, held, traffic)
