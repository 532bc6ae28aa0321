"""Train active_large with Semantic FPN on ADE20K, following the authors' recipe.

    python train.py --config configs/ade20k_fpn_active_large.py \\
        --config.data.name=ade20k:/data/ADEChallengeData2016 --config.init_from=models/active_large

Needs the unpacked ADEChallengeData2016.zip, the model directory of a classifier to start from
(docs/segmentation.md), and hardware for 16 crops of 512 x 512 pixels per step, such as eight GPUs.

Not run by us. The authors report 48.05% mIoU.
They did not publish the optimizer and the drop path rate. The optimizer here is that of similar
models (PVT, PoolFormer); the drop path rate is that of active_large with UperNet.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import ade20k_config


def get_config() -> ConfigDict:
    """Return the recipe without changes."""
    return ade20k_config("active_large", "fpn")
