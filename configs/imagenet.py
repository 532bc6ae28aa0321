"""Train a published variant on ImageNet from random weights, following the authors' recipe.

    python train.py --config configs/imagenet.py:active_tiny

The files configs/active_tiny.py and so on are this config for one variant each.

Needs imagenet2012 as ArrayRecord files (docs/data.md), and hardware for 1,024 images of 224 x 224
pixels per step, such as eight GPUs or a TPU slice. The batch has eight mixing groups of 128 images
(images that share one mixup or cutmix draw), because the authors had eight devices with 128 images
each. They used float16 with a loss scale; this config computes in bfloat16.

Not run by us. The authors report these accuracies in percent, for averaged weights:

                 top-1     top-5    drop path rate
    active_xtiny  79.7      94.9    0.1, documented
    active_tiny   81.990    95.930  0.1, the default of their code
    active_small  83.1      96.3    not published; 0.1 here
    active_base   83.5      96.6    not published; 0.1 here
    active_large  83.8      96.6    not published; 0.1 here

Source: the authors' release; Active Token Mixer, section 4.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.config import default_config, set_variant


def get_config(variant: str = "active_tiny") -> ConfigDict:
    """Return the recipe for a variant, one of `am.list_models()`."""
    config = default_config()
    config.epochs = 300
    config.batch_size = 1024
    config.eval_batch_size = 512
    config.label_smoothing = 0.1
    config.ema_decay = 0.99996

    set_variant(config, variant)
    config.model.drop_path_rate = 0.1
    config.model.dtype = "bfloat16"

    config.data.name = "tfds:imagenet2012"
    config.data.train_split = "train"
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.resize_factor = 256 / 224
    config.data.num_threads = 16

    config.augment.repeats = 3
    config.augment.policy = "random_resized_crop"
    config.augment.crop.min_area = 0.08
    config.augment.crop.max_area = 1.0
    config.augment.crop.min_ratio = 3 / 4
    config.augment.crop.max_ratio = 4 / 3
    config.augment.flip = 0.5
    config.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    config.augment.color_jitter = 0.4  # applied only if RandAugment is turned off
    config.augment.random_erasing = 0.25
    config.augment.mixup_alpha = 0.8
    config.augment.cutmix_alpha = 1.0
    config.augment.cutmix_probability = 0.5
    config.augment.mix_group_size = 128

    config.optimizer.name = "adamw"
    config.optimizer.schedule = "epochs"
    config.optimizer.learning_rate = 5e-4  # for 512 images; 1e-3 for 1,024
    config.optimizer.reference_batch_size = 512
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 5
    config.optimizer.weight_decay = 0.05
    config.optimizer.not_decayed = "vectors"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    return config
