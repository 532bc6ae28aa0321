"""Writing of tensorflow-datasets (TFDS) datasets as ArrayRecord files, shard by shard.

A shard gets its final name only once it is complete, so an interrupted run can continue with the
missing shards.
"""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import partial_path, write_aside
from activemlp_jax.utils.json_files import read_json

SHARD_BYTES = 128 * 2**20
PLAN_FILE = "prepared_from.json"


class Member(NamedTuple):
    """An image file named `name`: `size` bytes at `offset` in the file `path`."""

    path: str
    offset: int
    size: int
    name: str
    label: int

    def read(self) -> bytes:
        """Read the bytes of the image file; raise UserError if that fails."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(data) != self.size:
            raise UserError(f"{self.path} ends within {self.name}")
        return data


class Shard(NamedTuple):
    """A file to write.

    `records()` yields the serialized examples, and `examples` is their number. `size` is the size
    of the source data in bytes.
    """

    split: str
    path: Path
    examples: int
    size: int
    records: Callable[[], Iterable[bytes]]


def shard_path(directory: Path, name: str, split: str, index: int, count: int) -> Path:
    """Return the path where TFDS looks for a shard."""
    return directory / f"{name}-{split}.array_record-{index:05}-of-{count:05}"


def plan_shards(
    directory: Path, name: str, features: Any, splits: Mapping[str, Sequence[Member]]
) -> list[Shard]:
    """Divide a dataset of image files into shards.

    The files are shuffled by a hash of their names, so that a slice such as 'train[:1%]' has images
    of all classes.

    Args:
      directory: the folder of the shards.
      name: the name of the dataset.
      features: TFDS features `image`, `label` and `file_name`.
      splits: the image files of each split.
    """
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(members: Sequence[Member]) -> Iterator[bytes]:
        for member in members:
            example = {
                "image": io.BytesIO(member.read()),
                "label": member.label,
                "file_name": member.name,
            }
            yield serializer.serialize_example(features.encode_example(example))

    shards = []
    for split, members in splits.items():
        shuffled = sorted(members, key=lambda member: hashlib.sha1(member.name.encode()).digest())
        size = sum(member.size for member in members)
        count = min(len(members), max(1, -(-size // SHARD_BYTES)))
        bounds = np.linspace(0, len(members), count + 1).astype(int)
        for index in range(count):
            part = shuffled[bounds[index] : bounds[index + 1]]
            shards.append(
                Shard(
                    split,
                    shard_path(directory, name, split, index, count),
                    len(part),
                    sum(member.size for member in part),
                    functools.partial(serialize, part),
                )
            )
    return shards


def claim_directory(directory: Path, shards: Sequence[Shard]) -> None:
    """Reserve `directory` for these shards, or check that an earlier run did.

    Raises:
      UserError: it holds other files, or shards prepared from different files.
    """
    plan = {shard.path.name: [shard.examples, shard.size] for shard in shards}
    path = directory / PLAN_FILE
    if path.exists():
        if read_json(path) != plan:
            raise UserError(
                f"{directory} was prepared from different files; remove it to start again"
            )
    elif directory.exists() and any(file != partial_path(path) for file in directory.iterdir()):
        raise UserError(f"{directory} holds files of another origin; choose another --data-dir")
    else:
        with write_aside(path) as aside:
            aside.write_text(json.dumps(plan) + "\n")


def _is_complete(shard: Shard) -> bool:
    if not shard.path.exists():
        return False
    try:
        return ArrayRecordFileAdapter.num_examples(shard.path) == shard.examples
    except RuntimeError:  # truncated, for example by a power failure
        return False


def write_shards(shards: Sequence[Shard], num_threads: int, advance: Callable[[int], None]) -> None:
    """Write the shards that are missing or incomplete.

    Args:
      shards: all shards of the dataset.
      num_threads: the number of shards to write at the same time.
      advance: called with a number of examples that have just been written, or that a complete
        shard already holds.

    Raises:
      UserError: a file cannot be read or written, or a shard gets an unexpected number of examples.
    """

    def write(shard: Shard) -> None:
        if _is_complete(shard):
            advance(shard.examples)
            return
        written = 0

        def records() -> Iterator[tuple[int, bytes]]:
            nonlocal written
            for record in shard.records():
                yield written, record
                written += 1
                advance(1)

        with write_aside(shard.path) as aside:
            try:
                ArrayRecordFileAdapter.write_examples(aside, records())
            except RuntimeError as error:  # such as a full disk
                raise UserError(f"{aside} cannot be written: {error}") from error
            if written != shard.examples:
                raise UserError(f"{shard.path} got {written} examples, expected {shard.examples}")

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(write, shard) for shard in shards]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def finish(
    directory: Path, name: str, version: str, features: Any, shards: Sequence[Shard]
) -> dict[str, int]:
    """Count the examples, and write the metadata that TFDS needs to read the shards.

    Returns:
      The number of examples of each split.

    Raises:
      UserError: a shard does not hold the expected number of examples.
    """
    counts: dict[str, int] = {}
    for shard in shards:
        if not _is_complete(shard):
            raise UserError(f"{shard.path} does not hold its {shard.examples} examples; run again")
        counts[shard.split] = counts.get(shard.split, 0) + shard.examples
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,
        dataset_name=name,
        filetype_suffix="array_record",
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.examples for shard in shards if shard.split == split],
            num_bytes=sum(shard.size for shard in shards if shard.split == split),
            filename_template=template.replace(split=split),
        )
        for split in counts
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        version=version,
        filename_template=template,
        check_data=False,  # the check needs TensorFlow
    )
    for path in (directory / PLAN_FILE, *(shard.path for shard in shards)):
        partial_path(path).unlink(missing_ok=True)  # left by a killed process
    return counts
