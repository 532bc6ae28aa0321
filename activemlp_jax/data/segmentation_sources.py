"""Data sets of scenes, images with a class for every pixel, by name."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from activemlp_jax.data import ade20k
from activemlp_jax.data.base import Example, Source, evaluation_split
from activemlp_jax.data.decoding import MOST_BYTES, decode, open_image, read_image_file
from activemlp_jax.data.digit_scenes import DigitScenes
from activemlp_jax.data.segmentation_transforms import IGNORED
from activemlp_jax.data.sources import (
    look_for_turned,
    no_images,
    scan,
    scan_images,
    sub_folders,
    warn_of_left_out,
)
from activemlp_jax.data.tfds_source import builder_features, open_builder, open_records
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import read_file

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"  # 16 bytes later, bits a pixel and kind of colour
NAMED = 3  # of the images without a mask, so many are named
MOST_NAME_BYTES = 2**20  # of a file with the names of classes
CHECKED_MASKS = 8  # evenly spread, that are looked at before the first step
ADE20K_FOLDER = "ADEChallengeData2016"
ADE20K_SPLITS = ("training", "validation")
ADE20K_BUILDER = "scene_parse150"
KINDS = f"digit_scenes, ade20k:PATH, folder:PATH or tfds:{ADE20K_BUILDER}"


class SceneSource(Source, Protocol):
    """A data set split whose labels are masks `[H, W]` uint8 of its images' sizes.

    A mask has a class a pixel, or `IGNORED`. Reading an index raises BrokenImageError where its
    image cannot be read, and another UserError where its mask cannot.
    """

    def shape(self, index: int) -> tuple[int, int]:
        """The (height, width) of the image at `index`, in pixels, from its header alone."""
        ...

    def image_name(self, index: int) -> str:
        """What to call the image at `index`; no two of a split are called the same."""
        ...


def _image_shape(data: bytes, name: str) -> tuple[int, int]:
    """The (height, width) in an image file's header; BrokenImageError if it has none."""
    with open_image(data, name) as image:
        return image.height, image.width


def decode_mask(data: bytes, name: str, *, as_rgb: bool = False) -> np.ndarray:
    """The values `[H, W]` uint8 of an encoded mask, as they are stored: a palette is not looked up.

    Args:
      data: a file's bytes, of one of the formats that `decode` reads.
      name: for the error.
      as_rgb: three channels are read too, if they are equal.

    Raises:
      UserError: it is no image, or has other than one channel of 8 bits.
    """
    if data.startswith(PNG_MAGIC) and data[25:26] == b"\0" and data[24] in (2, 4):
        # Of grey pixels with fewer bits, Pillow stretches the values.
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
    """The labels `[H, W]` uint8 of a mask: a class a pixel, or `IGNORED`.

    Args:
      mask: `[H, W]` uint8, as stored.
      name: for the error.
      shape: the (height, width) of the image.
      classes: how many there are.
      reduce_zero_label: label 0 is no class, and the classes count from 1.

    Raises:
      UserError: it has another size than the image, or a label that is no class.

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
        none = f"0 or {IGNORED}" if reduce_zero_label else str(IGNORED)
        raise UserError(
            f"{name} has the label {first + classes + beyond[0]}, expected {first} to "
            f"{first + classes - 1} for the {classes} classes, or {none} for none"
        )
    if not reduce_zero_label:
        return mask
    reduced = np.arange(-1, IGNORED)
    reduced[[0, IGNORED]] = IGNORED
    return reduced.astype(np.uint8)[mask]


class SceneFolder:
    """A folder of image files, in the order of their names, and one of their masks, `STEM.png`.

    Args:
      images: the folder of the images.
      masks: the folder of the masks, of one channel or with a palette.
      class_names: by label.
      reduce_zero_label: label 0 is no class, and the classes count from 1.

    Raises:
      UserError: no such folder, no images, or an image without a mask.
    """

    def __init__(
        self, images: Path, masks: Path, class_names: Sequence[str], reduce_zero_label: bool
    ):
        for folder in (images, masks):
            if not os.path.isdir(folder):
                raise UserError(f"there is no folder {folder}")
        self.class_names = tuple(class_names)
        self._reduce_zero_label = reduce_zero_label
        self._masks = masks
        files, left_out = scan_images(images)
        if not files:
            raise no_images(str(images), left_out)
        self._images = [Path(file) for file in files]
        present = {entry.name for entry in scan(masks)}
        missing = [file for file in self._images if f"{file.stem}.png" not in present]
        if missing:
            names = ", ".join(file.name for file in missing[:NAMED])
            more = ", ..." if len(missing) > NAMED else ""
            raise UserError(
                f"{len(missing)} of the {len(self._images)} images in {images} have no mask: "
                f"{names}{more}; expected {masks / missing[0].stem}.png and so on"
            )
        warn_of_left_out(images, left_out)
        look_for_turned(files, images)
        for index in np.linspace(0, len(self) - 1, min(len(self), CHECKED_MASKS), dtype=int):
            self._mask(index)

    def __len__(self) -> int:
        return len(self._images)

    def shape(self, index: int) -> tuple[int, int]:
        """The (height, width) of the image at `index`; BrokenImageError if it has none."""
        file = self._images[index]
        return _image_shape(read_image_file(file), str(file))

    def image_name(self, index: int) -> str:
        """The file name of the image at `index`."""
        return self._images[index].name

    def __getitem__(self, index: int) -> Example:
        """The image and the mask at `index`.

        Raises:
          BrokenImageError: the image cannot be read.
          UserError: the mask cannot, or does not fit the image or the classes.
        """
        file = self._images[index]
        image = decode(read_image_file(file), str(file))
        mask, name = self._mask(index)
        shape, classes = image.shape[:2], len(self.class_names)
        return Example(image, labels_of_mask(mask, name, shape, classes, self._reduce_zero_label))

    def _mask(self, index: int) -> tuple[np.ndarray, str]:
        """The mask at `index` as stored, and its name; UserError if it cannot be read."""
        name = str(self._masks / f"{self._images[index].stem}.png")
        return decode_mask(read_file(name, MOST_BYTES), name), name


class TfdsScenes:
    """A split of the `scene_parse150` of tensorflow-datasets, in ArrayRecord files.

    Its masks have to be those of the scene parsing benchmark, of one channel or, as records made
    from arrays are, of three equal ones. The builder itself fetches those of the instance
    benchmark, of three channels and other classes; they are refused.

    Args:
      name: 'scene_parse150', with a version where wanted, as `tfds.builder` takes it.
      split: such as 'train' or 'test[:10%]'; None for 'test'.

    Raises:
      UserError: it is another data set, not prepared, or not in ArrayRecord files.
    """

    class_names = ade20k.CLASS_NAMES

    def __init__(self, name: str, split: str | None):
        builder = open_builder(name)
        features = builder_features(builder)
        if not {"image", "annotation"} <= features.keys():
            raise UserError(
                f"tfds:{name} is not for segmentation: expected the features 'image' and "
                f"'annotation', found {', '.join(features) or 'neither'}"
            )
        if builder.name != ADE20K_BUILDER:
            raise UserError(
                f"tfds:{name} has classes that are not known here, expected tfds:{ADE20K_BUILDER}"
            )
        self._records = open_records(builder, name, split, ["image", "annotation"])
        self._name = self._records.name
        for index, record in self._records.some(CHECKED_MASKS):
            self._check_mask(index, record["annotation"])

    def _check_mask(self, index: int, data: bytes) -> None:
        try:
            decode_mask(data, f"the mask of {self._what(index)}", as_rgb=True)
        except UserError as error:
            raise UserError(
                f"{error}; tensorflow-datasets itself fetches masks of instances, which are of "
                "other classes: read ADEChallengeData2016 by ade20k:PATH"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def shape(self, index: int) -> tuple[int, int]:
        """The (height, width) of the image at `index`; BrokenImageError if it has none."""
        return _image_shape(self._records[index]["image"], self._what(index))

    def image_name(self, index: int) -> str:
        """What to call the image at `index`, as records have no names."""
        return f"record_{index:05}"

    def _what(self, index: int) -> str:
        return f"{self._name}: record {index}"

    def __getitem__(self, index: int) -> Example:
        """The image and the mask at `index`.

        Raises:
          BrokenImageError: the image cannot be read.
          UserError: the mask cannot, or does not fit the image or the classes.
        """
        record = self._records[index]
        image = decode(record["image"], self._what(index))
        name, classes = f"the mask of {self._what(index)}", len(self.class_names)
        mask = decode_mask(record["annotation"], name, as_rgb=True)
        return Example(image, labels_of_mask(mask, name, image.shape[:2], classes, True))


def open_ade20k(root: Path, split: str | None) -> SceneFolder:
    """A split of ADE20K's scene parsing benchmark, as unpacked from ADEChallengeData2016.zip.

    Args:
      root: the folder `ADEChallengeData2016`, or the one that has it.
      split: 'training' or 'validation'; None for the latter.

    Raises:
      UserError: no such split, or the folder is another.
    """
    split = split or evaluation_split(ADE20K_SPLITS, "ade20k")
    if split not in ADE20K_SPLITS:
        raise UserError(f"ade20k has the splits {', '.join(ADE20K_SPLITS)}, not {split!r}")
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
    """The names in a text file, one a line, in the order of the labels.

    Raises:
      UserError: there is no such file, or it names fewer than two classes, more than 255, none on
        a line between others, or one twice.
    """
    expected = "expected the names of the classes, one a line, in the order of their labels"
    try:
        text = read_file(file, MOST_NAME_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read: it is no text; {expected}") from error
    except UserError as error:
        raise UserError(f"{error}; {expected}") from error
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    if not 2 <= len(names) <= IGNORED:
        raise UserError(f"{file} names {len(names)} classes, expected 2 to {IGNORED}")
    for label, name in enumerate(names):
        if not name:
            raise UserError(f"{file} has no name on line {label + 1}, expected that of a class")
        if name in names[:label]:
            raise UserError(f"{file} names the class {name!r} twice, expected different names")
    return names


def open_scene_folder(root: Path, split: str | None) -> SceneFolder:
    """A folder of scenes: `images`, their masks `annotations`, and `classes.txt`.

    Where the first two have sub-folders, these are the splits. A mask's values are the labels of
    classes, from 0, or `IGNORED`.

    Raises:
      UserError: no such split, or the folder is another.
    """
    images, masks = root / "images", root / "annotations"
    for folder in (root, images, masks):
        if not os.path.isdir(folder):
            raise UserError(
                f"there is no folder {folder}; a folder of scenes has images, annotations and "
                "classes.txt"
            )
    splits = sub_folders(images)
    class_names = read_class_names(root / "classes.txt")
    if not splits:
        if split:
            raise UserError(f"{images} has no folder {split!r}: {root} has no splits")
        return SceneFolder(images, masks, class_names, reduce_zero_label=False)
    split = split or evaluation_split(splits, str(root))
    if split not in splits:
        raise UserError(f"{root} has the splits {', '.join(splits)}, not {split!r}")
    return SceneFolder(images / split, masks / split, class_names, reduce_zero_label=False)


def open_scenes(name: str, split: str | None = None) -> SceneSource:
    """The split of a data set of scenes.

    Args:
      name: 'digit_scenes', 'ade20k:PATH', 'folder:PATH', or 'tfds:scene_parse150'.
      split: of those that the data set has; None for the one to evaluate on.

    Raises:
      UserError: an unknown name or split, or a data set that cannot be read.
    """
    kind, _, rest = name.partition(":")
    if name == "digit_scenes":
        return DigitScenes(split)
    if kind == "ade20k" and rest:
        return open_ade20k(Path(rest).expanduser(), split)
    if kind == "folder" and rest:
        return open_scene_folder(Path(rest).expanduser(), split)
    if kind == "tfds" and rest:
        return TfdsScenes(rest, split)
    raise UserError(f"no data set of scenes {name!r}, expected {KINDS}")
