"""Data sets of tensorflow-datasets, read from ArrayRecord files without TensorFlow."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from activemlp_jax.data.examples import (
    EncodedExample,
    Example,
    decode_example,
    evaluation_split,
)
from activemlp_jax.errors import UserError

CHECKED_LABELS = 256  # records, evenly spread, whose labels are checked before the first step
PREPARE = "python -m activemlp_jax.prepare_data"
WHERE = "set the environment variable TFDS_DATA_DIR to the folder of your data sets"


def open_builder(name: str) -> Any:
    """The builder `name`, as `tfds.builder` takes it; UserError if there is none."""
    import tensorflow_datasets as tfds  # slow to import, and only these data sets need it

    try:
        return tfds.builder(name)
    except Exception as error:  # its kinds of error share no base
        reason = str(error).split("\n")[0]
        raise UserError(f"tfds:{name} cannot be opened: {reason}; {WHERE}") from error


def builder_features(builder: Any) -> dict[str, Any]:
    """The features of a builder by name; none where it has a single one without a name."""
    return dict(getattr(builder.info.features, "items", dict)())


def open_records(
    builder: Any, name: str, split: str | None, encoded: Sequence[str]
) -> tuple[Sequence[dict[str, Any]], str]:
    """Random access to the records of a split, and what to call them in an error.

    Args:
      builder: of `open_builder`.
      name: of the builder.
      split: such as 'train' or 'validation[:10%]'; None for the one to evaluate on.
      encoded: the features to give as the bytes of their files.

    Raises:
      UserError: it is not prepared, not in ArrayRecord files, or has no such split.
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
        return builder.as_data_source(split=split, decoders=decoders), what
    except NotImplementedError as error:
        raise UserError(
            f"{what}, has {builder.info.file_format.value} files, which have no random "
            f"access; make ArrayRecord files of them with `{PREPARE} tfrecord "
            f"{builder.data_dir} --data-dir FOLDER`, and set TFDS_DATA_DIR to FOLDER"
        ) from error
    except (KeyError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{what}, cannot be read: {reason}") from error


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
        self._records, self._name = open_records(builder, name, split, ["image"])
        self.class_names = tuple(label.names)
        count = min(len(self), CHECKED_LABELS)
        for index in np.linspace(0, len(self) - 1, count, dtype=int):
            self._label(int(index), self._records[int(index)])

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
        """The record at `index`; UserError if its label is no class."""
        record = self._records[index]
        label = self._label(index, record)
        file = record.get("file_name", b"").decode()
        return EncodedExample(record["image"], label, f"{self._name}: {file or f'record {index}'}")

    def __getitem__(self, index: int) -> Example:
        return decode_example(self.encoded(index))


def _prepare_command(name: str) -> str:
    builder = name.split(":")[0]
    if builder == "imagenet2012":
        return f"{PREPARE} imagenet2012 FOLDER_OF_THE_TAR_FILES"
    return f"{PREPARE} tfds {builder}"
