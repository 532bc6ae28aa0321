"""Datasets: the digits, folders of images, and ArrayRecord files of tensorflow-datasets."""

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import encoded, photo, save_odd_images
from PIL import Image

from activemlp_jax.data.base import check_same_classes
from activemlp_jax.data.decoding import BrokenImageError
from activemlp_jax.data.loader import Skipped, eval_batches, train_batches
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sources import open_source
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.training.config import default_config
from activemlp_jax.utils.errors import UserError


def picture(value: int, height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, np.uint8))


def png(value: int) -> io.BytesIO:
    file = io.BytesIO()
    picture(value).save(file, "PNG")
    file.seek(0)
    return file


def save_classes(folder: Path, classes: dict[str, list[int]]) -> None:
    """Save one folder per class, with a single-colored picture for each value."""
    for name, values in classes.items():
        (folder / name).mkdir(parents=True)
        for value in values:
            picture(value).save(folder / name / f"{value:03}.png")


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """A dataset of two classes with five pictures to train and three to validate."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["disc", "ring"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> Any:
        del dl_manager
        return {"train": self._generate_examples(5), "validation": self._generate_examples(3)}

    def _generate_examples(self, count: int) -> Any:
        for index in range(count):
            yield index, {"image": png(50 * index), "label": index % 2}


class TinyUnlabelled(TinyShapes):
    """A dataset whose validation split has no labels (-1), like some test sets."""

    def _generate_examples(self, count: int) -> Any:
        for index in range(count):
            yield index, {"image": png(50 * index), "label": -1 if count == 3 else index % 2}


class TinyText(TinyShapes):
    def _info(self) -> Any:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self, count: int) -> Any:
        for index in range(count):
            yield index, {"text": "words"}


@pytest.fixture
def tfds_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepare `tiny_shapes` and similar datasets where tensorflow-datasets looks for them."""
    for builder in (TinyShapes, TinyText, TinyUnlabelled):
        builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    return tmp_path


def test_digits_are_split_by_writer():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    image, label = train[0]
    assert (image.shape, image.dtype, label) == ((32, 32, 3), np.uint8, 0)
    assert [test[i].label for i in range(5)] == [2, 3, 4, 5, 6]
    assert image.max() > 200
    assert image.min() == 0
    assert len(open_source("digits")) == 360, "the split to evaluate on is 'test'"


def test_a_folder_of_class_folders_is_read_in_the_order_of_names(tmp_path: Path):
    save_classes(tmp_path, {"dog": [3, 1], "cat": [7]})
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("no class")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("cat", "dog")
    assert [(int(image[0, 0, 0]), label) for image, label in map(source.__getitem__, range(3))] == [
        (7, 0),
        (1, 1),
        (3, 1),
    ]
    assert source[0].image.shape == (20, 30, 3)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_a_folder_with_splits_is_evaluated_on_the_one_meant_for_it(name: str, tmp_path: Path):
    save_classes(tmp_path / "train", {"a": [1, 2], "b": [3]})
    save_classes(tmp_path / name, {"a": [5], "b": [6]})
    assert len(open_source(f"folder:{tmp_path}")) == 2
    assert len(open_source(f"folder:{tmp_path}", "train")) == 3


def test_every_odd_image_of_a_folder_is_read_trained_on_and_evaluated(tmp_path: Path):
    kinds = save_odd_images(tmp_path)
    source = open_source(f"folder:{tmp_path}")
    config = default_config()
    config.update_from_flattened_dict(
        {
            "batch_size": len(kinds),
            "augment.policy": "random_resized_crop",
            "augment.rand_augment": "rand-m9-mstd0.5-inc1",
        }
    )
    for index in range(len(kinds)):
        image = source[index].image
        file, _ = source.files[index]
        size = (1, 1, 3) if "tiny" in file else (60, 90, 3)
        assert (image.shape, image.dtype) == (size, np.uint8), file
    train = train_batches(source, Classification.transform, config, first_step=0, last_step=3)
    preprocessing = Preprocessing(image_size=32)
    test = eval_batches(source, preprocessing, len(kinds), num_threads=1)
    with contextlib.closing(train), contextlib.closing(test):
        for batch in (*train, *test):
            assert batch["image"].shape == (len(kinds), 32, 32, 3)
            assert sorted(batch["label"]) == [0] * 5 + [1] * 4


def test_sample_photos_are_jpeg_files_of_a_thousand_classes():
    source = open_source("photos:2500")
    assert len(source) == 2500
    image, label = source[1234]
    assert (image.shape, label, source.class_names[label]) == ((375, 500, 3), 234, "234")
    assert len(set(source.files)) == 64
    assert 80_000 < np.mean(list(map(len, source.files))) < 150_000, "about as large as ImageNet's"


def test_a_broken_image_is_named(tmp_path: Path):
    save_classes(tmp_path, {"a": [1], "b": [2]})
    file = tmp_path / "b" / "002.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} is not a readable image"):
        open_source(f"folder:{tmp_path}")[1]
    source = open_source(f"folder:{tmp_path}")
    file.unlink()
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} cannot be read: No such file"):
        source[1]


def test_a_pipe_a_device_and_a_folder_among_the_images_are_broken_images(tmp_path: Path):
    save_classes(tmp_path, {"a": [1], "b": [2]})
    os.mkfifo(tmp_path / "a" / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "a" / "zero.png")
    (tmp_path / "a" / "folder.png").mkdir()
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == 5
    for index in (1, 2, 3):
        with pytest.raises(BrokenImageError, match=r"(folder|pipe|zero)\.png (is|cannot be read)"):
            source[index]


def test_images_of_other_kinds_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_classes(tmp_path, {"a": [1, 3], "b": [2]})
    for name in ("a/1.HEIC", "a/1.txt", "a/.2.heic", "a/Thumbs.db", "b/\x1b[31m.jxl"):
        (tmp_path / name).write_bytes(b"")
    for number, kind in enumerate(("JPEG", "AVIF", "JPEG2000")):
        suffix = ("jfif", "AVIF", "jp2")[number]
        (tmp_path / "b" / f"{number}.{suffix}").write_bytes(encoded(photo(number, 30, 20), kind))
    source = open_source(f"folder:{tmp_path}")
    assert [source[index].image.shape for index in range(6)] == [(20, 30, 3)] * 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{tmp_path}: 2 files left out: a/1.HEIC, b/?[31m.jxl (not read: .heic, .jxl; convert to "
        "JPEG or PNG)"
    )
    for file in (tmp_path / "a").glob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match=r"a has no images, expected .bmp, .*1\.HEIC"):
        open_source(f"folder:{tmp_path}")


def test_orientations_that_are_not_applied_are_counted_when_a_folder_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_odd_images(tmp_path)  # one of the nine images has an orientation
    open_source(f"folder:{tmp_path}")
    expected = "1 of 9 images looked at carry an EXIF orientation, which is not applied"
    assert capsys.readouterr().err == f"{tmp_path}: {expected}\n"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_classes(tmp_path, {"a": [1], "b": [2]})
    os.symlink(tmp_path / "circle", tmp_path / "circle")
    assert len(open_source(f"folder:{tmp_path}")) == 2
    with pytest.raises(UserError, match="there is no folder xxx"):
        open_source(f"folder:{'x' * 300}")
    scan = os.scandir

    def refuse(folder: Path) -> Any:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"{tmp_path}/b cannot be read: Permission denied"):
        open_source(f"folder:{tmp_path}")


def test_tfds_splits_are_read_from_array_record_files(tfds_folder: Path):
    del tfds_folder
    source = open_source("tfds:tiny_shapes", "train")
    assert source.class_names == ("disc", "ring")
    examples = [source[index] for index in range(len(source))]
    assert sorted((int(image[0, 0, 0]), label) for image, label in examples) == [
        (0, 0),
        (50, 1),
        (100, 0),
        (150, 1),
        (200, 0),
    ]
    assert len(open_source("tfds:tiny_shapes:1.0.0")) == 3, "the split is 'validation'"
    assert len(open_source("tfds:tiny_shapes", "train[:40%]")) == 2


def test_imagenet_that_is_not_prepared_is_said_to_be_missing(tfds_folder: Path):
    command = "prepare_data imagenet2012 FOLDER_OF_THE_TAR_FILES"
    message = rf"imagenet2012 is not prepared: no .* {tfds_folder}/im.*{command}"
    with pytest.raises(UserError, match=message):
        open_source("tfds:imagenet2012", "validation")
    with pytest.raises(UserError, match=r"beans is not prepared: .*prepare_data tfds beans"):
        open_source("tfds:beans", "validation")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("tfds:tiny_shapes", "tets", "split 'tets', cannot be read"),
        ("tfds:tiny_shapes", "train[:0%]", r"split 'train\[:0%\]', cannot be read"),
        ("tfds:tiny_shapes:9.9.9", None, r"tiny_shapes:9\.9\.9 cannot be opened.*TFDS_DATA_DIR"),
        ("tfds:tiny_shape", None, "tiny_shape cannot be opened.*TFDS_DATA_DIR"),
        ("tfds:tiny_unlabelled", None, "record 0 has the label -1, expected 0 to 1"),
        ("photos:none", None, "no data set 'photos:none', expected"),
        ("tfds:tiny_text", None, "not for image classification.*found text"),
        ("imagnet", "train", "no data set 'imagnet', expected digits, folder:PATH, tfds:NAME or"),
        ("folder:", None, "no data set 'folder:', expected"),
        ("digits", "val", "digits has the splits train, test, not 'val'"),
    ],
)
def test_a_wrong_name_or_split_is_named(
    name: str, split: str | None, message: str, tfds_folder: Path
):
    del tfds_folder
    with pytest.raises(UserError, match=message) as error:
        open_source(name, split)
    assert "\n" not in str(error.value)


def test_a_pipe_in_place_of_a_description_is_not_waited_for(tfds_folder: Path):
    features = tfds_folder / "tiny_shapes" / "1.0.0" / "features.json"
    features.unlink()
    os.mkfifo(features)
    with pytest.raises(UserError, match=rf"^tfds:tiny_shapes .*{features} is a pipe"):
        open_source("tfds:tiny_shapes", "train")


def test_a_folder_that_is_no_data_set_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no folder .*nothing"):
        open_source(f"folder:{tmp_path / 'nothing'}")
    save_classes(tmp_path, {"only": [1]})
    with pytest.raises(UserError, match="has 1 class folders, expected two or more"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*empty has no images"):
        open_source(f"folder:{tmp_path}")
    with pytest.raises(UserError, match=r"there is no folder .*val"):
        open_source(f"folder:{tmp_path}", "val")


def test_other_classes_are_named():
    check_same_classes(("a", "b"), ("a", "b"), "the set")
    with pytest.raises(UserError, match="the set has 1 classes, expected 2"):
        check_same_classes(("a", "b"), ("a",), "the set")
    with pytest.raises(UserError, match="class 1 of the set is 'c', expected 'b'"):
        check_same_classes(("a", "b"), ("a", "c"), "the set")


def shard_of(folder: Path, split: str = "train") -> Path:
    (file,) = folder.glob(f"tiny_shapes/1.0.0/tiny_shapes-{split}.array_record-*")
    return file


def change(place: int, *, cut: bool = False) -> Callable[[Path], None]:
    """Return a function that cuts a file at byte `place`, or flips that byte."""

    def apply(file: Path) -> None:
        data = bytearray(file.read_bytes())
        if cut:
            del data[place:]
        else:
            data[place] ^= 0xFF
        file.write_bytes(data)

    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        change(0, cut=True),
        change(100, cut=True),
        change(2**17 - 1, cut=True),
        change(2**16),
        lambda file: file.write_bytes(bytes(2**17)),
        lambda file: file.write_bytes(file.read_bytes() + b"more"),
    ],
)
def test_a_damaged_array_record_file_is_named(spoil: Callable[[Path], Any], tfds_folder: Path):
    file = shard_of(tfds_folder)
    spoil(file)
    with pytest.raises(UserError, match=rf"tfds:tiny_shapes, split 'train'.*{file}") as error:
        open_source("tfds:tiny_shapes", "train")
    assert "\n" not in str(error.value)


def test_a_damaged_record_is_a_broken_image(tfds_folder: Path):
    file = shard_of(tfds_folder)
    change(70)(file)  # a byte of the first of the five records
    source = open_source("tfds:tiny_shapes", "train")
    with pytest.raises(BrokenImageError, match=rf"record 0 cannot be read from {file}: Corrupted"):
        source[0]
    config = default_config()
    config.update_from_flattened_dict({"batch_size": 5, "data.on_error": "skip"})
    said: list[str] = []
    skipped, transform = Skipped(1, said.append), Classification.transform
    batches = train_batches(source, transform, config, first_step=0, last_step=2, skipped=skipped)
    with contextlib.closing(batches):
        assert [batch["image"].shape for batch in batches] == [(5, 32, 32, 3)] * 2
    assert len(said) == 1


def test_a_file_with_fewer_records_than_described_is_named(tfds_folder: Path):
    file = shard_of(tfds_folder)
    info = tfds_folder / "tiny_shapes" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"5"', '"5000"'))
    with pytest.raises(UserError, match=rf"{file}: it has fewer records than dataset_info\.json"):
        open_source("tfds:tiny_shapes", "train")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize(
    "text",
    ["", "{}", "null", '{"a": ', "[" * 100_000],
    ids=["empty", "no keys", "null", "cut", "deep"],
)
def test_a_damaged_description_is_named(name: str, text: str, tfds_folder: Path):
    """The dataset has no builder code, like those that prepare_data writes."""
    folder = (tfds_folder / "tiny_shapes").rename(tfds_folder / "pictures") / "1.0.0"
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"name": "tiny_shapes"', '"name": "pictures"'))
    for file in folder.glob("tiny_shapes-*"):
        file.rename(folder / file.name.replace("tiny_shapes", "pictures"))
    assert len(open_source("tfds:pictures", "train")) == 5
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=r"^tfds:pictures") as error:
        open_source("tfds:pictures", "train")
    assert "\n" not in str(error.value)
