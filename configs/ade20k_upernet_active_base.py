"""active_base under UperNet on ADE20K, by the original's recipe.

    python train.py --config configs/ade20k_upernet_active_base.py \\
        --config.data.name=ade20k:/data/ADEChallengeData2016 --config.init_from=models/active_base

Needs ADEChallengeData2016 as its zip file unpacks, a classifier's model directory to start from
(docs/segmentation.md), and hardware for 16 crops of 512 x 512 a step, such as eight GPUs.

Not run by us. The original reports 48.63% (49.86% at many scales) mIoU.
The drop path rate, 0.2, is that published for active_large; this model's was not.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import ade20k_config


def get_config() -> ConfigDict:
    """The recipe as it is."""
    return ade20k_config("active_base", "upernet")
