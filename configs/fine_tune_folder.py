"""Fine-tune a model on your own photos in class folders.

    python train.py --config configs/fine_tune_folder.py --config.data.name=folder:data/photos \\
        --config.init_from=models/active_tiny

`data/photos/train` and `data/photos/val` have one folder of images per class;
`models/active_tiny` is a model directory (docs/converting.md). A GPU with 16 GB should suffice; on
a CPU, lower batch_size and be patient. For a few dozen images, use a batch size of 8 and 60 epochs.

This is a starting point for a few dozen to about ten thousand images, not tuned on photos. It uses
half of the authors' augmentation and no mixing, lower learning rates for layers near the image than
for the head, gradient clipping, and a warm-up of the weight average. Set epochs so that the run has
a few thousand steps, or a few hundred with few images, and find the learning_rate with a few short
runs. The learning rate does not scale with the batch size. docs/fine_tuning.md has measurements.
"""

from ml_collections import ConfigDict

from configs.imagenet import get_config as imagenet_config


def get_config() -> ConfigDict:
    """Return the authors' recipe with the settings for fine-tuning on a small dataset."""
    config = imagenet_config("active_tiny")
    config.epochs = 30
    config.batch_size = 64
    config.eval_batch_size = 64
    config.ema_decay = 0.999
    config.ema_warmup = True
    config.data.name = "folder:data/photos"
    config.data.test_split = "val"
    config.data.num_threads = 4
    config.data.on_error = "raise"  # with so few images, a broken one is worth fixing
    config.augment.repeats = 1
    config.augment.crop.min_area = 0.25
    config.augment.rand_augment = "rand-m5-mstd0.5-inc1"
    config.augment.random_erasing = 0.0
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.optimizer.schedule = "steps"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.reference_batch_size = 0  # do not scale the rate with the batch size
    config.optimizer.final_learning_rate = 1e-6
    config.optimizer.warmup_epochs = 2
    config.optimizer.clip_norm = 1.0
    config.optimizer.layer_decay = 0.8
    return config
