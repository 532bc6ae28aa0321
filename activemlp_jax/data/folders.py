"""Folders of images: classes are subfolders, or masks lie in a second folder."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from activemlp_jax.data import ade20k
from activemlp_jax.data.base import (
    CHECKED_MASKS,
    EVALUATION_SPLITS,
    Example,
    Source,
    choose_split,
    evenly_spaced,
)
from activemlp_jax.data.decoding import (
    IMAGE_SUFFIXES,
    MAX_LISTED,
    MOST_BYTES,
    BrokenImageError,
    decode,
    decode_mask,
    describe_left_out,
    is_image_name,
    is_other_image_name,
    read_image_file,
    read_shape,
    warn,
    warn_of_orientation,
)
from activemlp_jax.data.segmentation_transforms import IGNORED, labels_of_mask
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import read_file

CHECKED_IMAGES = 32  # number of evenly spaced images to check for an EXIF orientation
MAX_CLASS_FILE_BYTES = 2**20  # limit on the size of a file with class names
ADE20K_FOLDER = "ADEChallengeData2016"
ADE20K_SPLITS = ("training", "validation")


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder, sorted by name; raise UserError if it cannot be read."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error


def subfolders(folder: Path) -> list[str]:
    """List the names of the subfolders of a folder, sorted and without hidden ones."""
    return [
        entry.name
        for entry in scan(folder)
        if os.path.isdir(entry.path) and not entry.name.startswith(".")
    ]


def scan_images(folder: Path, what: str) -> tuple[list[str], list[str]]:
    """List the paths of a folder's images, and the names of images in unsupported formats.

    Raise UserError, which names `what`, if the folder cannot be read or has no images.
    """
    entries = scan(folder)
    files = [entry.path for entry in entries if is_image_name(entry.name)]
    left_out = [entry.name for entry in entries if is_other_image_name(entry.name)]
    check_images(files, left_out, what)
    return files, left_out


def check_images(files: Sequence[object], left_out: Sequence[str], what: object) -> None:
    """Raise UserError, which names `what`, if there are no `files` in a format that we read."""
    if not files:
        others = f"; {describe_left_out(left_out)}" if left_out else ""
        raise UserError(f"{what} has no images, expected {', '.join(IMAGE_SUFFIXES)}{others}")


def warn_of_images(folder: Path, files: Sequence[str], left_out: Sequence[str]) -> None:
    """Warn on stderr about unsupported images, and EXIF orientations in a sample of `files`."""

    def readable() -> Iterator[bytes]:
        for index in evenly_spaced(len(files), CHECKED_IMAGES):
            with contextlib.suppress(BrokenImageError):
                yield read_image_file(files[index])

    if left_out:
        warn(f"{folder}: {describe_left_out(left_out)}")
    warn_of_orientation(readable(), folder)


class FolderSource:
    """Images in a folder with one subfolder per class; classes and files are sorted by name.

    `files` has the path and the label of each image.

    Raises:
      UserError: the folder does not exist, has fewer than two class folders, or has one without
        images.
    """

    def __init__(self, folder: Path):
        self.class_names = tuple(subfolders(folder))
        count = len(self.class_names)
        if count < 2:
            raise UserError(f"{folder} has {count} class folders, expected two or more")
        self.files: list[tuple[str, int]] = []
        left_out: list[str] = []
        for label, name in enumerate(self.class_names):
            files, others = scan_images(folder / name, f"the class folder {folder / name}")
            self.files += [(file, label) for file in files]
            left_out += [f"{name}/{other}" for other in others]
        warn_of_images(folder, [file for file, _ in self.files], left_out)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file, label = self.files[index]
        return Example(decode(read_image_file(file), file), label)


def open_folder(path: str, split: str | None) -> Source:
    """Open a folder with one subfolder per class, or with one per split, which has one per class.

    With splits, the layout is that of ImageNet: `train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`.
    """
    root = Path(path).expanduser()
    present = subfolders(root)
    split = split or next((name for name in EVALUATION_SPLITS if name in present), "")
    return FolderSource(root / split)


class SceneFolder:
    """Scenes in two folders: images, sorted by name, and a mask `STEM.png` for each image `STEM.*`.

    Masks have one channel or a palette; for `reduce_zero_label`, see `labels_of_mask`.

    Raises:
      UserError: a folder is missing, there are no images, an image has no mask, or one of the masks
        that are checked (see `CHECKED_MASKS`) cannot be read.
    """

    def __init__(
        self, images: Path, masks: Path, class_names: Sequence[str], reduce_zero_label: bool
    ):
        self.class_names = tuple(class_names)
        self._reduce_zero_label = reduce_zero_label
        self._masks = masks
        files, left_out = scan_images(images, str(images))
        self._images = [Path(file) for file in files]
        present = {entry.name for entry in scan(masks)}
        missing = [file for file in self._images if f"{file.stem}.png" not in present]
        if missing:
            names = ", ".join(file.name for file in missing[:MAX_LISTED])
            more = ", ..." if len(missing) > MAX_LISTED else ""
            raise UserError(
                f"{len(missing)} of the {len(self._images)} images in {images} have no mask: "
                f"{names}{more}; expected {masks / missing[0].stem}.png and so on"
            )
        warn_of_images(images, files, left_out)
        for index in evenly_spaced(len(self), CHECKED_MASKS):
            self._mask(index)

    def __len__(self) -> int:
        return len(self._images)

    def shape(self, index: int) -> tuple[int, int]:
        """Read an image's (height, width) from its header."""
        file = self._images[index]
        return read_shape(read_image_file(file), str(file))

    def __getitem__(self, index: int) -> Example:
        file = self._images[index]
        image = decode(read_image_file(file), str(file))
        mask, name = self._mask(index)
        shape, classes = image.shape[:2], len(self.class_names)
        return Example(image, labels_of_mask(mask, name, shape, classes, self._reduce_zero_label))

    def _mask(self, index: int) -> tuple[np.ndarray, str]:
        """Read a mask; return its stored values, and its name for messages."""
        name = str(self._masks / f"{self._images[index].stem}.png")
        return decode_mask(read_file(name, MOST_BYTES), name), name


def open_ade20k(path: str, split: str | None) -> SceneFolder:
    """Open the scene parsing benchmark of ADE20K, as unpacked from ADEChallengeData2016.zip.

    `path` is the folder `ADEChallengeData2016` or its parent, and `split` is 'training' or
    'validation', the default. Raise UserError for another split or layout.
    """
    root, split = Path(path).expanduser(), choose_split(split, ADE20K_SPLITS, "ade20k")
    if os.path.isdir(root / ADE20K_FOLDER):
        root = root / ADE20K_FOLDER
    images, masks = root / "images" / split, root / "annotations" / split
    for folder in (images, masks):
        if not os.path.isdir(folder):
            raise UserError(
                f"{root} is not ADE20K: there is no folder {folder}, expected the layout of "
                f"{ADE20K_FOLDER}.zip"
            )
    return SceneFolder(images, masks, ade20k.CLASS_NAMES, reduce_zero_label=True)


def read_class_names(file: Path) -> tuple[str, ...]:
    """Read 2 to 255 different class names from a text file, one per line in the order of labels."""
    expected = "expected the names of the classes, one a line, in the order of their labels"
    try:
        text = read_file(file, MAX_CLASS_FILE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read: it is not text; {expected}") from error
    except UserError as error:
        raise UserError(f"{error}; {expected}") from error
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    if not 2 <= len(names) <= IGNORED:
        raise UserError(f"{file} names {len(names)} classes, expected 2 to {IGNORED}")
    for label, name in enumerate(names):
        if not name:
            raise UserError(f"{file} has no name on line {label + 1}, expected a class name")
        if name in names[:label]:
            raise UserError(f"{file} names the class {name!r} twice, expected different names")
    return names


def open_scene_folder(path: str, split: str | None) -> SceneFolder:
    """Open a folder of scenes, with `images`, their masks in `annotations`, and `classes.txt`.

    If `images` and `annotations` have subfolders, these are the splits. The values of a mask are
    class indices, counted from 0, or `IGNORED`. Raise UserError for another layout or split.
    """
    root = Path(path).expanduser()
    images, masks = root / "images", root / "annotations"
    for folder in (root, images, masks):
        if not os.path.isdir(folder):
            raise UserError(
                f"there is no folder {folder}; a folder of scenes has images, annotations and "
                "classes.txt"
            )
    class_names = read_class_names(root / "classes.txt")
    if splits := subfolders(images):
        split = choose_split(split, splits, root)
        images, masks = images / split, masks / split
    elif split:
        raise UserError(f"{images} has no folder {split!r}: {root} has no splits")
    return SceneFolder(images, masks, class_names, reduce_zero_label=False)
