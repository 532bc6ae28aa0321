"""Verify a conversion: compare the file in PyTorch with the model directory in flax.

Needs the optional dependencies [torch].
"""

import functools
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
from activemlp_jax.weights.model_directory import read_card, read_weights
from activemlp_jax.weights.model_types import architecture, model_type
from activemlp_jax.weights.torch_files import StateDict, as_tensor

MAX_DIFFERENCE = 1e-9  # relative; rounding in float64 leaves about 1e-15
# Height and width for segmentation models, which take any size. They are small because the heads
# are wide. At stride 8 the sides are odd (9 x 13), so that maps are resized by ratios other than
# two.
SCENE_SIZE = (72, 104)

NETWORKS: dict[type, Any] = {ActiveMLP: TorchActiveMLP, ActiveSegmentor: TorchSegmentor}


def largest_difference(directory: Path, state_dicts: Mapping[str, StateDict]) -> dict[str, float]:
    """Compare the flax and PyTorch logits on random images in float64.

    A classifier gets two images of the size that it was made for, and a segmentation model gets one
    image of `SCENE_SIZE`. `state_dicts` has the weights that `directory` was converted from, by
    kind.

    Returns, by kind, the norm of the difference divided by the norm of PyTorch's logits. For a
    model with an auxiliary head, this is the larger value of the two heads.
    """
    card = read_card(directory)
    side = card.preprocessing.side
    shape = (1, *SCENE_SIZE) if model_type(card.model).uses_mmsegmentation else (2, side, side)
    images = np.random.default_rng(0).standard_normal((*shape, 3))
    has_aux = architecture(card.model).get("head") == "upernet"
    options: dict[str, Any] = {"return_aux": True} if has_aux else {}
    apply = jax.jit(functools.partial(card.model.clone(dtype=jnp.float64).apply, **options))

    def run_flax(kind: str) -> Any:
        with jax.enable_x64(True):
            variables = jax.tree.map(jnp.float64, read_weights(directory, card, kind))
            return jax.device_get(apply(variables, jnp.asarray(images)))

    def run_torch(kind: str) -> Any:
        with torch.device("meta"):  # no memory for weights: the state dict brings its own
            network = torch_model(card.model)
        tensors = {key: as_tensor(value).double() for key, value in state_dicts[kind].items()}
        network.load_state_dict(tensors, assign=True)
        with torch.inference_mode():
            return jax.tree.map(np.asarray, network(torch.from_numpy(images)))

    def difference(kind: str) -> float:
        # One framework at a time, so that memory holds a large model's weights only once.
        ours, theirs = jax.tree.leaves(run_flax(kind)), jax.tree.leaves(run_torch(kind))
        pairs = zip(ours, theirs, strict=True)
        return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)

    return {kind: difference(kind) for kind in state_dicts}


def torch_model(model: Model) -> torch.nn.Module:
    """Build the PyTorch reference implementation of a flax `model`, with initial weights."""
    return NETWORKS[type(model)](**architecture(model), num_classes=model.num_classes)
