"""Train a published variant with UperNet on ADE20K, following the authors' recipe.

    python train.py --config configs/ade20k_upernet.py:active_tiny \\
        --config.data.name=ade20k:/data/ADEChallengeData2016 --config.init_from=models/active_tiny

The default variant is active_large. Needs the unpacked ADEChallengeData2016.zip, the model
directory of a classifier to start from (docs/segmentation.md), and hardware for 16 crops of 512 x
512 pixels per step, such as eight GPUs. The run starts from the raw weights of the classifier, not
from the averaged ones, as the original does. It computes in bfloat16.

The tests during training round image sizes to multiples of 32, because every new size has to be
compiled. `python -m activemlp_jax.evaluate` follows the published protocol.

Not run by us. The authors report this mIoU in percent:

                  single scale  multi-scale
    active_xtiny  44.27         45.44
    active_tiny   46.46         47.55
    active_small  48.42         49.49
    active_base   48.63         49.86
    active_large  50.05         51.10

The drop path rate, 0.2, is the one published for active_large; the others were not published.

Source: the authors' release; Active Token Mixer, section 4.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.config import default_config, set_variant


def get_config(variant: str = "active_large") -> ConfigDict:
    """Return the recipe for a variant, one of `am.list_models()`."""
    config = default_config()
    config.task = "segmentation"
    config.steps = 160_000
    config.batch_size = 16
    config.eval_batch_size = 8
    config.ema_decay = 0.0
    config.init_from = f"models/{variant}"
    config.init_weights = "model"

    set_variant(config, variant)
    config.model.drop_path_rate = 0.2
    config.model.dtype = "bfloat16"
    config.head.name = "upernet"

    config.data.name = "ade20k:data/ADEChallengeData2016"
    config.data.train_split = "training"
    config.data.test_split = "validation"
    config.data.image_size = 512
    config.data.num_threads = 16
    config.data.scene.long_side = 2048
    config.data.scene.short_side = 512

    config.augment.flip = 0.5
    config.augment.scene.min_scale = 0.5
    config.augment.scene.max_scale = 2.0
    config.augment.scene.max_class_share = 0.75
    config.augment.scene.photometric = True

    config.test.every_epochs = 13  # of 1,263 steps each; the original tests every 16,000 steps
    config.test.size_multiple = 32

    config.optimizer.schedule = "poly"
    config.optimizer.learning_rate = 6e-5
    config.optimizer.warmup_learning_rate = 6e-11
    config.optimizer.warmup_steps = 1500
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.weight_decay = 0.01
    config.optimizer.not_decayed = "norms"
    return config
