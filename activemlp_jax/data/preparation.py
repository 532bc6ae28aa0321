"""Prepare datasets of tensorflow-datasets (TFDS) as shards in ArrayRecord format.

ArrayRecord files allow random access during training. A shard gets its final name only once it is
complete, so after an interruption, another run needs to write only the missing shards.

The `prepare_*` functions write into `data_dir`, a folder of TFDS datasets, and print the result on
`console`. All but `prepare_tfds` also show progress there and write `num_threads` shards at a time.
"""

import hashlib
import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from grain.experimental import TFRecordIterDataset
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

from activemlp_jax.data.base import EVALUATION_SPLITS, check_same_classes
from activemlp_jax.data.folders import FolderSource
from activemlp_jax.data.tfds_source import first_line
from activemlp_jax.utils.errors import UserError, install_command, one_line
from activemlp_jax.utils.files import partial_path, write_aside
from activemlp_jax.utils.json_files import read_json

SHARD_BYTES = 128 * 2**20
PLAN_FILE = "prepared_from.json"
IMAGENET_TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}


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
    """A shard to write to `file`, with `examples` records from `size` bytes of source data."""

    split: str
    file: str
    examples: int
    size: int
    records: Callable[[], Iterable[bytes]]  # serialized examples


def _shard_file(name: str, split: str, index: int, count: int) -> str:
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
            file, size = _shard_file(name, split, index, count), sum(member.size for member in part)
            shards.append(Shard(split, file, len(part), size, partial(serialize, part)))
    return shards


def _write_dataset(
    data_dir: Path,
    name: str,  # 'NAME' or 'NAME/CONFIG'
    version: str,
    features: Any,
    shards: Sequence[Shard],
    num_threads: int,
    console: Console,
) -> None:
    """Write a dataset's missing or incomplete shards, then its metadata, and print the result."""
    directory = data_dir / name / version
    try:
        _claim(directory, shards)
        pool = ThreadPoolExecutor(num_threads)
        try:
            written = pool.map(partial(_write_shard, directory), shards)
            hidden = not console.is_terminal
            for _ in track(
                written, f"writing {name}", len(shards), console=console, disable=hidden
            ):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        counts = _write_metadata(directory, name.partition("/")[0], version, features, shards)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error
    _print_result(counts, name, data_dir, console)


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


def _print_result(counts: Mapping[str, int], name: str, data_dir: Path, console: Console) -> None:
    """Print how many examples each split has, and how to train on them."""
    description = ", ".join(f"{count:,} of {split}" for split, count in counts.items())
    message = (
        f"{name}: {description}, counted; read it with TFDS_DATA_DIR={data_dir} "
        f"and --config.data.name=tfds:{name}"
    )
    console.print(one_line(message), highlight=False, soft_wrap=True, markup=False)


def _index_tar(path: Path) -> list[tuple[str, int, int]]:
    """List name, offset and size of each file in an uncompressed tar file or in a tar inside it."""
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:") as outer:
            for member in filter(tarfile.TarInfo.isfile, outer):
                if not member.name.endswith(".tar"):
                    members.append((member.name, member.offset_data, member.size))
                    continue
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    members += [
                        (image.name, member.offset_data + image.offset_data, image.size)
                        for image in filter(tarfile.TarInfo.isfile, inner)
                    ]
    except Exception as error:  # tarfile can raise anything on a damaged header
        reason = first_line(error)
        raise UserError(f"{path} cannot be read as a tar file: {reason}") from error
    return members


def prepare_imagenet(tars: Path, data_dir: Path, num_threads: int, console: Console) -> None:
    """Build the dataset imagenet2012 from the official tar files in the folder `tars`.

    The image files are copied byte for byte. The labels of the validation images come from
    tensorflow-datasets.

    Raises:
      UserError: a tar file is missing or broken, or has an unexpected number of images or an image
        of an unknown class.
    """
    for file in IMAGENET_TARS.values():
        if not (tars / file).is_file():
            raise UserError(
                f"there is no {tars / file}; get {' and '.join(IMAGENET_TARS.values())} from "
                "https://image-net.org/download-images (they ask you to register)"
            )
    builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
    features = builder.info.features
    label_of = {name: index for index, name in enumerate(features["label"].names)}
    label_file = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    validation_labels = label_file.read_text().split()

    def label(name: str) -> int:
        if match := re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name):
            return label_of[validation_labels[int(match[1]) - 1]]
        return label_of[name.split("_")[0]]

    splits = {}
    for split, file in IMAGENET_TARS.items():
        path = tars / file
        with console.status(escape(one_line(f"looking through {path}"))):
            members = _index_tar(path)
        if len(members) != IMAGENET_COUNTS[split]:
            raise UserError(
                f"{path} holds {len(members):,} images, expected {IMAGENET_COUNTS[split]:,}: is it "
                "the official file, and whole?"
            )
        try:
            splits[split] = [
                Member(str(path), offset, size, name, label(name)) for name, offset, size in members
            ]
        except (KeyError, IndexError) as error:
            raise UserError(f"{path} holds an image of an unknown class: {error}") from error
    shards = plan_shards(builder.name, features, splits)
    version = str(builder.version)
    _write_dataset(data_dir, builder.name, version, features, shards, num_threads, console)


def prepare_folder(
    folder: Path, name: str, data_dir: Path, num_threads: int, console: Console
) -> None:
    """Build the dataset `name` from a folder with one subfolder per class, or per split and class.

    Raises:
      UserError: the name is invalid, the folder has another layout, or splits differ in their
        classes.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"the name is {name!r}, expected lowercase letters, digits and _, such as my_photos"
        )
    present = [split for split in ("train", *EVALUATION_SPLITS) if (folder / split).is_dir()]
    folders = {split: folder / split for split in present} or {"train": folder}
    sources = {split: FolderSource(path) for split, path in folders.items()}
    class_names = next(iter(sources.values())).class_names
    for split, source in sources.items():
        check_same_classes(class_names, source.class_names, f"the split {split} of {folder}")
    splits = {
        split: [
            Member(path, 0, _size(path), f"{class_names[label]}/{Path(path).name}", label)
            for path, label in source.files
        ]
        for split, source in sources.items()
    }
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=class_names),
            "file_name": tfds.features.Text(),
        }
    )
    shards = plan_shards(name, features, splits)
    _write_dataset(data_dir, name, "1.0.0", features, shards, num_threads, console)


def _size(path: str) -> int:
    """Return the size of a regular file in bytes; raise UserError for anything else."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} cannot be read: it is not a regular file")
    return status.st_size


def _tfrecords(file: str) -> Iterator[bytes]:
    """Read the records of a TFRecord file without verifying their checksums."""
    try:
        yield from TFRecordIterDataset(file)
    except Exception as error:  # its message contains all of the bytes
        reason = first_line(error).split(":")[0]
        raise UserError(f"{file} cannot be read: {reason}") from error


def prepare_tfrecord(source: Path, data_dir: Path, num_threads: int, console: Console) -> None:
    """Convert a dataset that tensorflow-datasets prepared as TFRecord files, shard by shard.

    `source` is the folder of one version of the dataset, with `dataset_info.json`.

    Raises:
      UserError: `source` is not such a folder, its files have another format, or the new files
        would go into it.
    """
    if not (source / "dataset_info.json").is_file():
        raise UserError(
            f"{source} has no dataset_info.json; expected the folder of a data set's version, such "
            "as imagenet2012/5.1.0"
        )
    try:
        info = tfds.builder_from_directory(source).info
        features, file_format, splits = info.features, info.file_format.value, list(info.splits)
    except Exception as error:  # TFDS errors have no common base class
        raise UserError(f"{source} cannot be read: {first_line(error)}") from error
    if file_format != "tfrecord":
        raise UserError(f"{source} has {file_format} files, expected tfrecord")
    for name in filter(None, (info.name, info.config_name, *splits)):
        if not re.fullmatch(r"\w[\w.+-]*", name):  # it becomes part of a path
            raise UserError(
                f"{source} has the name {name!r}, expected letters, digits, _, -, . or +"
            )
    full_name = f"{info.name}/{info.config_name}" if info.config_name else info.name
    version = str(info.version)
    if (data_dir / full_name / version).resolve() == source.resolve():
        raise UserError(f"--data-dir is where {source} is; choose another for the new files")
    shards = []
    for split in info.splits.values():
        for index, path in enumerate(split.filepaths):
            file = _shard_file(info.name, split.name, index, split.num_shards)
            length, records = split.shard_lengths[index], partial(_tfrecords, str(path))
            shards.append(Shard(split.name, file, length, _size(str(path)), records))
    _write_dataset(data_dir, full_name, version, features, shards, num_threads, console)


def prepare_tfds(name: str, data_dir: Path, console: Console) -> None:
    """Download and prepare the dataset `name` with TFDS; raise UserError if that fails."""
    if name.split(":")[0] == "imagenet2012":
        raise UserError("imagenet2012 is made of tar files; see prepare_data imagenet2012 --help")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise UserError(
            f"tensorflow-datasets needs TensorFlow to prepare {name}: {install_command('prepare')}"
        ) from error
    except Exception as error:  # TFDS errors have no common base class
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{name} cannot be prepared: {reason}") from error
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    _print_result(counts, name, data_dir, console)
