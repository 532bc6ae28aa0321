"""Open segmentation datasets by name.

A scene is an image together with a mask, which has a class index per pixel.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from activemlp_jax.data import ade20k
from activemlp_jax.data.base import Example, Source, choose_split, evenly_spaced, open_by_name
from activemlp_jax.data.decoding import MOST_BYTES, decode, open_image, read_image_file
from activemlp_jax.data.digit_scenes import DigitScenes
from activemlp_jax.data.segmentation_transforms import IGNORED
from activemlp_jax.data.sources import scan, scan_images, subfolders, warn_of_images
from activemlp_jax.data.tfds_source import Records, open_builder
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import read_file

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"  # bytes 24 and 25 are the bit depth and the color type
MAX_LISTED = 3  # a message lists at most this many images without a mask
MAX_CLASS_FILE_BYTES = 2**20  # limit on the size of a file with class names
CHECKED_MASKS = 8  # evenly spaced masks that are checked before the first step
ADE20K_FOLDER = "ADEChallengeData2016"
ADE20K_SPLITS = ("training", "validation")
ADE20K_BUILDER = "scene_parse150"


class SceneSource(Source, Protocol):
    """A split of a segmentation dataset; a label is a mask `[H, W]` uint8 as large as its image.

    Each pixel of a mask is a class index or `IGNORED`. `source[index]` raises BrokenImageError if
    the image cannot be read, and another UserError if the mask cannot be read.
    """

    def shape(self, index: int) -> tuple[int, int]:
        """Read an image's (height, width) from its header; raise BrokenImageError if that fails."""
        ...


def _image_shape(data: bytes, name: str) -> tuple[int, int]:
    with open_image(data, name) as image:
        return image.height, image.width


def decode_mask(data: bytes, name: str, *, as_rgb: bool = False) -> np.ndarray:
    """Decode a mask to its stored values, `[H, W]` uint8, without looking up a palette.

    Args:
      data: the bytes of an image file in one of the formats that `decode` reads.
      name: the name of the mask in error messages.
      as_rgb: also accept three channels if they are equal.

    Raises:
      UserError: the data is not an image, or does not have one channel of 8 bits.
    """
    if data.startswith(PNG_MAGIC) and data[25:26] == b"\0" and data[24] in (2, 4):
        # Pillow scales gray values of fewer bits up to 8 bits, which changes the class indices.
        raise UserError(f"{name} has {data[24]} bits a pixel, expected 8 with a class index each")
    with open_image(data, name, "mask", UserError) as image:
        if image.mode in ("L", "P"):
            return np.array(image)
        if as_rgb and image.mode == "RGB":
            channels = np.array(image)
            if (channels == channels[..., :1]).all():
                return channels[..., 0]
        mode, bands = image.mode, len(image.getbands())
    if bands > 1:
        raise UserError(f"{name} has {bands} channels, expected one with a class index a pixel")
    raise UserError(
        f"{name} has pixels of Pillow's mode {mode!r}, expected 8 bits with a class index a pixel"
    )


def labels_of_mask(
    mask: np.ndarray, name: str, shape: tuple[int, ...], classes: int, reduce_zero_label: bool
) -> np.ndarray:
    """Convert the stored values of a mask to labels, `[H, W]` uint8: class indices or `IGNORED`.

    Args:
      mask: `[H, W]` uint8, as stored.
      name: the name of the mask in error messages.
      shape: the (height, width) of the image.
      classes: the number of classes.
      reduce_zero_label: whether stored values count classes from 1, and 0 means no class. Then 0
        becomes `IGNORED`, and all values but `IGNORED` are reduced by 1.

    Raises:
      UserError: the mask and the image differ in size, or a value is not a label of a class.

    Source: mmsegmentation's LoadAnnotations.
    """
    if mask.shape != shape:
        raise UserError(
            f"{name} has {mask.shape[1]} x {mask.shape[0]} pixels, expected those of its image, "
            f"{shape[1]} x {shape[0]}"
        )
    first = int(reduce_zero_label)
    present = np.bincount(mask.ravel(), minlength=256)
    beyond = np.flatnonzero(present[first + classes : IGNORED])
    if beyond.size:
        unlabeled = f"0 or {IGNORED}" if reduce_zero_label else str(IGNORED)
        raise UserError(
            f"{name} has the label {first + classes + beyond[0]}, expected {first} to "
            f"{first + classes - 1} for the {classes} classes, or {unlabeled} for none"
        )
    if not reduce_zero_label:
        return mask
    reduced = np.arange(-1, IGNORED)
    reduced[[0, IGNORED]] = IGNORED
    return reduced.astype(np.uint8)[mask]


class SceneFolder:
    """Scenes in two folders: images, sorted by name, and a mask `STEM.png` for each image `STEM.*`.

    Args:
      images: the folder of images.
      masks: the folder of masks, with one channel or a palette.
      class_names: class names by label.
      reduce_zero_label: see `labels_of_mask`.

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
        return _image_shape(read_image_file(file), str(file))

    def __getitem__(self, index: int) -> Example:
        file = self._images[index]
        image = decode(read_image_file(file), str(file))
        mask, name = self._mask(index)
        shape, classes = image.shape[:2], len(self.class_names)
        return Example(image, labels_of_mask(mask, name, shape, classes, self._reduce_zero_label))

    def _mask(self, index: int) -> tuple[np.ndarray, str]:
        """Read the stored values of a mask, and return them with its name."""
        name = str(self._masks / f"{self._images[index].stem}.png")
        return decode_mask(read_file(name, MOST_BYTES), name), name


class TfdsScenes:
    """A split of the TFDS (tensorflow-datasets) dataset `scene_parse150`, in ArrayRecord files.

    The masks must be those of the scene parsing benchmark, with one channel or three equal ones, as
    TFDS writes them from arrays. The TFDS builder itself downloads the masks of the instance
    benchmark; they have three channels and other classes, and this class rejects them.

    Args:
      name: 'scene_parse150', optionally with a version, as `tfds.builder` takes it.
      split: a split or slice such as 'train' or 'test[:10%]'; None for 'test'.

    Raises:
      UserError: `name` is another dataset, is not prepared, or is not in ArrayRecord files, or one
        of the masks that are checked (see `CHECKED_MASKS`) cannot be used.
    """

    class_names = ade20k.CLASS_NAMES

    def __init__(self, name: str, split: str | None):
        builder, features = open_builder(name)
        if not {"image", "annotation"} <= features.keys():
            raise UserError(
                f"tfds:{name} is not for segmentation: expected the features 'image' and "
                f"'annotation', found {', '.join(features) or 'neither'}"
            )
        if builder.name != ADE20K_BUILDER:
            raise UserError(
                f"tfds:{name} has classes that are not known here, expected tfds:{ADE20K_BUILDER}"
            )
        self._records = Records(builder, name, split, ["image", "annotation"])
        for index, record in self._records.some(CHECKED_MASKS):
            try:
                self._mask(index, record)
            except UserError as error:
                raise UserError(
                    f"{error}; tensorflow-datasets itself fetches masks of instances, which have "
                    "other classes: read ADEChallengeData2016 with ade20k:PATH"
                ) from error

    def __len__(self) -> int:
        return len(self._records)

    def shape(self, index: int) -> tuple[int, int]:
        """Read an image's (height, width) from its header."""
        return _image_shape(self._records[index]["image"], self._record_name(index))

    def _record_name(self, index: int) -> str:
        return f"{self._records.name}: record {index}"

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        image = decode(record["image"], self._record_name(index))
        mask, name = self._mask(index, record)
        classes = len(self.class_names)
        return Example(image, labels_of_mask(mask, name, image.shape[:2], classes, True))

    def _mask(self, index: int, record: dict[str, Any]) -> tuple[np.ndarray, str]:
        """Decode the stored values of a mask, and return them with its name."""
        name = f"the mask of {self._record_name(index)}"
        return decode_mask(record["annotation"], name, as_rgb=True), name


def open_ade20k(path: str, split: str | None) -> SceneFolder:
    """Open the scene parsing benchmark of ADE20K, as unpacked from ADEChallengeData2016.zip.

    Args:
      path: the folder `ADEChallengeData2016`, or its parent folder.
      split: 'training' or 'validation'; None for 'validation'.

    Raises:
      UserError: the split does not exist, or the folder has another layout.
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
    """Read class names from a text file with one name per line, in the order of the labels.

    Raises:
      UserError: the file cannot be read, it does not have 2 to 255 names, a line before the last
        name is empty, or a name appears twice.
    """
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
    class indices, counted from 0, or `IGNORED`.

    Args:
      path: the folder.
      split: the name of a split; None for the evaluation split, or if there are no splits.

    Raises:
      UserError: the split does not exist, or the folder has another layout.
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


OPENERS: dict[str, Callable[[str, str | None], SceneSource]] = {
    "digit_scenes": lambda _, split: DigitScenes(split),
    "ade20k:PATH": open_ade20k,
    "folder:PATH": open_scene_folder,
    f"tfds:{ADE20K_BUILDER}": TfdsScenes,
}


def open_scenes(name: str, split: str | None = None) -> SceneSource:
    """Open a split of a segmentation dataset.

    Args:
      name: the dataset, in one of the patterns listed in `OPENERS`, such as digit_scenes or
        folder:PATH.
      split: the name of a split; None for the evaluation split.

    Raises:
      UserError: the name or split is unknown, or the dataset cannot be read.
    """
    return open_by_name(name, split, OPENERS, "data set of scenes")
