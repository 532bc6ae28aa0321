"""Data sets of tensorflow-datasets, read from ArrayRecord files without TensorFlow."""

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
from activemlp_jax.data.decoding import BrokenImageError, is_turned, warn_of_turned
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.json_files import read_json

CHECKED_RECORDS = 256  # evenly spread, whose labels are checked before the first step
PREPARE = "python -m activemlp_jax.prepare_data"
WHERE = "set the environment variable TFDS_DATA_DIR to the folder of your data sets"


def open_builder(name: str) -> Any:
    """The builder `name`, as `tfds.builder` takes it; UserError if there is none, or damaged."""
    import tensorflow_datasets as tfds  # slow to import, and only these data sets need it

    try:
        _check_descriptions(name, map(str, tfds.core.utils.file_utils.list_data_dirs()))
        builder = tfds.builder(name)
        _ = builder.info.features, list(builder.info.splits)  # read from files, which may be bad
        return builder
    except Exception as error:  # its kinds of error share no base
        raise UserError(f"tfds:{name} cannot be opened: {first_line(error)}; {WHERE}") from error


def _check_descriptions(name: str, data_dirs: Iterable[str]) -> None:
    """Raises UserError if what describes a prepared data set is not JSON within our limits.

    tensorflow-datasets would wait for a pipe.
    """
    builder = name.partition(":")[0].partition("/")[0]
    for data_dir in data_dirs:
        folder = Path(data_dir).expanduser() / builder
        for depth in ("*", "*/*", "*/*/*"):  # with a version, and perhaps a config before it
            for path in folder.glob(f"{depth}.json"):
                read_json(path)


def first_line(error: Exception) -> str:
    """What an error of tensorflow-datasets says, without its many lines of help."""
    return one_line(str(error).strip().split("\n")[0])[:300] or type(error).__name__


def builder_features(builder: Any) -> dict[str, Any]:
    """The features of a builder by name; none where it has a single one without a name."""
    return dict(getattr(builder.info.features, "items", dict)())


class Records:
    """Random access to the records of a split; `name` is what to call it in an error.

    Reading one that is damaged raises BrokenImageError, which names its file.

    Args:
      records: a data source of tensorflow-datasets.
      name: of data set and split.
      files: the files that have them, in order, and the number of records in each.
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
        except Exception as error:  # of ArrayRecord, protocol buffers, or features
            what = f"{self.name}: record {index} cannot be read from {self._file(index)}"
            if "out of bound" in str(error):
                raise UserError(
                    f"{what}: it has fewer records than dataset_info.json says"
                ) from error
            raise BrokenImageError(f"{what}: {first_line(error)}") from error

    def some(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Up to `count` records, evenly spread, without damaged ones, unless all of them are."""
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
    """The records of a split.

    Args:
      builder: of `open_builder`.
      name: of the builder.
      split: such as 'train' or 'validation[:10%]'; None for the one to evaluate on.
      encoded: the features to give as the bytes of their files.

    Raises:
      UserError: it is not prepared, not in ArrayRecord files, has no such split, or a file is
        missing.
    """
    import tensorflow_datasets as tfds  # slow to import, and only these data sets need it

    what = f"tfds:{name}"
    splits = list(builder.info.splits)
    if not splits:
        raise UserError(
            f"{what} is not prepared: no files in {builder.data_dir}; prepare it with "
            f"`{_prepare_command(name)}`, or {WHERE}"
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
            f"access; make ArrayRecord files of them with `{PREPARE} tfrecord "
            f"{builder.data_dir} --data-dir FOLDER`, and set TFDS_DATA_DIR to FOLDER"
        ) from error
    except Exception as error:  # its kinds of error share no base
        raise UserError(f"{what}, cannot be read: {first_line(error)}") from error
    missing = [part.filename for part in parts if not os.path.isfile(part.filename)]
    if missing:
        raise UserError(f"{what}: {len(missing)} of {len(parts)} files are missing: {missing[0]}")
    return Records(records, what, [(part.filename, part.take) for part in parts])


class TfdsSource:
    """A split of an image classification data set of tensorflow-datasets, in ArrayRecord files.

    Args:
      name: of the builder, with a config and version where wanted, as `tfds.builder` takes it.
      split: such as 'train' or 'validation[:10%]'; None for the one to evaluate on.

    Raises:
      UserError: it is unknown, not prepared, not in ArrayRecord files, of another kind, or has
        labels that are no class.
    """

    def __init__(self, name: str, split: str | None):
        import tensorflow_datasets as tfds  # slow to import, and only these data sets need it

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
        looked_at = turned = 0
        for index, record in self._records.some(CHECKED_RECORDS):
            self._label(index, record)
            looked_at += 1
            turned += is_turned(record["image"])
        warn_of_turned(turned, looked_at, self._name)

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
        """The record at `index`.

        Raises:
          BrokenImageError: it cannot be read; another UserError: its label is no class.
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
        return f"{PREPARE} imagenet2012 FOLDER_OF_THE_TAR_FILES"
    return f"{PREPARE} tfds {builder}"
