"""Data sets: the digits, folders of images, and ArrayRecord files of tensorflow-datasets."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import save_odd_images
from PIL import Image

from activemlp_jax.data.examples import check_same_classes
from activemlp_jax.data.pipeline import eval_batches, train_batches
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sources import open_source
from activemlp_jax.errors import UserError
from activemlp_jax.training.config import default_config


def picture(value: int, height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, np.uint8))


def png(value: int) -> io.BytesIO:
    file = io.BytesIO()
    picture(value).save(file, "PNG")
    file.seek(0)
    return file


def save_classes(folder: Path, classes: dict[str, list[int]]) -> None:
    """A class folder a name, with an even picture for every value."""
    for name, values in classes.items():
        (folder / name).mkdir(parents=True)
        for value in values:
            picture(value).save(folder / name / f"{value:03}.png")


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Five pictures to train, three to validate, in two classes."""

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
    """The validation split's labels are those of a test set: none."""

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
    """Where tensorflow-datasets looks for data sets; holds `tiny_shapes` and its like."""
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
            "data.augmentation": "random_resized_crop",
            "data.randaugment": "rand-m9-mstd0.5-inc1",
        }
    )
    for index in range(len(kinds)):
        image = source[index].image
        size = (1, 1, 3) if "tiny" in source.encoded(index).name else (60, 90, 3)
        assert (image.shape, image.dtype) == (size, np.uint8), source.encoded(index).name
    train = train_batches(source, config, first_step=0, last_step=3)
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
    assert source.encoded(0).data != source.encoded(1).data
    sizes = [len(source.encoded(index).data) for index in range(64)]
    assert 80_000 < np.mean(sizes) < 150_000, "about as large as ImageNet's"


def test_a_broken_image_is_named(tmp_path: Path):
    save_classes(tmp_path, {"a": [1], "b": [2]})
    file = tmp_path / "b" / "002.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} is no readable image"):
        open_source(f"folder:{tmp_path}")[1]
    source = open_source(f"folder:{tmp_path}")
    file.unlink()
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} cannot be read: No such file"):
        source[1]


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
