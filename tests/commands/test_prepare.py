"""`python -m activemlp_jax.prepare_data`: from tar, TFRecord and folders to what training reads."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from commands import error_line
from pictures import encoded, photo, save_odd_images, save_photos
from PIL import Image
from rich.console import Console

from activemlp_jax import prepare_data
from activemlp_jax.data import preparation
from activemlp_jax.data.folders import FolderSource
from activemlp_jax.data.sources import open_source
from activemlp_jax.utils.errors import UserError

WNIDS = ("n01440764", "n01443537", "n15075141")
CONSOLE = Console(quiet=True)


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels), "PNG")


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write tar files in the official layout: two images of three classes, five to validate."""
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, wnid in enumerate(WNIDS):
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for index in range(2):
                    image = photo(10 * number + index, 60, 40)
                    add_file(inner, f"{wnid}_{index}.JPEG", encoded(image))
            add_file(outer, f"{wnid}.tar", inner_file.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (3, 1, 5, 2, 4):
            add_file(tar, f"ILSVRC2012_val_{number:08}.JPEG", encoded(photo(number, 50, 50)))
    monkeypatch.setattr(preparation, "IMAGENET_COUNTS", {"train": 6, "validation": 5})
    return folder


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder in which tensorflow-datasets looks for datasets."""
    folder = tmp_path / "data"
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
    return folder


def test_imagenet_is_built_from_its_tar_files_byte_for_byte(tars: Path, data_dir: Path):
    preparation.prepare_imagenet(tars, data_dir, 2, CONSOLE)
    builder = tfds.builder("imagenet2012")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 6,
        "validation": 5,
    }
    records = builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})
    names = builder.info.features["label"].names
    found = {
        record["file_name"].decode(): (names[record["label"]], record["image"])
        for record in records
    }
    assert found == {
        f"{wnid}_{index}.JPEG": (wnid, encoded(photo(10 * number + index, 60, 40)))
        for number, wnid in enumerate(WNIDS)
        for index in range(2)
    }


def test_validation_images_have_the_labels_of_their_numbers(tars: Path, data_dir: Path):
    preparation.prepare_imagenet(tars, data_dir, 1, CONSOLE)
    source = open_source("tfds:imagenet2012", "validation")
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    records = tfds.data_source("imagenet2012", split="validation")
    for index, record in enumerate(records):
        number = int(record["file_name"][15:23])
        assert source.class_names[source[index].label] == labels[number - 1]


def test_the_real_imagenet_spec_with_mocked_records_is_read(tars: Path, data_dir: Path):
    """The metadata is that of imagenet2012; the records are random ones from mock_data."""
    preparation.prepare_imagenet(tars, data_dir, 1, CONSOLE)
    generator = {}

    def records(builder, split, decoders):
        assert isinstance(decoders["image"], tfds.decode.SkipDecoding), "bytes are asked for"
        fake = tfds.testing.mocking.RandomFakeGenerator(builder.info.features, num_examples=7)
        generator[split] = fake
        examples = [fake[index] for index in range(7)]
        return [
            {**example, "image": png(example["image"]), "file_name": example["file_name"].encode()}
            for example in examples
        ]

    with tfds.testing.mock_data(
        data_dir=str(data_dir),
        policy=tfds.testing.MockPolicy.USE_FILES,
        as_data_source_fn=records,
    ):
        source = open_source("tfds:imagenet2012", "train[:50%]")
        assert len(source.class_names) == 1000
        assert source.class_names[0] == "n01440764"
        assert len(source) == 7
        fake = generator["train[:50%]"]
        for index in range(7):
            image, label = source[index]
            np.testing.assert_array_equal(image, fake[index]["image"])
            assert label == fake[index]["label"]


def test_a_folder_becomes_a_data_set_with_its_classes_and_every_odd_image(
    tmp_path: Path, data_dir: Path
):
    folder = tmp_path / "photos"
    kinds = save_odd_images(folder / "train")
    save_odd_images(folder / "val")
    preparation.prepare_folder(folder, "my_photos", data_dir, 2, CONSOLE)
    original = FolderSource(folder / "train")
    source = open_source("tfds:my_photos", "train")
    assert source.class_names == original.class_names == ("even", "odd")
    assert len(source) == len(kinds) == 9

    def contents(images: list[np.ndarray], labels: list[int]) -> Counter:
        return Counter(
            (image.tobytes(), label) for image, label in zip(images, labels, strict=True)
        )

    ours = [source[index] for index in range(9)]
    theirs = [original[index] for index in range(9)]
    assert contents(*zip(*ours, strict=True)) == contents(*zip(*theirs, strict=True))
    assert len(open_source("tfds:my_photos")) == 9, "the split to evaluate on is 'val'"


def test_examples_are_shuffled_so_that_a_slice_has_all_classes(tmp_path: Path, data_dir: Path):
    save_photos(tmp_path / "photos", ["a", "b", "c"], 20, (40, 40))
    preparation.prepare_folder(tmp_path / "photos", "shuffled", data_dir, 1, CONSOLE)
    source = open_source("tfds:shuffled", "train[:50%]")
    labels = Counter(source[index].label for index in range(len(source)))
    assert sum(labels.values()) == 30
    assert min(labels.values()) >= 5, labels


def write_tfrecord(path: Path, records: list[bytes]) -> None:
    """Write a TFRecord file; its checksums are zeros, for readers that do not check them."""
    with path.open("wb") as file:
        for record in records:
            file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))


@pytest.fixture
def tfrecord_copy(tmp_path: Path) -> Path:
    """Write a dataset of twenty photos in two TFRecord files, in the layout of TFDS."""
    save_photos(tmp_path / "photos", ["a", "b"], 10, (40, 40))
    preparation.prepare_folder(tmp_path / "photos", "copied", tmp_path / "first", 1, CONSOLE)
    there = tmp_path / "first" / "copied" / "1.0.0"
    here = tmp_path / "old" / "copied" / "1.0.0"
    here.mkdir(parents=True)
    (file,) = there.glob("*array_record*")
    reader = ArrayRecordDataSource([str(file)])
    records = [reader[index] for index in range(len(reader))]
    for index in range(2):
        name = f"copied-train.tfrecord-{index:05}-of-00002"
        write_tfrecord(here / name, records[12 * index : 12 + 8 * index])
    info = json.loads((there / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    info["splits"][0]["shardLengths"] = ["12", "8"]
    (here / "dataset_info.json").write_text(json.dumps(info))
    for file in there.iterdir():
        if file.suffix in (".txt",) or file.name == "features.json":
            (here / file.name).write_bytes(file.read_bytes())
    return here


def test_a_tfrecord_copy_is_converted_record_for_record(
    tfrecord_copy: Path, tmp_path: Path, data_dir: Path
):
    preparation.prepare_tfrecord(tfrecord_copy, data_dir, 2, CONSOLE)
    source = open_source("tfds:copied", "train")
    assert len(source) == 20
    original = FolderSource(tmp_path / "photos")
    ours = Counter(source[index].image.tobytes() for index in range(20))
    assert ours == Counter(original[index].image.tobytes() for index in range(20))
    with pytest.raises(UserError, match="has array_record files, expected tfrecord"):
        preparation.prepare_tfrecord(data_dir / "copied" / "1.0.0", tmp_path / "x", 1, CONSOLE)
    with pytest.raises(UserError, match=r"--data-dir is where .* is; choose another"):
        preparation.prepare_tfrecord(tfrecord_copy, tmp_path / "old", 1, CONSOLE)


def test_a_tfrecord_copy_asked_for_in_training_is_told_how_to_convert(
    tfrecord_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfrecord_copy.parents[1]))
    command = rf"prepare_data tfrecord {tfrecord_copy} --data-dir"
    with pytest.raises(UserError, match=rf"tfrecord files, which have no random access.*{command}"):
        open_source("tfds:copied", "train")


def test_a_tfrecord_shard_that_is_cut_short_is_named(tfrecord_copy: Path, data_dir: Path):
    shard = tfrecord_copy / "copied-train.tfrecord-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"tfrecord-00001-of-00002 cannot be read: Not a valid"):
        preparation.prepare_tfrecord(tfrecord_copy, data_dir, 1, CONSOLE)


def test_a_tfrecord_shard_with_fewer_examples_than_described_is_named(
    tfrecord_copy: Path, data_dir: Path
):
    info = tfrecord_copy / "dataset_info.json"
    info.write_text(info.read_text().replace('"8"', '"9"'))
    with pytest.raises(UserError, match=r"record-00001-of-00002 got 8 examples, expected 9"):
        preparation.prepare_tfrecord(tfrecord_copy, data_dir, 1, CONSOLE)
    written = {path.name for path in (data_dir / "copied" / "1.0.0").iterdir()}
    assert written == {"prepared_from.json", "copied-train.array_record-00000-of-00002"}


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000], ids=["empty", "list", "deep"])
def test_a_tfrecord_copy_with_a_damaged_description_is_named(
    name: str, text: str, tfrecord_copy: Path, data_dir: Path
):
    (tfrecord_copy / name).write_text(text)
    with pytest.raises(UserError, match=rf"^{tfrecord_copy} cannot be read: ") as error:
        preparation.prepare_tfrecord(tfrecord_copy, data_dir, 1, CONSOLE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("named", ["data set", "split"])
def test_a_tfrecord_copy_whose_names_lead_elsewhere_is_refused(
    named: str, tfrecord_copy: Path, data_dir: Path
):
    info = tfrecord_copy / "dataset_info.json"
    content = json.loads(info.read_text())
    (content if named == "data set" else content["splits"][0])["name"] = "../out"
    info.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has the name '\.\./out', expected letters"):
        preparation.prepare_tfrecord(tfrecord_copy, data_dir, 1, CONSOLE)
    assert not data_dir.exists()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000], ids=["empty", "cut", "deep"])
def test_a_damaged_record_of_what_was_prepared_is_named(text: str, tmp_path: Path, data_dir: Path):
    save_photos(tmp_path / "photos", ["a", "b"], 1, (40, 40))
    plan = data_dir / "mine" / "1.0.0" / "prepared_from.json"
    plan.parent.mkdir(parents=True)
    plan.write_text(text)
    with pytest.raises(UserError, match=rf"^{plan} is not readable as JSON"):
        preparation.prepare_folder(tmp_path / "photos", "mine", data_dir, 1, CONSOLE)


def test_a_pipe_among_the_photos_is_named(tmp_path: Path, data_dir: Path):
    save_photos(tmp_path / "photos", ["a", "b"], 1, (40, 40))
    os.mkfifo(tmp_path / "photos" / "a" / "pipe.png")
    with pytest.raises(UserError, match=r"a/pipe\.png cannot be read: it is not a regular file"):
        preparation.prepare_folder(tmp_path / "photos", "mine", data_dir, 1, CONSOLE)
    assert not data_dir.exists()


def test_a_data_set_with_a_config_of_its_own_keeps_it(tfrecord_copy: Path, data_dir: Path):
    there = tfrecord_copy.parent / "small" / "1.0.0"
    there.mkdir(parents=True)
    for file in tfrecord_copy.iterdir():
        file.rename(there / file.name)
    info = json.loads((there / "dataset_info.json").read_text())
    (there / "dataset_info.json").write_text(json.dumps(info | {"configName": "small"}))
    preparation.prepare_tfrecord(there, data_dir, 1, CONSOLE)
    assert len(open_source("tfds:copied/small", "train")) == 20
    assert len(open_source("tfds:copied/small:1.0.0", "train[:50%]")) == 10


def test_a_shard_that_a_power_failure_cut_short_is_written_again(tmp_path: Path, data_dir: Path):
    save_photos(tmp_path / "photos", ["a", "b"], 10, (40, 40))
    preparation.prepare_folder(tmp_path / "photos", "mended", data_dir, 1, CONSOLE)
    (shard,) = (data_dir / "mended" / "1.0.0").glob("*-of-00001")
    shard.write_bytes(shard.read_bytes()[:-100])
    preparation.prepare_folder(tmp_path / "photos", "mended", data_dir, 1, CONSOLE)
    source = open_source("tfds:mended", "train")
    assert all(source[index].image.shape == (40, 40, 3) for index in range(20))


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    save_photos(tmp_path / "photos", ["a", "b"], 2, (40, 40))
    lost = tmp_path / "photos" / "b" / "001.JPEG"
    plan = preparation.plan_shards

    def plan_then_lose(*arguments):
        shards = plan(*arguments)
        lost.unlink()
        return shards

    monkeypatch.setattr(preparation, "plan_shards", plan_then_lose)
    with pytest.raises(UserError, match=rf"{lost} cannot be read: No such file"):
        preparation.prepare_folder(tmp_path / "photos", "lost", data_dir, 1, CONSOLE)


def test_a_full_disk_is_said_to_be_full(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    save_photos(tmp_path / "photos", ["a", "b"], 2, (40, 40))
    write = preparation.ArrayRecordFileAdapter.write_examples
    monkeypatch.setattr(
        preparation.ArrayRecordFileAdapter,
        "write_examples",
        lambda _, records: write("/dev/full", records),
    )
    with pytest.raises(UserError, match=r"partial cannot be written: .*No space left on device"):
        preparation.prepare_folder(tmp_path / "photos", "full", data_dir, 1, CONSOLE)


def test_work_that_was_interrupted_goes_on_with_the_shards_that_are_missing(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    save_photos(tmp_path / "photos", ["a", "b"], 20, (60, 60))
    monkeypatch.setattr(preparation, "SHARD_BYTES", 20_000)
    read = preparation.Member.read
    reads: list[str] = []

    def failing_read(member: preparation.Member) -> bytes:
        reads.append(member.name)
        if len(reads) > 25:
            raise KeyboardInterrupt
        return read(member)

    monkeypatch.setattr(preparation.Member, "read", failing_read)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare_folder(tmp_path / "photos", "halved", data_dir, 1, CONSOLE)
    directory = data_dir / "halved" / "1.0.0"
    whole = {path.name for path in directory.glob("*-of-?????")}
    assert whole
    assert not (directory / "dataset_info.json").exists()
    for name in (f".{min(whole)}.partial", ".prepared_from.json.partial"):
        (directory / name).write_text("left by a kill")

    reads.clear()
    monkeypatch.setattr(
        preparation.Member, "read", lambda self: reads.append(self.name) or read(self)
    )
    preparation.prepare_folder(tmp_path / "photos", "halved", data_dir, 1, CONSOLE)
    assert 0 < len(reads) < 40, "what was there is not read again"
    assert len(open_source("tfds:halved", "train")) == 40
    assert not [path.name for path in directory.iterdir() if "partial" in path.name]

    reads.clear()
    preparation.prepare_folder(tmp_path / "photos", "halved", data_dir, 1, CONSOLE)
    assert not reads, "a finished data set is only counted"

    save_photos(tmp_path / "photos" / "more", ["x"], 1, (60, 60))
    (tmp_path / "photos" / "a" / "new.jpg").write_bytes(encoded(photo(3, 60, 60)))
    (tmp_path / "photos" / "more" / "new.jpg").write_bytes(encoded(photo(3, 60, 60)))
    with pytest.raises(UserError, match="was prepared from different files; remove it"):
        preparation.prepare_folder(tmp_path / "photos", "halved", data_dir, 1, CONSOLE)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "activemlp_jax.prepare_data", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_the_command_says_what_it_made_and_how_to_read_it(tmp_path: Path):
    save_photos(tmp_path / "photos", ["a", "b"], 3, (40, 40))
    result = command(
        "folder", str(tmp_path / "photos"), "mine", TFDS_DATA_DIR=str(tmp_path / "data")
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"mine: 6 of train, counted; read it with TFDS_DATA_DIR={tmp_path / 'data'} and "
        "--config.data.name=tfds:mine\n"
    )
    assert "tensorflow" not in result.stderr.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagenet2012", "nothing"), "there is no .*ILSVRC2012_img_train.tar; get"),
        (("tfrecord", "."), r"has no dataset_info\.json; expected the folder of a"),
        (("folder", "nothing", "name"), "there is no folder .*nothing"),
        (("folder", ".", "My Photos"), "the name is 'My Photos', expected lowercase letters"),
        (("folder", ".", "mine", "--num-threads", "0"), "--num-threads is 0, expected at least 1"),
        (("tfds", "imagenet2012"), "see prepare_data imagenet2012 --help"),
        (("tfds", "no_such_set"), "no_such_set cannot be prepared: DatasetNotFoundError"),
    ],
)
def test_wrong_command_lines_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    line = error_line(prepare_data.main, *arguments, "--data-dir", "data")
    assert re.search(message, line), line
    assert not (tmp_path / "data").exists()


def test_tar_files_that_are_not_the_official_ones_are_refused(
    tars: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preparation, "IMAGENET_COUNTS", {"train": 1_281_167, "validation": 50_000})
    with pytest.raises(UserError, match=r"train\.tar holds 6 images, expected 1,281,167"):
        preparation.prepare_imagenet(tars, data_dir, 1, CONSOLE)
    path = tars / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"train\.tar cannot be read as a tar file"):
        preparation.prepare_imagenet(tars, data_dir, 1, CONSOLE)
    path.write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"train\.tar cannot be read as a tar file"):
        preparation.prepare_imagenet(tars, data_dir, 1, CONSOLE)
    assert not data_dir.exists()


def test_a_data_dir_with_other_files_is_left_alone(tmp_path: Path, data_dir: Path):
    save_photos(tmp_path / "photos", ["a", "b"], 1, (40, 40))
    (data_dir / "mine" / "1.0.0").mkdir(parents=True)
    (data_dir / "mine" / "1.0.0" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files of another origin; choose another --data-dir"):
        preparation.prepare_folder(tmp_path / "photos", "mine", data_dir, 1, CONSOLE)
