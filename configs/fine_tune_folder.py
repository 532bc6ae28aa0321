"""Your own photos: fine-tune a model on a folder of class folders.

    python train.py --config configs/fine_tune_folder.py --config.data.name=folder:data/photos \\
        --config.init_from=models/active_tiny

`data/photos/train` and `data/photos/val` each have a folder of images for every class;
`models/active_tiny` is a model directory (docs/converting.md). A GPU with 16 GB should do; on a
CPU lower batch_size and be patient. Of some dozens of images take 8 at a time, for 60 epochs.

A starting point for some dozens to some ten thousand images, not tuned on any: half of the
original's augmentation and no mixing, layers near the image learn slower than the head, gradients
are clipped, and the average of the weights warms up. Set epochs so that there are a few thousand
steps, or some hundreds of few images, and choose learning_rate by a few short runs; it does not
change with the batch. docs/fine_tuning.md has what was measured.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import imagenet_config


def get_config() -> ConfigDict:
    """The original's recipe, and what a small set and weights that know something change."""
    config = imagenet_config("active_tiny")
    config.epochs = 30
    config.batch_size = 64
    config.eval_batch_size = 64
    config.ema_decay = 0.999
    config.ema_warmup = True
    config.random_erasing = 0.0
    config.mix.mixup_alpha = 0.0
    config.mix.cutmix_alpha = 0.0
    config.data.name = "folder:data/photos"
    config.data.test_split = "val"
    config.data.num_threads = 4
    config.data.repeats = 1
    config.data.crop.min_area = 0.25
    config.data.randaugment = "rand-m5-mstd0.5-inc1"
    config.data.on_error = "raise"  # of so few, a broken one is worth mending
    config.optimizer.schedule = "steps"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.reference_batch_size = 0  # the rate stays where the batch changes
    config.optimizer.final_learning_rate = 1e-6
    config.optimizer.warmup_epochs = 2
    config.optimizer.clip_norm = 1.0
    config.optimizer.layer_decay = 0.8
    return config
