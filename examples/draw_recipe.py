"""Draw the augmented images of a training step with the ImageNet recipe.

    python examples/draw_recipe.py recipe.jpg

The first row shows four sample photographs, each three times because of repeated augmentation,
dealt to two groups of six, cropped, flipped and changed by RandAugment. The second row shows them
after random erasing, and the third after cutmix in one group and mixup in the other.
"""

import argparse
import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from activemlp_jax.data.batch_transforms import normalize, random_erasing
from activemlp_jax.data.loader import train_batches
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sources import open_source
from activemlp_jax.models.active_mlp import create_model
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.training.cli_flags import load_config


def main() -> None:
    """Draw the first batch of a run with seed 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", help="the file to write")
    target = parser.parse_args().picture
    config = load_config(f"{Path(__file__).parents[1]}/configs/imagenet.py")
    config.batch_size = 12
    config.augment.mix_group_size = 6
    config.data.image_size = 128
    mean, std = config.data.mean, config.data.std
    source = open_source("photos:64")
    transform = Classification.transform
    with contextlib.closing(
        train_batches(source, transform, config, first_step=0, last_step=1)
    ) as batches:
        batch = jax.tree.map(jnp.asarray, next(batches))
    preprocessing = Preprocessing(mean=mean, std=std)
    task = Classification(create_model("active_tiny"), preprocessing, config)
    key = jax.random.key(6)
    erasing_key, _ = jax.random.split(key)  # the task splits its key in the same way
    images = normalize(batch["image"], mean, std)
    rows = {
        "crop, flip, RandAugment": images,
        "random erasing": random_erasing(erasing_key, images, config.augment.random_erasing),
        "mixup or cutmix": task.inputs(batch, key)[0],
    }
    figure, axes = plt.subplots(len(rows), figsize=(12, 3.6), layout="constrained")
    for axis, (title, pixels) in zip(axes, rows.items(), strict=True):
        visible = np.clip(np.asarray(pixels) * std + mean, 0, 1)
        spaced = np.pad(visible, [(0, 0), (0, 0), (0, 4), (0, 0)], constant_values=1)
        axis.imshow(np.concatenate(spaced, axis=1))
        axis.set_title(title, fontsize=9, loc="left")
        axis.axis("off")
    figure.savefig(target, dpi=100)
    print(f"drew {target}")


if __name__ == "__main__":
    main()
