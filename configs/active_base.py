"""active_base on ImageNet from random weights, by the original's recipe.

    python train.py --config configs/active_base.py

Needs imagenet2012 as ArrayRecord files (docs/data.md), and hardware for 1,024 images of 224 x 224 a
step, such as eight GPUs or a TPU slice.

Not run by us. The original reports 83.5% / 96.6% top-1 / top-5, of its averaged weights.
The original did not publish its drop path rate for this model: 0.1, its code's default, is
our choice, and models of this size often train with more.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import imagenet_config


def get_config() -> ConfigDict:
    """The recipe as it is."""
    return imagenet_config("active_base")
