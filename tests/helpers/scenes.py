"""Segmentation datasets for tests: image and mask files, and records of scene_parse150."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import encoded, photo
from PIL import Image


def mask(height: int, width: int, *labels: int) -> np.ndarray:
    """Make a mask that repeats the labels in turn."""
    return np.resize(np.array(labels, np.uint8), (height, width))


def save_scenes(
    images: Path, masks: Path, scenes: dict[str, np.ndarray], suffix: str = ".jpg"
) -> None:
    """Save an image file and a mask file per scene, given as masks by name."""
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for number, (name, values) in enumerate(scenes.items()):
        height, width = values.shape
        file_format = "JPEG" if suffix == ".jpg" else "PNG"
        (images / f"{name}{suffix}").write_bytes(encoded(photo(number, width, height), file_format))
        (masks / f"{name}.png").write_bytes(encoded(Image.fromarray(values), "PNG"))


def save_ade20k(folder: Path, training: list[np.ndarray], validation: list[np.ndarray]) -> None:
    """Save `folder`/ADEChallengeData2016 with these masks, and photos of the same sizes."""
    root = folder / "ADEChallengeData2016"
    for split, name, masks in (("training", "train", training), ("validation", "val", validation)):
        scenes = {f"ADE_{name}_{number:08}": values for number, values in enumerate(masks, 1)}
        save_scenes(root / "images" / split, root / "annotations" / split, scenes)


def png(values: np.ndarray) -> io.BytesIO:
    return io.BytesIO(encoded(Image.fromarray(values), "PNG"))


def prepare_scene_parse150(
    folder: Path, monkeypatch: pytest.MonkeyPatch, masks: Callable[[int], np.ndarray]
) -> None:
    """Write ArrayRecord files with the real builder; `masks` makes the mask of each scene."""
    builder = tfds.builder("scene_parse150", data_dir=folder, file_format="array_record")

    def scenes(count: int) -> Iterator[tuple[int, dict[str, io.BytesIO]]]:
        for number in range(count):
            image = io.BytesIO(encoded(photo(number, 40, 30)))
            yield number, {"image": image, "annotation": png(masks(number))}

    def splits(*_: Any) -> dict[str, Any]:  # replaces the downloaded files
        return {"train": scenes(5), "test": scenes(3)}

    monkeypatch.setattr(type(builder), "_split_generators", splits)
    builder.download_and_prepare()


def mocked_records(
    builder: Any, split: str, decoders: dict[str, Any], number: int = 7
) -> list[dict[str, bytes]]:
    """Encode random records like `mock_data`'s, with valid labels and masks as large as images."""
    del split
    for feature in ("image", "annotation"):
        assert isinstance(decoders[feature], tfds.decode.SkipDecoding), f"{feature} is decoded"
    records = []
    for record in tfds.testing.mocking.RandomFakeGenerator(builder.info.features, number):
        annotation = np.resize(record["annotation"] % 151, record["image"].shape[:2])
        pair = {"image": record["image"], "annotation": annotation}
        records.append({name: png(values).getvalue() for name, values in pair.items()})
    return records
