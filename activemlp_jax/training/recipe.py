"""The original's training recipes for ImageNet and ADE20K."""

from ml_collections import ConfigDict

from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.training.config import default_config


def imagenet_config(variant: str) -> ConfigDict:
    """Config to train a variant on ImageNet from random weights.

    The run computes in bfloat16; the original used mixed precision with float16. The batch of 1,024
    images has eight mixing groups of 128, as the original had eight devices with 128 images each.

    Args:
      variant: one of `list_models()`.

    Source: the authors' release; Active Token Mixer, section 4.
    """
    config = default_config()
    config.epochs = 300
    config.batch_size = 1024
    config.eval_batch_size = 512
    config.label_smoothing = 0.1
    config.ema_decay = 0.99996
    config.random_erasing = 0.25
    config.mix.mixup_alpha = 0.8
    config.mix.cutmix_alpha = 1.0
    config.mix.cutmix_probability = 0.5
    config.mix.group_size = 128

    _set_architecture(config, variant)
    config.model.drop_path_rate = 0.1
    config.model.dtype = "bfloat16"

    config.data.name = "tfds:imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.num_threads = 16
    config.data.repeats = 3
    config.data.augmentation = "random_resized_crop"
    config.data.randaugment = "rand-m9-mstd0.5-inc1"
    config.data.color_jitter = 0.4  # applied only if RandAugment is turned off

    config.optimizer.schedule = "epochs"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.reference_batch_size = 512
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 5
    config.optimizer.weight_decay = 0.05
    return config


def ade20k_config(variant: str, head: str) -> ConfigDict:
    """Config to train a variant with a segmentation head on ADE20K.

    The run starts from the raw weights, not the averaged ones, of the classifier in
    `models/VARIANT`, as the original does, and computes in bfloat16.

    For Semantic FPN, the original published only the number of iterations, 40,000; the optimizer is
    that of comparable models (PVT, PoolFormer): AdamW, 1e-4, weight decay 1e-4. It published one
    drop path rate, 0.2 for active_large with UperNet, which is used for all variants.

    The tests during training round image sizes to multiples of 32, because every new size has to be
    compiled. `python -m activemlp_jax.evaluate` follows the published protocol.

    Args:
      variant: one of `list_models()`.
      head: 'upernet' or 'fpn'.

    Source: the authors' release; Active Token Mixer, section 4.
    """
    config = default_config()
    config.task = "segmentation"
    config.batch_size = 16
    config.eval_batch_size = 8
    config.ema_decay = 0.0
    config.init_from = f"models/{variant}"
    config.init_weights = "model"

    _set_architecture(config, variant)
    config.model.drop_path_rate = 0.2
    config.model.dtype = "bfloat16"
    config.head.name = head

    config.data.name = "ade20k:data/ADEChallengeData2016"
    config.data.train_split = "training"
    config.data.test_split = "validation"
    config.data.image_size = 512
    config.data.num_threads = 16
    config.data.scene.long_side = 2048
    config.data.scene.short_side = 512
    config.data.scene.min_ratio = 0.5
    config.data.scene.max_ratio = 2.0
    config.data.scene.max_class_share = 0.75
    config.data.flip = 0.5

    config.test.every_epochs = 13  # of 1,263 steps each: about every 16,000 steps, as the original
    config.test.size_multiple = 32
    config.optimizer.schedule = "poly"
    config.optimizer.final_learning_rate = 0.0
    if head == "upernet":
        config.steps = 160_000
        config.optimizer.learning_rate = 6e-5
        config.optimizer.warmup_learning_rate = 6e-11
        config.optimizer.warmup_steps = 1500
        config.optimizer.weight_decay = 0.01
        config.optimizer.not_decayed = "norms"
    else:
        config.steps = 40_000
        config.optimizer.learning_rate = 1e-4
        config.optimizer.warmup_steps = 0
        config.optimizer.weight_decay = 1e-4
    return config


def _set_architecture(config: ConfigDict, variant: str) -> None:
    for field, value in VARIANTS[variant].items():
        config.model[field] = tuple(map(float, value)) if field == "mlp_ratios" else value
