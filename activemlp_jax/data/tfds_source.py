"""Datasets of tensorflow-datasets (TFDS), read from ArrayRecord files without TensorFlow."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activemlp_jax.data.base import (
    EncodedExample,
    Example,
    decode_example,
    evaluation_split,
)
from activemlp_jax.data.decoding import BrokenImageError, is_turned, warn_of_orientation
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.json_files import read_json

CHECKED_RECORDS = 256  # evenly spaced records that are checked before the first step
PREPARE_COMMAND = "python -m activemlp_jax.prepare_data"
DATA_DIR_HINT = "set the environment variable TFDS_DATA_DIR to the folder of your data sets"


def open_builder(name: str) -> Any:
    """Open the builder `name`, as `tfds.builder` takes it; raise UserError if that fails."""
    import tensorflow_datasets as tfds  # slow to import, and only these datasets need it

    try:
        _check_descriptions(name, map(str, tfds.core.utils.file_utils.list_data_dirs()))
        builder = tfds.builder(name)
        _ = builder.info.features, list(builder.info.splits)  # read from files that may be damaged
        return builder
    except Exception as error:  # TFDS errors have no common base class
        raise UserError(
            f"tfds:{name} cannot be opened: {first_line(error)}; {DATA_DIR_HINT}"
        ) from error


def _check_descriptions(name: str, data_dirs: Iterable[str]) -> None:
    """Raise UserError if a JSON file that describes a prepared dataset is invalid or too large."""
    # TFDS itself would, for example, wait forever if such a file were a pipe.
    builder = name.partition(":")[0].partition("/")[0]
    for data_dir in data_dirs:
        folder = Path(data_dir).expanduser() / builder
        for depth in ("*", "*/*", "*/*/*"):  # also in VERSION/ or CONFIG/VERSION/
            for path in folder.glob(f"{depth}.json"):
                read_json(path)


def first_line(error: Exception) -> str:
    """Return the first line of an error message, because TFDS adds many lines of help."""
    return one_line(str(error).strip().split("\n")[0])[:300] or type(error).__name__


def builder_features(builder: Any) -> dict[str, Any]:
    """Return the features of a builder by name; empty if it has a single unnamed feature."""
    return dict(getattr(builder.info.features, "items", dict)())


class Records:
    """Random access to the records of a split.

    `records[index]` raises BrokenImageError, which names the file, if the record is damaged.

    Args:
      records: a TFDS data source.
      name: the name of the dataset and split in error messages.
      files: the files of the records, in order, and the number of records in each.
    """

    def __init__(self, records: Any, name: str, files: Sequence[tuple[str, int]]):
        self._records = records
        self.name = name
        self._files = files

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

    def evenly_spaced(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Iterate over up to `count` records, skipping damaged ones; raise if all are damaged."""
        indices = np.linspace(0, len(self) - 1, min(len(self), count), dtype=int).tolist()
        readable = False
        for index in indices:
            try:
                record = self[index]
            except BrokenImageError:
                if index == indices[-1] and not readable:
                    raise
                continue
            readable = True
            yield index, record

    def _file(self, index: int) -> str:
        for file, count in self._files:
            if index < count:
                return file
            index -= count
        return "its file"


def open_records(builder: Any, name: str, split: str | None, encoded: Sequence[str]) -> Records:
    """Open the records of a split.

    Args:
      builder: a builder from `open_builder`.
      name: the name of the builder.
      split: a split or slice such as 'train' or 'validation[:10%]'; None for the one to evaluate
        on.
      encoded: features to return as the bytes of their files, without decoding.

    Raises:
      UserError: the dataset is not prepared or is not in ArrayRecord files, the split does not
        exist, or a file is missing.
    """
    import tensorflow_datasets as tfds  # slow to import, and only these datasets need it

    what = f"tfds:{name}"
    splits = list(builder.info.splits)
    if not splits:
        raise UserError(
            f"{what} is not prepared: no files in {builder.data_dir}; prepare it with "
            f"`{_prepare_command(name)}`, or {DATA_DIR_HINT}"
        )
    split = split or evaluation_split(splits, what)
    what += f", split {split!r}"
    try:
        decoders = {feature: tfds.decode.SkipDecoding() for feature in encoded}
        records = builder.as_data_source(split=split, decoders=decoders)
        parts = builder.info.splits[split].file_instructions
    except NotImplementedError as error:
        raise UserError(
            f"{what}, has {builder.info.file_format.value} files, which have no random "
            f"access; make ArrayRecord files of them with `{PREPARE_COMMAND} tfrecord "
            f"{builder.data_dir} --data-dir FOLDER`, and set TFDS_DATA_DIR to FOLDER"
        ) from error
    except Exception as error:  # TFDS errors have no common base class
        raise UserError(f"{what}, cannot be read: {first_line(error)}") from error
    missing = [part.filename for part in parts if not os.path.isfile(part.filename)]
    if missing:
        raise UserError(f"{what}: {len(missing)} of {len(parts)} files are missing: {missing[0]}")
    return Records(records, what, [(part.filename, part.take) for part in parts])


class TfdsSource:
    """A split of an image classification dataset of TFDS, in ArrayRecord files.

    Args:
      name: the name of the builder, optionally with a config and version, as `tfds.builder` takes
        it.
      split: a split or slice such as 'train' or 'validation[:10%]'; None for the one to evaluate
        on.

    Raises:
      UserError: the dataset is unknown, is not prepared, is not in ArrayRecord files, is not for
        image classification, or has a label out of range in one of the checked records.
    """

    def __init__(self, name: str, split: str | None):
        import tensorflow_datasets as tfds  # slow to import, and only these datasets need it

        builder = open_builder(name)
        features = builder_features(builder)
        label = features.get("label")
        if not isinstance(label, tfds.features.ClassLabel) or "image" not in features:
            raise UserError(
                f"tfds:{name} is not for image classification: expected the features 'image' and "
                f"'label', a class, found {', '.join(features) or 'neither'}"
            )
        self._records = open_records(builder, name, split, ["image"])
        self._name = self._records.name
        self.class_names = tuple(label.names)
        checked = turned = 0
        for index, record in self._records.evenly_spaced(CHECKED_RECORDS):
            self._label(index, record)
            checked += 1
            turned += is_turned(record["image"])
        warn_of_orientation(turned, checked, self._name)

    def _label(self, index: int, record: dict[str, Any]) -> int:
        label = int(record["label"])
        if not 0 <= label < len(self.class_names):
            raise UserError(
                f"{self._name}: record {index} has the label {label}, expected 0 to "
                f"{len(self.class_names) - 1}"
            )
        return label

    def __len__(self) -> int:
        return len(self._records)

    def encoded(self, index: int) -> EncodedExample:
        """Read the record at `index`.

        Raises:
          BrokenImageError: the record cannot be read.
          UserError: its label is out of range.
        """
        record = self._records[index]
        label = self._label(index, record)
        file = record.get("file_name", b"").decode("utf-8", "replace")
        return EncodedExample(record["image"], label, f"{self._name}: {file or f'record {index}'}")

    def __getitem__(self, index: int) -> Example:
        return decode_example(self.encoded(index))


def _prepare_command(name: str) -> str:
    builder = name.split(":")[0]
    if builder == "imagenet2012":
        return f"{PREPARE_COMMAND} imagenet2012 FOLDER_OF_THE_TAR_FILES"
    return f"{PREPARE_COMMAND} tfds {builder}"
