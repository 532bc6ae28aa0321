"""ActiveMLP in PyTorch as fast as simple means make it: what JAX is compared with.

It is `weights/torch_model.py` with operators that are faster there, compiled by `torch.compile`.
Needs the extra `torch`.
"""

import gc
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from activemlp_jax.benchmark.measuring import Contender, Workload
from activemlp_jax.benchmark.operator import Case
from activemlp_jax.benchmark.programs import CLASSES, Inputs, as_images, recipe
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.torch_reference.active_mlp import ActiveTokenMixer, Block, TorchActiveMLP
from activemlp_jax.utils.errors import one_line
from activemlp_jax.weights.torch_names import to_torch

# Maps `[B, H, W, C]`, offsets `[B, H, W, G]`, the axis they move along, 1 or 2, and the weight
# `[C, C, 1, 1]` and bias of a convolution: what it gives for the maps that were moved.
Operator = Callable[[Tensor, Tensor, int, Tensor, Tensor | None], Tensor]
Compiler = Callable[[Any], Any]


def sample_groups(x: Tensor, offset: Tensor, dim: int) -> Tensor:
    """The operator, by gathering whole groups of channels.

    On a CPU under `torch.compile`, this takes 40 to 80% of the time that gathering every channel by
    an index of its own does.

    Args:
      x: `[B, H, W, C]`.
      offset: `[B, H, W, G]`, finite, pixels.
      dim: 1 for the height, 2 for the width.

    Returns:
      `[B, H, W, C]`, dtype of `x`.
    """
    length, groups = x.shape[dim], offset.shape[-1]
    grouped = x.unflatten(-1, (groups, -1))
    # bfloat16 has no quarter pixels beyond 32.
    offset = offset.float()
    own = torch.arange(length, dtype=offset.dtype, device=x.device)
    position = own.view([-1 if d == dim else 1 for d in range(4)]) + offset
    floor = position.floor()
    fraction = (position - floor).unsqueeze(-1)
    result = torch.zeros((), device=x.device)
    for place, weight in ((floor, 1 - fraction), (floor + 1, fraction)):
        inside = ((place >= 0) & (place < length)).unsqueeze(-1)
        index = place.clamp(0, length - 1).long().unsqueeze(-1).expand_as(grouped)
        result = result + weight * torch.where(inside, grouped.gather(dim, index), 0)
    return result.to(x.dtype).flatten(-2)


def gather_operator(
    x: Tensor, offset: Tensor, dim: int, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`sample_groups`, then the convolution, which is a linear layer."""
    return functional.linear(sample_groups(x, offset, dim), weight[:, :, 0, 0], bias)


def deform_operator(
    deform_conv2d: Callable[..., Tensor],
    x: Tensor,
    offset: Tensor,
    dim: int,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Both at once, as the original computes it, with an offset group a channel.

    Args:
      deform_conv2d: torchvision's.
      x: `[B, H, W, C]`.
      offset: `[B, H, W, G]`, pixels.
      dim: 1 for the height, 2 for the width.
      weight: `[C, C, 1, 1]`.
      bias: `[C]`, or None.
    """
    # torchvision has no bfloat16, and casts to float32 in mixed precision too.
    offset = offset.float().repeat_interleave(x.shape[-1] // offset.shape[-1], dim=-1)
    still = torch.zeros_like(offset)
    pair = (offset, still) if dim == 1 else (still, offset)  # vertical, then horizontal
    offsets = torch.stack(pair, dim=-1).flatten(-2).permute(0, 3, 1, 2).contiguous()
    maps = x.float().permute(0, 3, 1, 2).contiguous()
    moved = deform_conv2d(maps, offsets, weight.float(), None if bias is None else bias.float())
    return moved.to(x.dtype).permute(0, 2, 3, 1)


class PeerMixer(ActiveTokenMixer):
    """The ATM layer by another operator."""

    def __init__(self, dim: int, operator: Operator):
        super().__init__(dim)
        self.operator = operator

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """`x` `[B, H, W, C]`, `offset` `[B, H, W, 2G]` to `[B, H, W, C]`."""
        offset_w, offset_h = offset.chunk(2, dim=-1)
        w = self.operator(x, offset_w, 2, self.atm_w.weight, self.atm_w.bias)
        h = self.operator(x, offset_h, 1, self.atm_h.weight, self.atm_h.bias)
        c = self.atm_c(x)
        fusion = self.fusion((w + h + c).mean(dim=(1, 2)))
        weight = fusion.view(-1, 1, 1, x.shape[-1], 3).softmax(dim=-1)
        return self.proj(w * weight[..., 0] + h * weight[..., 1] + c * weight[..., 2])


def build_peer(name: str, inputs: Inputs, operator: Operator, device: torch.device) -> nn.Module:
    """The classifier `name` with the weights of `inputs`, convolutions in channels-last."""
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
    """The kind that JAX computes on, set up to be as fast as it can."""
    on_cpu = jax.default_backend() == "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    # JAX multiplies float32 in TF32 too.
    torch.set_float32_matmul_precision("highest" if on_cpu else "high")
    return torch.device("cpu" if on_cpu else "cuda")


def compile_function(function: Any) -> Any:
    """For shapes that stay as they are."""
    return torch.compile(function, dynamic=False)


def compile_model(model: nn.Module) -> nn.Module:
    """`model`, compiled: whole on a CPU; on a GPU by parts, each of which is compiled once a shape.

    Blocks of a stage share a program, so that the largest models take no longer than the smallest;
    what is left between the parts are additions and convolutions, which are libraries' on a GPU.
    """
    if jax.default_backend() == "cpu":
        return compile_function(model)
    torch._dynamo.config.recompile_limit = 64  # four stages, operators, with gradients and without
    for part in model.modules():
        if isinstance(part, Block | nn.Sequential):  # the latter make offsets
            part.compile(dynamic=False)
    return model


def find_deform_conv2d(say: Callable[[str], None]) -> Callable[..., Tensor] | None:
    """torchvision's, where it can be imported; `say` is told why it cannot."""
    try:
        return importlib.import_module("torchvision.ops").deform_conv2d
    except (ImportError, OSError, RuntimeError) as error:  # the last two: made for another PyTorch
        say(f"without torchvision's deform_conv2d: {one_line(error)}")
        return None


EAGER = ("deform_conv2d",)  # as the original computes it: without torch.compile


def list_operators(say: Callable[[str], None]) -> dict[str, Operator]:
    """Those that models are compared by, by name; on a CPU by gathering alone."""
    operators: dict[str, Operator] = {"gather": gather_operator}
    if jax.default_backend() != "cpu" and (found := find_deform_conv2d(say)):
        operators["deform_conv2d"] = partial(deform_operator, found)
    return operators


def _held() -> int:
    """Bytes of the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def capture(once: Callable[[], Any]) -> Callable[[], Any]:
    """What `once` does on a GPU, as one CUDA graph: without Python, and without waiting for it.

    `once` itself where PyTorch cannot record it, which is told.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # where PyTorch wants it to have run before
        once()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            once()
    except RuntimeError as error:
        print(f"without a CUDA graph: {one_line(error)}", flush=True)
        return once

    def replay() -> Callable[[], Any]:
        graph.replay()
        return once  # holds the tensors that the graph works on

    return replay


def _contender(
    what: str,
    implementation: str,
    workload: Workload,
    once: Callable[[], Any],
    flops: float | None,
    held: int,
    traffic: float | None = None,
) -> Contender:
    """Runs `once` twice: to compile it, and to see what memory it takes beyond what was `held`."""
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


class Peer(NamedTuple):
    """A classifier, as it is and compiled, and what it is timed with.

    Args:
      model: on the device.
      compiled: the same.
      images: `[B, H, W, 3]`, float32.
      labels: `[B]`, int64.
      mixed: the context of the forward pass.
      config: of the training.
    """

    model: nn.Module
    compiled: Any
    images: Tensor
    labels: Tensor
    mixed: torch.autocast
    config: ConfigDict


def _make_forward(peer: Peer) -> Callable[[], Any]:
    def once() -> Tensor:
        with torch.inference_mode(), peer.mixed:
            return peer.compiled(peer.images)

    return once


def _make_gradient(peer: Peer) -> Callable[[], Any]:
    smoothing = peer.config.label_smoothing

    def once() -> None:
        peer.model.zero_grad(set_to_none=True)
        with peer.mixed:
            logits = peer.compiled(peer.images).float()
        functional.cross_entropy(logits, peer.labels, label_smoothing=smoothing).backward()

    return once


def _make_step(peer: Peer) -> Callable[[], Any]:
    gradient, settings = _make_gradient(peer), peer.config.optimizer
    parameters: list[Tensor] = list(peer.model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.warmup_learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
        capturable=parameters[0].is_cuda,
    )

    def once() -> None:
        gradient()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - peer.config.ema_decay)

    return once


MAKERS = {"forward": _make_forward, "gradient": _make_gradient, "step": _make_step}


def prepare_models(
    jax_contenders: Sequence[Contender],
    inputs: Inputs,
    operators: Mapping[str, Operator],
    compiler: Compiler = compile_model,
) -> Iterator[Contender]:
    """Peers of JAX at the same.

    Args:
      jax_contenders: forward, or gradient and step, of one workload.
      inputs: of all.
      operators: of the peers, by name.
      compiler: of the models, but for those in `EAGER`.
    """
    # Else the limit of programs a function would be met, and what comes next be left uncompiled.
    torch._dynamo.reset()
    if torch.cuda.is_available():
        gc.collect()  # graphs of models before this one hold their memory
        torch.cuda.empty_cache()
    workload, device = jax_contenders[0].workload, choose_device()
    for name, operator in operators.items():
        held = _held()
        model = build_peer(workload.model, inputs, operator, device)
        peer = Peer(
            model,
            model if name in EAGER else compiler(model),
            torch.from_numpy(as_images(inputs.pixels)).to(device),
            torch.from_numpy(inputs.labels).long().to(device),
            torch.autocast(device.type, torch.bfloat16, enabled=workload.dtype == "bfloat16"),
            recipe(workload),
        )
        for contender in jax_contenders:
            once = MAKERS[contender.what](peer)
            yield _contender(contender.what, name, workload, once, contender.flops, held)


def prepare_operators(
    case: Case, deform_conv2d: Callable[..., Tensor] | None, compiler: Compiler = compile_function
) -> Iterator[Contender]:
    """The operator by PyTorch, forward and with its gradients.

    Args:
      case: to compute.
      deform_conv2d: torchvision's, or None; its kernel is the identity, which it multiplies by.
      compiler: of one of the two forms of `sample_groups`.
    """
    torch._dynamo.reset()
    device, held = choose_device(), _held()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[case.workload.dtype]
    dim = {"h": 1, "w": 2}[case.axis]

    def put(array: jax.Array, dtype: torch.dtype) -> Tensor:
        return torch.tensor(np.asarray(array, np.float32)).to(device, dtype)

    x, offset = put(case.features, dtype), put(case.offset, torch.float32)
    cotangent = put(case.cotangent, dtype)
    functions = {"gather eager": sample_groups, "gather": compiler(sample_groups)}
    if deform_conv2d:
        identity = torch.eye(x.shape[-1], dtype=dtype, device=device)[:, :, None, None]
        moved = partial(deform_operator, deform_conv2d)
        functions["deform_conv2d"] = lambda x, offset, dim: moved(x, offset, dim, identity, None)
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
            yield _contender(title, name, case.workload, once, None, held, traffic)
