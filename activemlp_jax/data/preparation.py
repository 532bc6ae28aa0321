"""Preparation of datasets as ArrayRecord files, which allow random access during training."""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from grain.experimental import TFRecordIterDataset
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from activemlp_jax.data.array_records import (
    Member,
    Shard,
    claim_directory,
    finish,
    plan_shards,
    shard_path,
    write_shards,
)
from activemlp_jax.data.base import check_same_classes
from activemlp_jax.data.sources import FolderSource
from activemlp_jax.data.tfds_source import first_line
from activemlp_jax.utils.errors import UserError, install_command, one_line

IMAGENET_TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}
FOLDER_SPLITS = ("train", "val", "validation", "test")


def index_tar(path: Path) -> list[tuple[str, int, int]]:
    """List the name, offset and size of each file in an uncompressed tar file and its inner tars.

    Raises:
      UserError: it is not a tar file, or is truncated.
    """
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:") as outer:
            for member in outer:
                if not member.isfile():
                    continue
                if not member.name.endswith(".tar"):
                    members.append((member.name, member.offset_data, member.size))
                    continue
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    members += [
                        (image.name, member.offset_data + image.offset_data, image.size)
                        for image in inner
                        if image.isfile()
                    ]
    except Exception as error:  # tarfile can raise anything on a damaged header
        reason = first_line(error)
        raise UserError(f"{path} cannot be read as a tar file: {reason}") from error
    return members


def prepare_imagenet(tars: Path, data_dir: Path, num_threads: int, console: Console) -> None:
    """Build imagenet2012 from the official tar files.

    The image files are copied byte for byte. The labels of the validation images come from
    tensorflow-datasets.

    Args:
      tars: the folder with the tar files.
      data_dir: the folder of TFDS datasets to write into.
      num_threads: the number of threads that write.
      console: prints progress and the result.

    Raises:
      UserError: a tar file is missing, is broken, or has an unexpected number of images.
    """
    for file in IMAGENET_TARS.values():
        if not (tars / file).is_file():
            raise UserError(
                f"there is no {tars / file}; get {' and '.join(IMAGENET_TARS.values())} from "
                "https://image-net.org/download-images (they ask you to register)"
            )
    builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
    label_of = {name: index for index, name in enumerate(builder.info.features["label"].names)}
    validation_labels = (
        tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    )

    def wnid(name: str) -> str:
        if match := re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name):
            return validation_labels[int(match[1]) - 1]
        return name.split("_")[0]

    splits = {}
    for split, file in IMAGENET_TARS.items():
        path = tars / file
        with console.status(escape(one_line(f"looking through {path}"))):
            members = index_tar(path)
        if len(members) != IMAGENET_COUNTS[split]:
            raise UserError(
                f"{path} holds {len(members):,} images, expected {IMAGENET_COUNTS[split]:,}: is it "
                "the official file, and whole?"
            )
        try:
            splits[split] = [
                Member(str(path), offset, size, name, label_of[wnid(name)])
                for name, offset, size in members
            ]
        except (KeyError, IndexError) as error:
            raise UserError(f"{path} holds an image of an unknown class: {error}") from error
    features, version = builder.info.features, str(builder.version)
    write_images("imagenet2012", version, features, splits, data_dir, num_threads, console)


def prepare_folder(
    folder: Path, name: str, data_dir: Path, num_threads: int, console: Console
) -> None:
    """Build a dataset from a folder of class folders, or from one that has such a folder per split.

    Args:
      folder: the folder of images.
      name: the name of the new dataset.
      data_dir: the folder of TFDS datasets to write into.
      num_threads: the number of threads that write.
      console: prints progress and the result.

    Raises:
      UserError: the name or the folder has the wrong form, or splits differ in their classes.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"the name is {name!r}, expected lowercase letters, digits and _, such as my_photos"
        )
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    present = [split for split in FOLDER_SPLITS if (folder / split).is_dir()]
    sources = {split: FolderSource(folder / split) for split in present}
    sources = sources or {"train": FolderSource(folder)}
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
    write_images(name, "1.0.0", features, splits, data_dir, num_threads, console)


def _size(path: str) -> int:
    """Return the size of a regular file in bytes; raise UserError for anything else."""
    if not os.path.isfile(path):
        raise UserError(f"{path} cannot be read: it is not a regular file")
    return os.path.getsize(path)


def write_images(
    name: str,
    version: str,
    features: Any,
    splits: dict[str, list[Member]],
    data_dir: Path,
    num_threads: int,
    console: Console,
) -> None:
    """Write the image files of each split as the TFDS dataset `name` in `data_dir`."""
    directory = data_dir / name / version
    shards = plan_shards(directory, name, features, splits)
    counts = write_and_finish(directory, name, version, features, shards, num_threads, console)
    _print_result(counts, name, data_dir, console)


def _tfrecords(file: str) -> Iterator[bytes]:
    """Read the records of a TFRecord file without verifying their checksums."""
    try:
        yield from TFRecordIterDataset(file)
    except Exception as error:  # its message contains all of the bytes
        reason = first_line(error).split(":")[0]
        raise UserError(f"{file} cannot be read: {reason}") from error


def prepare_tfrecord(source: Path, data_dir: Path, num_threads: int, console: Console) -> None:
    """Convert a dataset that tensorflow-datasets prepared as TFRecord files, shard by shard.

    Args:
      source: the folder of one version of the dataset, with `dataset_info.json`.
      data_dir: the folder of TFDS datasets to write into; not the one that `source` is in.
      num_threads: the number of threads that write.
      console: prints progress and the result.

    Raises:
      UserError: it is not such a folder, or its files have another format.
    """
    if not (source / "dataset_info.json").is_file():
        raise UserError(
            f"{source} has no dataset_info.json; expected the folder of a data set's version, such "
            "as imagenet2012/5.1.0"
        )
    try:
        info = tfds.builder_from_directory(source).info
        _ = info.features, info.file_format.value, list(info.splits)
    except Exception as error:  # TFDS errors have no common base class
        raise UserError(f"{source} cannot be read: {first_line(error)}") from error
    if info.file_format.value != "tfrecord":
        raise UserError(f"{source} has {info.file_format.value} files, expected tfrecord")
    for name in filter(None, (info.name, info.config_name, *info.splits)):
        if not re.fullmatch(r"\w[\w.+-]*", name):  # it becomes part of a path
            raise UserError(
                f"{source} has the name {name!r}, expected letters, digits, _, -, . or +"
            )
    full_name = f"{info.name}/{info.config_name}" if info.config_name else info.name
    directory = data_dir / full_name / str(info.version)
    if directory.resolve() == source.resolve():
        raise UserError(f"--data-dir is where {source} is; choose another for the new files")

    shards = []
    for split in info.splits.values():
        for index, file in enumerate(split.filepaths):
            try:
                size = os.path.getsize(file)
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}") from error
            shards.append(
                Shard(
                    split.name,
                    shard_path(directory, info.name, split.name, index, split.num_shards),
                    split.shard_lengths[index],
                    size,
                    partial(_tfrecords, str(file)),
                )
            )
    version = str(info.version)
    counts = write_and_finish(
        directory, info.name, version, info.features, shards, num_threads, console
    )
    _print_result(counts, full_name, data_dir, console)


def prepare_tfds(name: str, data_dir: Path, console: Console) -> None:
    """Download and prepare a dataset with tensorflow-datasets.

    Args:
      name: the name of the dataset, as `tfds.builder` takes it.
      data_dir: the folder of TFDS datasets to write into.
      console: prints the result.

    Raises:
      UserError: the dataset cannot be prepared.
    """
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


def write_and_finish(
    directory: Path,
    name: str,
    version: str,
    features: Any,
    shards: Sequence[Shard],
    num_threads: int,
    console: Console,
) -> dict[str, int]:
    """Write `shards` with a progress bar, then their metadata; count the examples of each split."""
    try:
        claim_directory(directory, shards)
        with Progress(
            TextColumn(f"writing {name}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress:
            task = progress.add_task("", total=sum(shard.examples for shard in shards))
            write_shards(shards, num_threads, lambda count: progress.advance(task, count))
        return finish(directory, name, version, features, shards)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error


def _print_result(counts: dict[str, int], name: str, data_dir: Path, console: Console) -> None:
    description = ", ".join(f"{count:,} of {split}" for split, count in counts.items())
    console.print(
        one_line(
            f"{name}: {description}, counted; read it with TFDS_DATA_DIR={data_dir} "
            f"and --config.data.name=tfds:{name}"
        ),
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
