"""active_xtiny under Semantic FPN on ADE20K, by the original's recipe.

    python train.py --config configs/ade20k_fpn_active_xtiny.py \\
        --config.data.name=ade20k:/data/ADEChallengeData2016 --config.init_from=models/active_xtiny

Needs ADEChallengeData2016 as its zip file unpacks, a classifier's model directory to start from
(docs/segmentation.md), and hardware for 16 crops of 512 x 512 a step, such as eight GPUs.

Not run by us. The original reports 43.03% mIoU.
Optimiser and drop path rate were not published; these are its peers' and active_large's.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import ade20k_config


def get_config() -> ConfigDict:
    """The recipe as it is."""
    return ade20k_config("active_xtiny", "fpn")
