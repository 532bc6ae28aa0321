"""Measure the speed of training with the full recipe, without a dataset.

    python train.py --config configs/throughput.py --config.batch_size=256

Reads, decodes and augments JPEG files of 500 x 375 pixels (64 files, repeated), trains active_tiny
on them, and prints the images per second of each epoch. The first epoch includes the start of the
loader. The images teach the model nothing, so the accuracy has no meaning. The loader alone is
measured by `python -m activemlp_jax.benchmark data --config configs/throughput.py`; if it is not
faster than training, it limits training, and a larger data.num_threads may help.

Not run by us on a GPU or TPU.
"""

from ml_collections import ConfigDict

from configs.imagenet import get_config as imagenet_config


def get_config() -> ConfigDict:
    """Return the recipe with sample photographs and a few short epochs."""
    config = imagenet_config("active_tiny")
    config.epochs = 3
    config.data.name = "photos:10240"
    return config
