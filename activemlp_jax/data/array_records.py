"""Write datasets of tensorflow-datasets (TFDS) as shards in ArrayRecord format.

A shard gets its final name only once it is complete, so after an interruption, another run needs to
write only the missing shards.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track
from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.files import partial_path, write_aside
from activemlp_jax.utils.json_files import read_json

SHARD_BYTES = 128 * 2**20
PLAN_FILE = "prepared_from.json"


class Member(NamedTuple):
    """The image file `name`, which consists of the `size` bytes at `offset` of the file `path`."""

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
    """A shard to write to `file`.

    `records()` yields its serialized examples, of which there are `examples`. `size` is the number
    of bytes of source data.
    """

    split: str
    file: str
    examples: int
    size: int
    records: Callable[[], Iterable[bytes]]


def shard_file(name: str, split: str, index: int, count: int) -> str:
    """Return the file name that TFDS expects for a shard."""
    return f"{name}-{split}.array_record-{index:05}-of-{count:05}"


def plan_shards(name: str, features: Any, splits: Mapping[str, Sequence[Member]]) -> list[Shard]:
    """Divide the image files of each split into shards.

    The files are sorted by a hash of their names, which mixes the classes, so that a slice such as
    'train[:1%]' has images of all classes. `features` has the TFDS features `image`, `label` and
    `file_name`.
    """
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(members: Sequence[Member]) -> Iterator[bytes]:
        for member in members:
            image = io.BytesIO(member.read())
            example = {"image": image, "label": member.label, "file_name": member.name}
            yield serializer.serialize_example(features.encode_example(example))

    shards = []
    for split, members in splits.items():
        shuffled = sorted(members, key=lambda member: hashlib.sha1(member.name.encode()).digest())
        total = sum(member.size for member in members)
        count = min(len(members), max(1, -(-total // SHARD_BYTES)))
        bounds = np.linspace(0, len(members), count + 1).astype(int)
        for index in range(count):
            part = shuffled[bounds[index] : bounds[index + 1]]
            file, size = shard_file(name, split, index, count), sum(member.size for member in part)
            shards.append(Shard(split, file, len(part), size, partial(serialize, part)))
    return shards


def write_dataset(
    data_dir: Path,
    name: str,
    version: str,
    features: Any,
    shards: Sequence[Shard],
    num_threads: int,
    console: Console,
) -> None:
    """Write a dataset's missing or incomplete shards, then its metadata, and print the result.

    Args:
      data_dir: the folder of TFDS datasets.
      name: the name of the dataset, or 'NAME/CONFIG'.
      version: the version of the dataset.
      features: the TFDS features of the dataset.
      shards: all shards of the dataset.
      num_threads: the number of shards to write at the same time.
      console: prints progress and the result.

    Raises:
      UserError: the dataset's folder holds other files, a file cannot be read or written, or a
        shard gets an unexpected number of examples.
    """
    directory = data_dir / name / version
    try:
        _claim(directory, shards)
        pool = ThreadPoolExecutor(num_threads)
        try:
            for _ in track(
                pool.map(partial(_write_shard, directory), shards),
                f"writing {name}",
                len(shards),
                console=console,
                disable=not console.is_terminal,
            ):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        counts = _write_metadata(directory, name.partition("/")[0], version, features, shards)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error
    print_result(counts, name, data_dir, console)


def _claim(directory: Path, shards: Sequence[Shard]) -> None:
    """Reserve `directory` for these shards, or check that an earlier run reserved it for them."""
    plan = {shard.file: [shard.examples, shard.size] for shard in shards}
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


def _write_shard(directory: Path, shard: Shard) -> None:
    path = directory / shard.file
    if path.exists() and _count(path) == shard.examples:
        return
    with write_aside(path) as aside:
        try:
            ArrayRecordFileAdapter.write_examples(aside, enumerate(shard.records()))
        except RuntimeError as error:  # such as a full disk
            raise UserError(f"{aside} cannot be written: {error}") from error
        if (written := _count(aside)) != shard.examples:
            raise UserError(f"{path} got {written} examples, expected {shard.examples}")


def _count(path: Path) -> int:
    """Count the examples in a file; 0 if it is truncated, for example by a power failure."""
    try:
        return ArrayRecordFileAdapter.num_examples(path)
    except RuntimeError:
        return 0


def _write_metadata(
    directory: Path, name: str, version: str, features: Any, shards: Sequence[Shard]
) -> dict[str, int]:
    """Write the metadata that TFDS needs to read the shards; return each split's example count."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, filetype_suffix="array_record"
    )
    splits = {split: [shard for shard in shards if shard.split == split] for split, *_ in shards}
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.examples for shard in parts],
            num_bytes=sum(shard.size for shard in parts),
            filename_template=template.replace(split=split),
        )
        for split, parts in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        version=version,
        filename_template=template,
        check_data=False,  # the check needs TensorFlow
    )
    for path in directory.glob(".*.partial"):
        path.unlink()  # left by a killed process
    return {info.name: info.num_examples for info in infos}


def print_result(counts: Mapping[str, int], name: str, data_dir: Path, console: Console) -> None:
    """Print how many examples each split has, and how to train on them."""
    description = ", ".join(f"{count:,} of {split}" for split, count in counts.items())
    message = (
        f"{name}: {description}, counted; read it with TFDS_DATA_DIR={data_dir} "
        f"and --config.data.name=tfds:{name}"
    )
    console.print(one_line(message), highlight=False, soft_wrap=True, markup=False)
