"""Train a published variant with Semantic FPN on ADE20K, following the authors' recipe.

    python train.py --config configs/ade20k_fpn.py:active_tiny \\
        --config.data.name=ade20k:/data/ADEChallengeData2016 --config.init_from=models/active_tiny

The default variant is active_large. This differs from configs/ade20k_upernet.py in the head, the
number of steps and the optimizer, and needs the same data, classifier and hardware.

Not run by us. The authors report this mIoU in percent:

    active_xtiny  43.03
    active_tiny   45.84
    active_small  47.30
    active_base   47.73
    active_large  48.05

They published only the number of steps. The optimizer here is that of similar models (PVT,
PoolFormer): AdamW, 1e-4, weight decay 1e-4. The drop path rate is that of active_large with
UperNet.

Source: the authors' release; Active Token Mixer, section 4.
"""

from ml_collections import ConfigDict

from configs.ade20k_upernet import get_config as upernet_config


def get_config(variant: str = "active_large") -> ConfigDict:
    """Return the recipe for a variant, one of `am.list_models()`."""
    config = upernet_config(variant)
    config.head.name = "fpn"
    config.steps = 40_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.not_decayed = "vectors"
    return config
