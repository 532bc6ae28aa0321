"""Train active_small on ImageNet from random weights, following the authors' recipe.

    python train.py --config configs/active_small.py

Needs imagenet2012 as ArrayRecord files (docs/data.md), and hardware for 1,024 images of 224 x 224
pixels per step, such as eight GPUs or a TPU slice.

Not run by us. The authors report 83.1% / 96.3% top-1 / top-5 accuracy for averaged weights.
They did not publish their drop path rate for this model. We use 0.1, the default of their code;
models of this size often train with more.
"""

from ml_collections import ConfigDict

from configs.imagenet import get_config as imagenet_config


def get_config() -> ConfigDict:
    """Return the recipe of configs/imagenet.py."""
    return imagenet_config("active_small")
