"""Train active_large with UperNet on ADE20K, following the authors' recipe.

    python train.py --config configs/ade20k_upernet_active_large.py \\
        --config.data.name=ade20k:/data/ADEChallengeData2016 --config.init_from=models/active_large

Needs the unpacked ADEChallengeData2016.zip, the model directory of a classifier to start from
(docs/segmentation.md), and hardware for 16 crops of 512 x 512 pixels per step, such as eight GPUs.

Not run by us. The authors report 50.05% mIoU (51.10% with multi-scale testing).
The drop path rate, 0.2, is the published one.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import ade20k_config


def get_config() -> ConfigDict:
    """Return the recipe without changes."""
    return ade20k_config("active_large", "upernet")
