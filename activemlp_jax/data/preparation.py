"""Prepare datasets as ArrayRecord files, which allow random access during training.

The `prepare_*` functions write into `data_dir`, a folder of TFDS datasets, and print the result on
`console`. All but `prepare_tfds` also show progress there and write `num_threads` shards at a time.
"""

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import tensorflow_datasets as tfds
from grain.experimental import TFRecordIterDataset
from rich.console import Console
from rich.markup import escape

from activemlp_jax.data.array_records import (
    Member,
    Shard,
    plan_shards,
    print_result,
    shard_file,
    write_dataset,
)
from activemlp_jax.data.base import EVALUATION_SPLITS, check_same_classes
from activemlp_jax.data.sources import FolderSource
from activemlp_jax.data.tfds_source import first_line
from activemlp_jax.utils.errors import UserError, install_command, one_line

IMAGENET_TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}


def index_tar(path: Path) -> list[tuple[str, int, int]]:
    """List name, offset and size of each file in an uncompressed tar file or in a tar inside it.

    Raises:
      UserError: the file is not a tar file, or is truncated.
    """
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
    validation_labels = (
        tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    )

    def label(name: str) -> int:
        if match := re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name):
            return label_of[validation_labels[int(match[1]) - 1]]
        return label_of[name.split("_")[0]]

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
                Member(str(path), offset, size, name, label(name)) for name, offset, size in members
            ]
        except (KeyError, IndexError) as error:
            raise UserError(f"{path} holds an image of an unknown class: {error}") from error
    shards = plan_shards(builder.name, features, splits)
    version = str(builder.version)
    write_dataset(data_dir, builder.name, version, features, shards, num_threads, console)


def prepare_folder(
    folder: Path, name: str, data_dir: Path, num_threads: int, console: Console
) -> None:
    """Build the dataset `name` from a folder with one folder of images per class.

    It may instead have one such folder per split.

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
    write_dataset(data_dir, name, "1.0.0", features, shards, num_threads, console)


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
            file = shard_file(info.name, split.name, index, split.num_shards)
            length, records = split.shard_lengths[index], partial(_tfrecords, str(path))
            shards.append(Shard(split.name, file, length, _size(str(path)), records))
    write_dataset(data_dir, full_name, version, features, shards, num_threads, console)


def prepare_tfds(name: str, data_dir: Path, console: Console) -> None:
    """Download and prepare the dataset `name` with tensorflow-datasets.

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
    print_result(counts, name, data_dir, console)
