"""The proof of a conversion: the file in PyTorch and the model directory in flax, side by side.

Needs the extra `torch`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.torch_reference.active_mlp import TorchActiveMLP
from activemlp_jax.torch_reference.segmentor import TorchSegmentor
from activemlp_jax.weights.architecture import Model
from activemlp_jax.weights.model_directory import ModelCard, architecture, read_card, read_weights
from activemlp_jax.weights.torch_files import StateDict, as_tensor

BOUND = 1e-9  # relative; float64 leaves about 1e-15
# Of the scene for segmentation models, which take any size: small, since their heads are wide, and
# odd after the first halvings, so that maps are resized by other ratios than two.
SCENE = (72, 104)

Logits = tuple[np.ndarray, ...]  # and the auxiliary head's


def largest_difference(
    directory: Path, state_dicts: Mapping[str, StateDict], images: int = 2
) -> dict[str, float]:
    """How far the logits of the two models are apart on random images, both in float64.

    Args:
      directory: of the converted model.
      state_dicts: what it was converted from, by kind of weights.
      images: how many, of the size that the model was made for; of a segmentation model, one small
        scene is taken.

    Returns:
      By kind of weights, the norm of the difference over the norm of PyTorch's logits; where there
      is an auxiliary head, the larger one of both heads.
    """
    card = read_card(directory)
    if isinstance(card.preprocessing, Preprocessing):
        shape = (images, card.preprocessing.image_size, card.preprocessing.image_size, 3)
    else:
        shape = (1, *SCENE, 3)
    inputs = np.random.default_rng(0).standard_normal(shape)
    # One framework after the other: the weights of a large model need not be there twice.
    ours = _flax_logits(directory, card, inputs)
    theirs = _torch_logits(state_dicts, card, inputs)
    return {kind: _difference(ours[kind], theirs[kind]) for kind in state_dicts}


def _difference(ours: Logits, theirs: Logits) -> float:
    return max(
        float(np.linalg.norm(mine - other) / np.linalg.norm(other))
        for mine, other in zip(ours, theirs, strict=True)
    )


def _flax_logits(directory: Path, card: ModelCard, inputs: np.ndarray) -> dict[str, Logits]:
    has_aux = isinstance(card.model, ActiveSegmentor) and card.model.head == "upernet"
    options: dict[str, Any] = {"return_aux": True} if has_aux else {}
    logits = {}
    with jax.enable_x64(True):
        model = card.model.clone(dtype=jnp.float64)

        @jax.jit
        def run(variables: dict, images: jax.Array) -> Any:
            return model.apply(variables, images, **options)

        for kind in card.kinds:
            variables = jax.tree.map(_in_float64, read_weights(directory, card, kind))
            logits[kind] = _all_of(jax.device_get(run(variables, jnp.asarray(inputs))))
            del variables
    return logits


def _all_of(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def _in_float64(value: np.ndarray) -> jax.Array:
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.asarray(value, jnp.float64 if floating else value.dtype)


def _torch_logits(
    state_dicts: Mapping[str, StateDict], card: ModelCard, inputs: np.ndarray
) -> dict[str, Logits]:
    with torch.device("meta"):  # its weights come with each state dict
        model = torch_model(card.model)
    logits = {}
    for kind, state_dict in state_dicts.items():
        tensors = {key: as_tensor(value) for key, value in state_dict.items()}
        for key, tensor in tensors.items():
            tensors[key] = tensor.double() if tensor.is_floating_point() else tensor
        model.load_state_dict(tensors, assign=True)
        del tensors
        with torch.inference_mode():
            found = _all_of(model(torch.from_numpy(inputs)))
        logits[kind] = tuple(value.numpy() for value in found)
    return logits


def torch_model(model: Model) -> torch.nn.Module:
    """The second writing of a flax `model`: the same function, without weights of its own."""
    kind = TorchSegmentor if isinstance(model, ActiveSegmentor) else TorchActiveMLP
    return kind(**architecture(model), num_classes=model.num_classes)
