"""Data sets as random access: an index gives one image and its label."""

import io
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from activemlp_jax.errors import UserError

# A split by role, for those who name none: the first of these that a data set has.
EVALUATION_SPLITS = ("val", "validation", "test")

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Example(NamedTuple):
    """`image` `[H, W, 3]` uint8 RGB, `label` the index of its class."""

    image: np.ndarray
    label: int


class Source(Protocol):
    """A data set split; `class_names[label]` is the name of a label."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def check_same_classes(expected: tuple[str, ...], found: tuple[str, ...], what: str) -> None:
    """Raises UserError, naming the first difference, if `what` has other classes than expected."""
    if len(expected) != len(found):
        raise UserError(f"{what} has {len(found)} classes, expected {len(expected)}")
    for label, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours != theirs:
            raise UserError(f"class {label} of {what} is {theirs!r}, expected {ours!r}")


def decode(data: bytes, name: str) -> np.ndarray:
    """The pixels `[H, W, 3]`, uint8 RGB, of an encoded image; UserError with `name` if broken."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is no readable image: {error}") from error


class ArraySource:
    """A split held in memory: `images` `[N, H, W, 3]` uint8 and `labels` `[N]`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self._images = images
        self._labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))


class FolderSource:
    """A folder of class folders of image files; classes and files in the order of their names.

    Raises:
      UserError: no such folder, fewer than two class folders, or one without images.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        classes = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if len(classes) < 2:
            raise UserError(f"{folder} has {len(classes)} class folders, expected two or more")
        self.class_names = tuple(classes)
        self._files: list[tuple[str, int]] = []
        for label, name in enumerate(classes):
            files = sorted(
                entry.path
                for entry in os.scandir(folder / name)
                if entry.name.lower().endswith(IMAGE_SUFFIXES)
            )
            if not files:
                raise UserError(f"the class folder {folder / name} has no images")
            self._files += [(file, label) for file in files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file, label = self._files[index]
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        return Example(decode(data, file), label)


class TfdsSource:
    """A split of an image classification data set of tensorflow-datasets, in ArrayRecord files.

    Args:
      name: of the builder, with a config and version where wanted, as `tfds.builder` takes it.
      split: such as 'train' or 'validation[:10%]'; None for the first of `EVALUATION_SPLITS`.

    Raises:
      UserError: it is unknown, not prepared, not in ArrayRecord files, or of another kind.
    """

    def __init__(self, name: str, split: str | None):
        import tensorflow_datasets as tfds  # slow to import, and only these data sets need it

        where = "set the environment variable TFDS_DATA_DIR to the folder of your data sets"
        try:
            builder = tfds.builder(name)
        except Exception as error:  # its kinds of error share no base
            reason = str(error).split("\n")[0]
            raise UserError(f"tfds:{name} cannot be opened: {reason}; {where}") from error
        features = dict(getattr(builder.info.features, "items", dict)())
        label = features.get("label")
        if not isinstance(label, tfds.features.ClassLabel) or "image" not in features:
            raise UserError(
                f"tfds:{name} is not for image classification: expected the features 'image' and "
                f"'label', a class, found {', '.join(features) or 'neither'}"
            )
        splits = list(builder.info.splits)
        if not splits:
            raise UserError(
                f"tfds:{name} is not prepared: no ArrayRecord files in {builder.data_dir}; {where}"
            )
        split = split or _first_split(splits, f"tfds:{name}")
        try:
            self._records = builder.as_data_source(
                split=split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except (NotImplementedError, KeyError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"tfds:{name}, split {split!r}, cannot be read: {reason}") from error
        self.class_names = tuple(label.names)
        self._name = f"tfds:{name}, split {split!r}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record: dict[str, Any] = self._records[index]
        return Example(decode(record["image"], f"{self._name}: {index}"), int(record["label"]))


def _first_split(splits: list[str], name: str) -> str:
    for split in EVALUATION_SPLITS:
        if split in splits:
            return split
    raise UserError(f"{name} has the splits {', '.join(splits)}; choose one")


def open_digits(split: str | None) -> Source:
    """The 1,797 handwritten digits that come with scikit-learn, upscaled to 32x32.

    The first 1,437 in the data set's order are 'train'; the last 360, written by other people,
    are 'test'.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI machine
    learning repository; the copy in `sklearn.datasets.load_digits`.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    parts = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    split = split or "test"
    if split not in parts:
        raise UserError(f"digits has the splits {', '.join(parts)}, not {split!r}")
    digits = load_digits()
    grey = np.round(digits.images[parts[split]] * (255 / 16)).astype(np.uint8)
    upscaled = [Image.fromarray(g).resize((32, 32), Image.Resampling.BICUBIC) for g in grey]
    images = np.stack([np.asarray(image.convert("RGB")) for image in upscaled])
    return ArraySource(images, digits.target[parts[split]], tuple("0123456789"))


def open_folder(root: Path, split: str | None) -> Source:
    """A folder of class folders, or one that has such a folder for every split.

    The latter is the layout of ImageNet: `train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    if split:
        return FolderSource(root / split)
    present = [split for split in EVALUATION_SPLITS if (root / split).is_dir()]
    return FolderSource(root / present[0] if present else root)


def open_source(name: str, split: str | None = None) -> Source:
    """The split of a data set.

    Args:
      name: 'digits', 'folder:PATH', or 'tfds:BUILDER'.
      split: of those that the data set has; None for the one to evaluate on.

    Raises:
      UserError: an unknown name or split, or a data set that cannot be read.
    """
    kind, _, rest = name.partition(":")
    if name == "digits":
        return open_digits(split)
    if kind == "folder" and rest:
        return open_folder(Path(rest).expanduser(), split)
    if kind == "tfds" and rest:
        return TfdsSource(rest, split)
    raise UserError(f"no data set {name!r}, expected digits, folder:PATH or tfds:NAME")
