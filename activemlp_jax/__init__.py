"""ActiveMLP, the Active Token Mixer backbone (AAAI 2023), in JAX and Flax."""

from activemlp_jax.inference.classify import classify, embed_images
from activemlp_jax.inference.offsets import inspect_offsets
from activemlp_jax.inference.segment import segment
from activemlp_jax.models.active_mlp import ActiveMLP, create_model, list_models
from activemlp_jax.models.segmentor import ActiveSegmentor, create_segmentor
from activemlp_jax.ops.sample_axis import sample_axis
from activemlp_jax.plots.offsets import draw_offsets
from activemlp_jax.weights.model_directory import load_pretrained, read_card
from activemlp_jax.weights.torch_files import load_torch_checkpoint
from activemlp_jax.weights.torch_names import from_torch, to_torch

__all__ = [
    "ActiveMLP",
    "ActiveSegmentor",
    "classify",
    "create_model",
    "create_segmentor",
    "draw_offsets",
    "embed_images",
    "from_torch",
    "inspect_offsets",
    "list_models",
    "load_pretrained",
    "load_torch_checkpoint",
    "read_card",
    "sample_axis",
    "segment",
    "to_torch",
]
