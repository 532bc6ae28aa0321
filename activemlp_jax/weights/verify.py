"""Verify a conversion: compare the file in PyTorch with the model directory in flax.

Needs the optional dependencies [torch].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.models.segmentor import ActiveSegmentor, Model
from activemlp_jax.torch_reference.active_mlp import TorchActiveMLP
from activemlp_jax.torch_reference.segmentor import TorchSegmentor
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import read_card, read_weights
from activemlp_jax.weights.model_types import architecture, model_type
from activemlp_jax.weights.torch_files import StateDict, as_tensor

MAX_DIFFERENCE = 1e-9  # relative; rounding in float64 leaves about 1e-15
# Height and width for segmentation models, which take any size. They are small because the heads
# are wide. At stride 8 the sides are odd (9 x 13), so that maps are resized by ratios other than
# two.
SCENE_SIZE = (72, 104)

NETWORKS: dict[type[Model], type[torch.nn.Module]] = {
    ActiveMLP: TorchActiveMLP,
    ActiveSegmentor: TorchSegmentor,
}

Logits = list[np.ndarray]  # the head's, then the auxiliary head's if there is one


def largest_difference(directory: Path, state_dicts: Mapping[str, StateDict]) -> dict[str, float]:
    """Compare the flax and PyTorch logits on random images in float64.

    A classifier gets two images of the size that it was made for, and a segmentation model gets one
    image of `SCENE_SIZE`.

    Args:
      directory: the converted model directory.
      state_dicts: the state dicts that it was converted from, by kind of weights.

    Returns:
      The norm of the difference divided by the norm of PyTorch's logits, by kind of weights. For a
      model with an auxiliary head, the larger value of the two heads.
    """
    card = read_card(directory)
    side = card.preprocessing.side
    takes_scenes = model_type(card.model).uses_mmsegmentation
    shape = (1, *SCENE_SIZE) if takes_scenes else (2, side, side)
    inputs = np.random.default_rng(0).standard_normal((*shape, 3))
    # One framework at a time, so that memory holds a large model's weights only once.
    flax_logits = _flax_logits(directory, card, inputs)
    torch_logits = _torch_logits(state_dicts, card, inputs)
    return {
        kind: max(
            float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            for ours, theirs in zip(flax_logits[kind], torch_logits[kind], strict=True)
        )
        for kind in state_dicts
    }


def _flax_logits(directory: Path, card: ModelCard, inputs: np.ndarray) -> dict[str, Logits]:
    has_aux = architecture(card.model).get("head") == "upernet"
    options: dict[str, Any] = {"return_aux": True} if has_aux else {}
    logits = {}
    with jax.enable_x64(True):
        model = card.model.clone(dtype=jnp.float64)
        run = jax.jit(lambda variables, images: model.apply(variables, images, **options))
        for kind in card.kinds:
            variables = jax.tree.map(_to_float64, read_weights(directory, card, kind))
            logits[kind] = jax.tree.leaves(jax.device_get(run(variables, jnp.asarray(inputs))))
            del variables
    return logits


def _to_float64(value: np.ndarray) -> jax.Array:
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.asarray(value, jnp.float64 if floating else value.dtype)


def _torch_logits(
    state_dicts: Mapping[str, StateDict], card: ModelCard, inputs: np.ndarray
) -> dict[str, Logits]:
    with torch.device("meta"):  # no memory for weights: each state dict brings its own
        model = torch_model(card.model)
    logits = {}
    for kind, state_dict in state_dicts.items():
        tensors = {key: as_tensor(value) for key, value in state_dict.items()}
        for key, tensor in tensors.items():
            tensors[key] = tensor.double() if tensor.is_floating_point() else tensor
        model.load_state_dict(tensors, assign=True)
        del tensors
        with torch.inference_mode():
            output = model(torch.from_numpy(inputs))
        logits[kind] = [value.numpy() for value in jax.tree.leaves(output)]
    return logits


def torch_model(model: Model) -> torch.nn.Module:
    """Build the PyTorch reference implementation of a flax `model`, with initial weights."""
    return NETWORKS[type(model)](**architecture(model), num_classes=model.num_classes)
