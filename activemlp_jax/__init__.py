"""ActiveMLP, the Active Token Mixer backbone (AAAI 2023), in JAX and Flax."""

from activemlp_jax.models.atm import sample_axis
from activemlp_jax.models.backbone import ActiveMLP, create_model, list_models
from activemlp_jax.models.segmentation import ActiveSegmentor, create_segmentor
from activemlp_jax.weights.model_directory import load_pretrained
from activemlp_jax.weights.torch_files import load_torch_checkpoint
from activemlp_jax.weights.torch_names import from_torch, to_torch

__all__ = [
    "ActiveMLP",
    "ActiveSegmentor",
    "create_model",
    "create_segmentor",
    "from_torch",
    "list_models",
    "load_pretrained",
    "load_torch_checkpoint",
    "sample_axis",
    "to_torch",
]
