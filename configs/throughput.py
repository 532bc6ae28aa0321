"""How fast training is, with all of the recipe, on images that need no data set.

    python train.py --config configs/throughput.py --config.batch_size=256

Reads, decodes and augments JPEG files of 500 x 375 pixels (there are 64, over and over), trains
active_tiny on them, and prints images a second for each epoch; the first one includes the loader's
start. There is nothing to learn here, and the accuracy says nothing. `python -m
activemlp_jax.benchmark data --config configs/throughput.py` measures the reading alone: where that
is not faster, it is what limits training; raise data.num_threads.

Not run by us on a GPU or TPU.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import imagenet_config


def get_config() -> ConfigDict:
    """The recipe on sample photographs, for a few short epochs."""
    config = imagenet_config("active_tiny")
    config.epochs = 3
    config.data.name = "photos:10240"
    return config
