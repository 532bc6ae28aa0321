"""The PyTorch models that the benchmarks compare with compute the same as the JAX models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_peer
from small_models import BACKBONE
from torch import Tensor
from torch.nn import functional

import activemlp_jax as am
from activemlp_jax.benchmark.programs import Case, Inputs, as_images, draw_inputs
from activemlp_jax.benchmark.timing import JAX, Contender, Workload
from activemlp_jax.models.active_mlp import VARIANTS

MICRO = {**BACKBONE, "share_dims": (2, 4, 4, 8)}


def deform_conv2d(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute what torchvision documents, for a 1x1 kernel and one offset group per channel."""
    _, channels, height, width = x.shape
    moved = torch.empty_like(x)
    for channel in range(channels):
        vertical, horizontal = offsets[:, 2 * channel], offsets[:, 2 * channel + 1]
        y = torch.arange(height).view(-1, 1) + vertical
        x_place = torch.arange(width) + horizontal
        grid = torch.stack(((2 * x_place + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
        one = x[:, channel : channel + 1]
        moved[:, channel] = functional.grid_sample(one, grid, align_corners=False)[:, 0]
    return functional.conv2d(moved, weight, bias)


OPERATORS: dict[str, torch_peer.Operator] = {
    "gather": torch_peer.gather_operator,
    "deform_conv2d": partial(torch_peer.deform_operator, deform_conv2d),
}


def as_it_is(function: Any) -> Any:
    return function


@pytest.mark.parametrize("axis", ["h", "w"])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators_give_what_jax_gives(name: str, axis: str):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 5, 6, 8), np.float32)
    offset = 3 * rng.standard_normal((2, 5, 6, 4), np.float32)
    weight = rng.standard_normal((8, 8), np.float32)
    ours = np.asarray(am.sample_axis(x, offset, axis)) @ weight.T
    tensors = torch.from_numpy(x), torch.from_numpy(offset)
    kernel = torch.from_numpy(weight)[:, :, None, None]
    theirs = OPERATORS[name](*tensors, {"h": 1, "w": 2}[axis], kernel, None).numpy()
    difference = np.abs(ours - theirs).max()
    assert difference < 1e-4, difference


@pytest.fixture
def workload(monkeypatch: pytest.MonkeyPatch) -> Workload:
    monkeypatch.setitem(VARIANTS, "micro", MICRO)
    return Workload("micro", 2, 32, "float32")


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_peer_has_the_same_weights_and_gives_the_same_logits(name: str, workload: Workload):
    inputs = draw_inputs(workload)
    images = as_images(inputs.pixels)
    apply = jax.jit(am.create_model("micro").apply)
    ours = np.asarray(apply(inputs.variables, jnp.asarray(images)))
    peer = torch_peer.build_peer("micro", inputs, OPERATORS[name], torch.device("cpu"))
    with torch.inference_mode():
        theirs = peer(torch.from_numpy(images)).numpy()
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    assert difference < 1e-5, difference


def prepared(workload: Workload, whats: tuple[str, ...]) -> tuple[Inputs, list[Contender]]:
    def nothing(times: int) -> None:
        del times

    inputs = draw_inputs(workload)
    ours = [Contender(what, JAX, workload, nothing, 1e6, None, 0.0) for what in whats]
    return inputs, list(torch_peer.prepare_models(ours, inputs, as_it_is))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_do_all_that_jax_does(workload: Workload, dtype: str):
    workload = workload._replace(dtype=dtype)
    whats = ("forward", "gradient", "step")
    _, peers = prepared(workload, whats)
    assert tuple(peer.what for peer in peers) == whats
    for peer in peers:
        assert peer.implementation == "torch gather"
        assert peer.flops == 1e6
        peer.call(2)


def test_the_peers_step_moves_its_weights_and_their_average(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
):
    lerps: list[tuple[list[Tensor], list[Tensor], float]] = []
    lerp: Callable[..., Any] = torch._foreach_lerp_

    def watched(average: list[Tensor], parameters: list[Tensor], share: float) -> None:
        lerps.append((average, parameters, share))
        lerp(average, parameters, share)

    monkeypatch.setattr(torch, "_foreach_lerp_", watched)
    inputs, _ = prepared(workload, ("step",))
    average, parameters, share = lerps[0]
    assert share == pytest.approx(1 - 0.99996)
    first = sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(inputs.variables))
    moved = sum(float(parameter.detach().abs().sum()) for parameter in parameters)
    followed = sum(float(one.abs().sum()) for one in average)
    assert moved != pytest.approx(float(first), rel=1e-9)
    assert followed != pytest.approx(moved, rel=1e-9)


def test_peers_of_the_operator_go_forward_and_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_peer, "find_deform_conv2d", lambda: deform_conv2d)
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.standard_normal((1, 4, 4, 8))) for _ in range(2))
    offset = jnp.asarray(rng.standard_normal((1, 4, 4, 4)), jnp.float32)
    case = Case(Workload("a stage", 1, 32, "float32"), "w", x, offset, cotangent)
    peers = list(torch_peer.prepare_operators(case, as_it_is))
    assert [(peer.what, peer.implementation) for peer in peers] == [
        (f"w {what}", f"torch {name}")
        for name in ("gather eager", "gather", "deform_conv2d")
        for what in ("forward", "forward+backward")
    ]


def test_a_torchvision_that_is_not_here_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(torch_peer.importlib, "import_module", broken)
    torch_peer.find_deform_conv2d.cache_clear()
    assert torch_peer.find_deform_conv2d() is None
    told = capsys.readouterr().out
    assert told == "without torchvision's deform_conv2d: No module named 'torchvision.ops'\n"
