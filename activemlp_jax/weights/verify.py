"""The proof of a conversion: the file in PyTorch and the model directory in flax, side by side.

Needs the extra `torch`.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from activemlp_jax.weights.model_directory import ARCHITECTURE, ModelCard, read_card, read_weights
from activemlp_jax.weights.torch_files import StateDict, as_tensor
from activemlp_jax.weights.torch_model import TorchActiveMLP

BOUND = 1e-9  # relative; float64 leaves about 1e-15


def largest_difference(
    directory: Path, state_dicts: Mapping[str, StateDict], images: int = 2
) -> dict[str, float]:
    """How far the logits of the two models are apart on random images, both in float64.

    Args:
      directory: of the converted model.
      state_dicts: what it was converted from, by kind of weights.
      images: how many, of the size that the model was made for.

    Returns:
      By kind of weights, the norm of the difference over the norm of PyTorch's logits.
    """
    card = read_card(directory)
    size = card.preprocessing.image_size
    inputs = np.random.default_rng(0).standard_normal((images, size, size, 3))
    # One framework after the other: the weights of a large model need not be there twice.
    ours = _flax_logits(directory, card, inputs)
    theirs = _torch_logits(state_dicts, card, inputs)
    return {
        kind: float(np.linalg.norm(ours[kind] - theirs[kind]) / np.linalg.norm(theirs[kind]))
        for kind in state_dicts
    }


def _flax_logits(directory: Path, card: ModelCard, inputs: np.ndarray) -> dict[str, np.ndarray]:
    logits = {}
    with jax.enable_x64(True):
        apply = jax.jit(card.model.clone(dtype=jnp.float64).apply)
        for kind in card.kinds:
            params = jax.tree.map(
                lambda leaf: jnp.asarray(leaf, jnp.float64), read_weights(directory, card, kind)
            )
            logits[kind] = np.asarray(apply({"params": params}, jnp.asarray(inputs)))
            del params
    return logits


def _torch_logits(
    state_dicts: Mapping[str, StateDict], card: ModelCard, inputs: np.ndarray
) -> dict[str, np.ndarray]:
    fields = {field: getattr(card.model, field) for field in ARCHITECTURE}
    with torch.device("meta"):  # its weights come with each state dict
        model = TorchActiveMLP(**fields, num_classes=card.model.num_classes)
    logits = {}
    for kind, state_dict in state_dicts.items():
        tensors = {key: as_tensor(value).double() for key, value in state_dict.items()}
        model.load_state_dict(tensors, assign=True)
        del tensors
        with torch.inference_mode():
            logits[kind] = model(torch.from_numpy(inputs)).numpy()
    return logits
