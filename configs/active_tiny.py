"""active_tiny on ImageNet from random weights, by the original's recipe.

    python train.py --config configs/active_tiny.py

Needs imagenet2012 as ArrayRecord files (docs/data.md), and hardware for 1,024 images of 224 x 224 a
step, such as eight GPUs or a TPU slice.

Not run by us. The original reports 81.990% / 95.930% top-1 / top-5, of its averaged weights.
The drop path rate, 0.1, is the default of the original's code.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import imagenet_config


def get_config() -> ConfigDict:
    """The recipe as it is."""
    return imagenet_config("active_tiny")
