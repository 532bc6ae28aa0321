"""Model directories of small models that compile in seconds, and photos for them."""

from pathlib import Path
from typing import Any

import goldens
import jax
import numpy as np
from pictures import photo

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import write_model

PREPROCESSING = Preprocessing(image_size=32, resize_factor=1.25, mean=(0.5, 0.4, 0.3))
BACKBONE: dict[str, Any] = {
    "depths": (2, 2, 2, 2),
    "embed_dims": (8, 8, 16, 16),
    "mlp_ratios": (2, 2, 2, 2),
    "share_dims": (2, 2, 2, 2),
    "offset_interval": 2,
}
CLASSIFIER = am.ActiveMLP(**BACKBONE, num_classes=7)
NAMES = ("ant", "bee", "n01440764", "doe", "eel", "fox", "gnu")  # one is an ImageNet ID
SEED = 5  # gives label maps with many classes
SEGMENTOR = am.ActiveSegmentor(BACKBONE, "fpn", 7, channels=8, neck_channels=16)


def save_model(
    directory: Path, model: Any, preprocessing: Any, names: Any = None, task: str = ""
) -> Path:
    """Write a model directory with weights of the golden runs."""
    card = ModelCard(model, preprocessing, ("model",), "model", names, task=task)
    variables = jax.tree.map(np.asarray, goldens.rule_variables(model, SEED))
    with write_directory_aside(directory) as temporary:
        write_model(temporary, card, {"model": variables})
    return directory


def save_classifier(directory: Path) -> Path:
    return save_model(directory, CLASSIFIER, PREPROCESSING, NAMES)


def save_segmentor(directory: Path) -> Path:
    return save_model(directory, SEGMENTOR, ScenePreprocessing(long_side=0, window=64))


def save_photos(folder: Path, *names: str, width: int = 60, height: int = 45) -> list[Path]:
    """Save a different photo under each name."""
    files = [folder / name for name in names]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(number, width, height).save(file)
    return files
