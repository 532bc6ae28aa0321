"""The original's recipe for ImageNet: the one place that holds it."""

from ml_collections import ConfigDict

from activemlp_jax.models.backbone import VARIANTS
from activemlp_jax.training.config import default_config


def imagenet_config(variant: str) -> ConfigDict:
    """The config that trains `variant`, one of `list_models()`, from random weights on ImageNet.

    Computes in bfloat16; the original ran in mixed precision with float16. 1,024 images a step, in
    eight groups of 128, are its eight devices with 128 images each.

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

    for field, value in VARIANTS[variant].items():
        config.model[field] = tuple(map(float, value)) if field == "mlp_ratios" else value
    config.model.drop_path_rate = 0.1
    config.model.dtype = "bfloat16"

    config.data.name = "tfds:imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.num_threads = 16
    config.data.repeats = 3
    config.data.augmentation = "random_resized_crop"
    config.data.randaugment = "rand-m9-mstd0.5-inc1"
    config.data.color_jitter = 0.4  # of use where RandAugment is switched off

    config.optimizer.schedule = "epochs"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.reference_batch_size = 512
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 5
    config.optimizer.weight_decay = 0.05
    return config
