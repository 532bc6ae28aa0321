"""Train active_xtiny on ImageNet from random weights, following the authors' recipe.

    python train.py --config configs/active_xtiny.py

Needs imagenet2012 as ArrayRecord files (docs/data.md), and hardware for 1,024 images of 224 x 224
pixels per step, such as eight GPUs or a TPU slice.

Not run by us. The authors report 79.7% / 94.9% top-1 / top-5 accuracy for averaged weights.
The drop path rate, 0.1, is the one that the authors document.
"""

from ml_collections import ConfigDict

from configs.imagenet import get_config as imagenet_config


def get_config() -> ConfigDict:
    """Return the recipe of configs/imagenet.py."""
    return imagenet_config("active_xtiny")
