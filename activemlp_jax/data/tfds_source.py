"""Datasets of tensorflow-datasets (TFDS), read from ArrayRecord files without TensorFlow."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activemlp_jax.data import ade20k
from activemlp_jax.data.base import CHECKED_MASKS, Example, evaluation_split, evenly_spaced
from activemlp_jax.data.decoding import (
    BrokenImageError,
    decode,
    decode_mask,
    read_shape,
    warn_of_orientation,
)
from activemlp_jax.data.segmentation_transforms import labels_of_mask
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.json_files import read_json

ADE20K_BUILDER = "scene_parse150"
CHECKED_RECORDS = 256  # number of evenly spaced records to check when a dataset is opened
PREPARE_COMMAND = "python -m activemlp_jax.prepare_data"
DATA_DIR_HINT = "set the environment variable TFDS_DATA_DIR to the folder of your data sets"


def open_builder(name: str) -> tuple[Any, dict[str, Any]]:
    """Open the TFDS builder called `name`; return it and a dict of its features.

    Raises:
      UserError: the dataset is unknown, or the files that describe it are damaged.
    """
    import tensorflow_datasets as tfds  # slow to import, and only these datasets need it

    try:
        for data_dir in tfds.core.utils.file_utils.list_data_dirs():
            _check_descriptions(Path(data_dir).expanduser() / name.split(":")[0].split("/")[0])
        builder = tfds.builder(name)
        # Both are read from files, which may be damaged.
        features, _ = builder.info.features, list(builder.info.splits)
        return builder, dict(getattr(features, "items", dict)())  # empty for one unnamed feature
    except Exception as error:  # TFDS errors have no common base class
        raise UserError(
            f"tfds:{name} cannot be opened: {first_line(error)}; {DATA_DIR_HINT}"
        ) from error


def _check_descriptions(folder: Path) -> None:
    """Raise UserError if a JSON file that describes a prepared dataset is invalid or too large."""
    # TFDS itself would, for example, wait forever if such a file were a pipe.
    for depth in ("*", "*/*", "*/*/*"):  # also in VERSION/ or CONFIG/VERSION/
        for path in folder.glob(f"{depth}.json"):
            read_json(path)


def first_line(error: Exception) -> str:
    """Return the first line of an error message, because TFDS adds many lines of help."""
    return one_line(str(error).strip().split("\n")[0])[:300] or type(error).__name__


class Records:
    """Random access to the records of a split.

    `records[index]` raises BrokenImageError, which names the file, if the record is damaged.

    Args:
      builder: a builder from `open_builder`.
      name: the name of the builder.
      split: a split or slice such as 'train' or 'validation[:10%]'; None for the evaluation split.
      encoded: the names of features whose encoded bytes are returned without decoding.

    Raises:
      UserError: the dataset is not prepared or is not in ArrayRecord files, the split does not
        exist, or a file is missing.
    """

    def __init__(self, builder: Any, name: str, split: str | None, encoded: Sequence[str]):
        import tensorflow_datasets as tfds  # slow to import, and only these datasets need it

        splits = list(builder.info.splits)
        if not splits:
            short = name.split(":")[0]
            is_imagenet = short == "imagenet2012"
            source = "imagenet2012 FOLDER_OF_THE_TAR_FILES" if is_imagenet else f"tfds {short}"
            raise UserError(
                f"tfds:{name} is not prepared: no files in {builder.data_dir}; prepare it with "
                f"`{PREPARE_COMMAND} {source}`, or {DATA_DIR_HINT}"
            )
        split = split or evaluation_split(splits, f"tfds:{name}")
        self.name = f"tfds:{name}, split {split!r}"
        try:
            decoders = {feature: tfds.decode.SkipDecoding() for feature in encoded}
            self._records = builder.as_data_source(split=split, decoders=decoders)
            self._files = builder.info.splits[split].file_instructions
        except NotImplementedError as error:
            raise UserError(
                f"{self.name}, has {builder.info.file_format.value} files, which have no random "
                f"access; make ArrayRecord files of them with `{PREPARE_COMMAND} tfrecord "
                f"{builder.data_dir} --data-dir FOLDER`, and set TFDS_DATA_DIR to FOLDER"
            ) from error
        except Exception as error:  # TFDS errors have no common base class
            raise UserError(f"{self.name}, cannot be read: {first_line(error)}") from error
        missing = [file.filename for file in self._files if not os.path.isfile(file.filename)]
        if missing:
            raise UserError(
                f"{self.name}: {len(missing)} of {len(self._files)} files are missing: {missing[0]}"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except Exception as error:  # from ArrayRecord, protocol buffers or TFDS features
            what = f"{self.name}: record {index} cannot be read from {self._file(index)}"
            if "out of bound" in str(error):
                raise UserError(
                    f"{what}: it has fewer records than dataset_info.json says"
                ) from error
            raise BrokenImageError(f"{what}: {first_line(error)}") from error

    def _file(self, index: int) -> str:
        for file in self._files:
            if index < file.take:
                return file.filename
            index -= file.take
        return "its file"

    def some(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Iterate over up to `count` evenly spaced records; skip damaged ones unless all are."""
        readable = False
        indices = evenly_spaced(len(self), count)
        for index in indices:
            try:
                record = self[index]
            except BrokenImageError:
                if index == indices[-1] and not readable:
                    raise
                continue
            readable = True
            yield index, record


class TfdsSource:
    """A split of an image classification dataset of TFDS, read from ArrayRecord files.

    `name` and `split` are those of `Records`.

    Raises:
      UserError: see `Records`; or the dataset is not for image classification, or has a label out
        of range in one of the records that are checked (see `CHECKED_RECORDS`).
    """

    def __init__(self, name: str, split: str | None):
        import tensorflow_datasets as tfds  # slow to import, and only these datasets need it

        builder, features = open_builder(name)
        label = features.get("label")
        if not isinstance(label, tfds.features.ClassLabel) or "image" not in features:
            raise UserError(
                f"tfds:{name} is not for image classification: expected the features 'image' and "
                f"'label', a class, found {', '.join(features) or 'neither'}"
            )
        self._records = Records(builder, name, split, ["image"])
        self.class_names = tuple(label.names)

        def checked() -> Iterator[bytes]:
            for index, record in self._records.some(CHECKED_RECORDS):
                self._label(index, record)
                yield record["image"]

        warn_of_orientation(checked(), self._records.name)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        label = self._label(index, record)
        file = record.get("file_name", b"").decode("utf-8", "replace") or f"record {index}"
        return Example(decode(record["image"], f"{self._records.name}: {file}"), label)

    def _label(self, index: int, record: dict[str, Any]) -> int:
        label, classes = int(record["label"]), len(self.class_names)
        if not 0 <= label < classes:
            raise UserError(
                f"{self._records.name}: record {index} has the label {label}, expected 0 to "
                f"{classes - 1}"
            )
        return label


class TfdsScenes:
    """A split of the TFDS (tensorflow-datasets) dataset `scene_parse150`, in ArrayRecord files.

    The masks must be those of the scene parsing benchmark, with one channel or three equal ones, as
    TFDS writes them from arrays. The TFDS builder itself downloads the masks of the instance
    benchmark; they have three channels and other classes, and this class rejects them.

    Raises:
      UserError: see `Records`; or `name` is another dataset, or one of the masks that are checked
        (see `CHECKED_MASKS`) cannot be used.
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
        return read_shape(self._records[index]["image"], self._record_name(index))

    def _record_name(self, index: int) -> str:
        return f"{self._records.name}: record {index}"

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        image = decode(record["image"], self._record_name(index))
        mask, name = self._mask(index, record)
        classes = len(self.class_names)
        return Example(image, labels_of_mask(mask, name, image.shape[:2], classes, True))

    def _mask(self, index: int, record: dict[str, Any]) -> tuple[np.ndarray, str]:
        """Decode a mask; return its stored values, and its name for messages."""
        name = f"the mask of {self._record_name(index)}"
        return decode_mask(record["annotation"], name, as_rgb=True), name
