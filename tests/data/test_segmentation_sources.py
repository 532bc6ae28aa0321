"""Datasets of scenes: folders, ADE20K, ArrayRecord files of tensorflow-datasets, and digits."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import encoded, photo
from PIL import Image
from scenes import mask, mocked_records, prepare_scene_parse150, save_ade20k, save_scenes

from activemlp_jax.data.ade20k import CLASS_NAMES
from activemlp_jax.data.decoding import BrokenImageError
from activemlp_jax.data.digits import DigitScenes
from activemlp_jax.data.loader import read_unbroken
from activemlp_jax.data.sources import open_scenes
from activemlp_jax.utils.errors import UserError

CLASSES = ("sky", "sea", "sand")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a folder of three scenes without splits."""
    scenes = {"c": mask(30, 40, 0, 1, 2), "a": mask(20, 20, 2, 255), "b": mask(25, 10, 1)}
    save_scenes(tmp_path / "images", tmp_path / "annotations", scenes)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return tmp_path


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    """Save ADEChallengeData2016 with three training and two validation scenes in a folder."""
    training, validation = (
        [mask(24 + number, 32, 0, number, 150, 255) for number in range(1, count + 1)]
        for count in (3, 2)
    )
    save_ade20k(tmp_path, training, validation)
    return tmp_path


def one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return "\n" not in str(error.value)


def test_a_folder_pairs_images_and_masks_in_the_order_of_names(folder: Path):
    (folder / "images" / "notes.txt").write_text("no image")
    (folder / "annotations" / "unused.png").write_bytes(b"")
    source = open_scenes(f"folder:{folder}")
    assert len(source) == 3
    assert source.class_names == CLASSES
    for index, (shape, labels) in enumerate(
        [((20, 20), {2, 255}), ((25, 10), {1}), ((30, 40), {0, 1, 2})]
    ):
        image, found = source[index]
        assert (image.shape, image.dtype) == ((*shape, 3), np.uint8)
        assert (found.shape, found.dtype) == (shape, np.uint8)
        assert set(np.unique(found)) == labels
        assert source.shape(index) == shape
    np.testing.assert_array_equal(source[0].label, mask(20, 20, 2, 255))


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp"])
def test_images_may_be_of_any_kind_of_file(folder: Path, suffix: str):
    (folder / "images" / "a.jpg").unlink()
    picture = photo(3, 20, 20)
    kind = "BMP" if suffix == ".bmp" else "PNG"
    (folder / "images" / f"a{suffix}").write_bytes(encoded(picture, kind))
    source = open_scenes(f"folder:{folder}")
    np.testing.assert_array_equal(source[0].image, np.asarray(picture))
    assert source.shape(0) == (20, 20)


def test_a_masks_palette_gives_indices_and_no_colors(folder: Path):
    values = mask(20, 20, 0, 2, 255)
    colored = Image.fromarray(values)
    colored.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    assert colored.mode == "P"
    colored.save(folder / "annotations" / "a.png", transparency=0)
    np.testing.assert_array_equal(open_scenes(f"folder:{folder}")[0].label, values)


def test_the_size_of_an_image_is_read_without_its_pixels(folder: Path):
    file = folder / "images" / "a.jpg"
    file.write_bytes(encoded(photo(0, 300, 200))[:1000])
    source = open_scenes(f"folder:{folder}")
    assert source.shape(0) == (200, 300)
    file.write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match=rf"{re.escape(str(file))} is not a readable image"):
        source.shape(0)
    file.unlink()
    with pytest.raises(BrokenImageError, match=rf"{re.escape(str(file))}.*No such file"):
        source.shape(0)


def test_splits_are_the_sub_folders(tmp_path: Path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        scenes = {f"{split}{number}": mask(9, 9, number) for number in range(count)}
        save_scenes(tmp_path / "images" / split, tmp_path / "annotations" / split, scenes, ".png")
    (tmp_path / "images" / ".cache").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert len(open_scenes(f"folder:{tmp_path}", "train")) == 3
    assert len(open_scenes(f"folder:{tmp_path}", "test")) == 1
    assert len(open_scenes(f"folder:{tmp_path}")) == 2, "the one to evaluate on is 'val'"
    with pytest.raises(UserError, match="has the splits test, train, val, not 'tran'"):
        open_scenes(f"folder:{tmp_path}", "tran")


def test_a_folder_without_splits_has_none_to_choose(folder: Path):
    with pytest.raises(UserError, match=rf"images has no folder 'train': {folder} has no splits"):
        open_scenes(f"folder:{folder}", "train")


def without(*parts: str) -> Callable[[Path], Any]:
    """Return a function that renames the file or folder `parts`, so that it is missing."""
    return lambda folder: folder.joinpath(*parts).rename(folder / "elsewhere")


def class_file(text: str | bytes) -> Callable[[Path], Any]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "classes.txt").write_bytes(data)


def empty_images(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        file.unlink()


def many_unmasked(folder: Path) -> None:
    for number in range(5):
        (folder / "images" / f"d{number}.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("images"), r"there is no folder .*images; a folder of scenes has images, annot"),
        (without("annotations"), r"there is no folder .*annotations; a folder of scenes has"),
        (
            without("classes.txt"),
            r"classes\.txt cannot be read: No such file.*; expected the names of the classes, one",
        ),
        (class_file(b"\xff\xfe\x00"), r"classes\.txt cannot be read: it is not text; expected"),
        (class_file(""), r"classes\.txt names 0 classes, expected 2 to 255"),
        (class_file("sky\n"), r"classes\.txt names 1 classes, expected 2 to 255"),
        (class_file("\n".join(map(str, range(256)))), r"names 256 classes, expected 2 to 255"),
        (class_file("sky\n\nsea\n"), r"classes\.txt has no name on line 2, expected"),
        (class_file("sky\nsea\nsky"), r"classes\.txt names the class 'sky' twice, expected"),
        (empty_images, r"images has no images, expected \.bmp, "),
        (
            without("annotations", "b.png"),
            r"1 of the 3 images in .*images have no mask: b\.jpg; expected .*annotations/b\.png",
        ),
        (
            many_unmasked,
            r"5 of the 8 images in .* have no mask: d0\.png, d1\.png, d2\.png, \.\.\.; expected",
        ),
    ],
)
def test_a_folder_that_is_no_set_of_scenes_is_named(
    spoil: Callable[[Path], Any], message: str, folder: Path
):
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        open_scenes(f"folder:{folder}")
    assert one_line(error)


def as_mode(mode: str) -> bytes:
    return encoded(photo(0, 20, 20).convert(mode), "PNG")


@pytest.mark.parametrize("bits", [2, 4])
def test_a_grey_mask_with_fewer_bits_than_eight_is_refused(folder: Path, bits: int):
    """Pillow would scale the values of such a mask: 1 would become 17 or 85."""
    name = folder / "annotations" / "a.png"
    data = bytearray(name.read_bytes())
    data[24] = bits  # in the header; the pixels are not read
    name.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"a\.png has {bits} bits a pixel, expected 8"):
        open_scenes(f"folder:{folder}")[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(Image.fromarray(mask(21, 20, 0)), "PNG"), r"has 20 x 21 pixels, expected .* 20 x"),
        (encoded(Image.fromarray(mask(20, 20, 0, 3)), "PNG"), "label 3, expected 0 to 2 for the 3"),
        (encoded(Image.fromarray(mask(20, 20, 254)), "PNG"), "label 254, .*, or 255 for none"),
        (as_mode("RGB"), "has 3 channels, expected one with a class index a pixel"),
        (as_mode("RGBA"), "has 4 channels, expected one with a class index a pixel"),
        (as_mode("LA"), "has 2 channels, expected one with a class index a pixel"),
        (as_mode("1"), "pixels of Pillow's mode '1', expected 8 bits with a class index"),
        (as_mode("I;16"), "pixels of Pillow's mode 'I;16', expected 8 bits with a class index"),
        (b"no image", "is not a readable mask: no known format"),
        (as_mode("L")[:200], "is not a readable mask: "),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_mask_is_named_and_not_skipped(data: bytes | None, message: str, folder: Path):
    file = folder / "annotations" / "a.png"
    source = open_scenes(f"folder:{folder}")
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} .*{message}") as error:
        read_unbroken(source, 0, max_skipped=2)
    assert not isinstance(error.value, BrokenImageError)
    assert one_line(error)


@pytest.mark.parametrize("data", [as_mode("RGB"), b"no image"])
def test_masks_that_cannot_be_used_are_found_when_a_folder_is_opened(data: bytes, folder: Path):
    (folder / "annotations" / "c.png").write_bytes(data)
    message = r"annotations/c\.png (has 3 channels|is not a readable mask)"
    with pytest.raises(UserError, match=message):
        open_scenes(f"folder:{folder}")


def test_images_of_other_kinds_are_left_out_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "images" / "d.heic").write_bytes(b"")
    assert len(open_scenes(f"folder:{folder}")) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}/images: 1 file left out: d.heic (not read: .heic")


@pytest.mark.parametrize("data", [b"no image", encoded(photo(0, 20, 20))[:400], None])
def test_a_broken_image_is_named_and_may_be_skipped(data: bytes | None, folder: Path):
    file = folder / "images" / "a.jpg"
    source = open_scenes(f"folder:{folder}")
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.raises(BrokenImageError, match=re.escape(str(file))) as error:
        source[0]
    assert one_line(error)
    example, skipped = read_unbroken(source, 0, max_skipped=1)
    assert example.label.shape == (25, 10)
    assert [index for index, _ in skipped] == [0]


def test_ade20k_has_the_150_classes_of_the_benchmark():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 150
    assert CLASS_NAMES[:3] == ("wall", "building", "sky")
    assert [CLASS_NAMES[label] for label in (12, 20, 44, 89, 126, 149)] == [
        "person",
        "car",
        "chest of drawers",
        "television receiver",
        "animal",
        "flag",
    ]


@pytest.mark.parametrize("inside", [True, False])
def test_ade20k_is_found_with_its_other_label_ignored_and_the_rest_shifted(ade: Path, inside: bool):
    name = f"ade20k:{ade / 'ADEChallengeData2016' if inside else ade}"
    train, test = open_scenes(name, "training"), open_scenes(name)
    assert (len(train), len(test)) == (3, 2)
    assert train.class_names == CLASS_NAMES
    for index in range(3):
        image, labels = train[index]
        assert image.shape[:2] == labels.shape == train.shape(index) == (25 + index, 32)
        stored = mask(25 + index, 32, 0, index + 1, 150, 255)
        expected = np.choose(stored == 0, [stored.astype(int) - 1, 255])
        expected[stored == 255] = 255
        np.testing.assert_array_equal(labels, expected)


def test_ade20k_with_a_label_beyond_its_classes_is_named(ade: Path):
    root = ade / "ADEChallengeData2016"
    file = root / "annotations" / "validation" / "ADE_val_00000001.png"
    file.write_bytes(encoded(Image.fromarray(mask(25, 32, 1, 151)), "PNG"))
    message = rf"{file} has the label 151, expected 1 to 150 for the 150 classes, or 0 or 255 for"
    with pytest.raises(UserError, match=message):
        open_scenes(f"ade20k:{ade}")[0]


def test_a_folder_that_is_not_ade20k_is_named(ade: Path, tmp_path: Path):
    with pytest.raises(UserError, match="ade20k has the splits training, validation, not 'train'"):
        open_scenes(f"ade20k:{ade}", "train")
    (ade / "ADEChallengeData2016" / "annotations").rename(tmp_path / "elsewhere")
    message = r"ADEChallengeData2016 is not ADE20K: there is no folder .*annotations/validation"
    with pytest.raises(UserError, match=message):
        open_scenes(f"ade20k:{ade}")
    with pytest.raises(UserError, match=r"nowhere is not ADE20K: there is no folder .*images"):
        open_scenes(f"ade20k:{tmp_path / 'nowhere'}")


def even(*labels: int, height: int = 30) -> Callable[[int], np.ndarray]:
    """Return a function that gives every scene the same mask."""
    return lambda _: mask(height, 40, *labels)


@pytest.fixture
def tfds_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder in which tensorflow-datasets looks for datasets."""
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_scene_parse150_is_read_from_array_record_files(
    channels: int, tfds_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def stored(number: int) -> np.ndarray:
        values = mask(30, 40, 0, number + 1, 150, 255)
        return values if channels == 1 else np.stack([values] * 3, axis=-1)

    prepare_scene_parse150(tfds_folder, monkeypatch, stored)
    train = open_scenes("tfds:scene_parse150", "train")
    assert (len(train), train.class_names) == (5, CLASS_NAMES)
    for index in range(5):
        image, labels = train[index]
        assert (image.shape, image.dtype) == ((30, 40, 3), np.uint8)
        assert train.shape(index) == labels.shape == (30, 40)
        assert labels.dtype == np.uint8
        assert labels[0, 0] == labels[0, 3] == 255
        assert labels[0, 2] == 149
    assert sorted(int(train[index].label[0, 1]) for index in range(5)) == [0, 1, 2, 3, 4]
    assert len(open_scenes("tfds:scene_parse150:1.0.0")) == 3, "the split is 'test'"
    assert len(open_scenes("tfds:scene_parse150", "train[:40%]")) == 2


def test_scene_parse150_with_mocked_records_is_read(
    tfds_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The metadata is the builder's; the records are random, like those of mock_data."""
    prepare_scene_parse150(tfds_folder, monkeypatch, even(1))
    with tfds.testing.mock_data(
        data_dir=str(tfds_folder),
        policy=tfds.testing.MockPolicy.USE_FILES,
        as_data_source_fn=mocked_records,
    ):
        source = open_scenes("tfds:scene_parse150", "test")
        assert len(source) == 7
        builder = tfds.builder("scene_parse150", data_dir=str(tfds_folder))
        decoders = {name: tfds.decode.SkipDecoding() for name in ("image", "annotation")}
        for index, record in enumerate(mocked_records(builder, "test", decoders)):
            image, labels = source[index]
            pixels = {name: np.asarray(Image.open(io.BytesIO(record[name]))) for name in record}
            np.testing.assert_array_equal(image, pixels["image"])
            np.testing.assert_array_equal(labels, pixels["annotation"] - np.uint8(1))


def test_masks_of_instances_are_refused(tfds_folder: Path, monkeypatch: pytest.MonkeyPatch):
    instances = np.zeros((30, 40, 3), np.uint8)
    instances[10:20, :, 0], instances[10:20, :, 1] = 13, 1  # category, instance number
    prepare_scene_parse150(tfds_folder, monkeypatch, lambda _: instances)
    message = "the mask of tfds:scene_parse150, split 'test': record 0 has 3 channels, .*ade20k:PA"
    with pytest.raises(UserError, match=message) as error:
        open_scenes("tfds:scene_parse150")
    assert one_line(error)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (even(151), "record 0 has the label 151, expected 1 to 150"),
        (even(1, height=31), "record 0 has 40 x 31 pixels, expected .*, 40 x 30"),
    ],
)
def test_a_wrong_mask_of_a_record_is_named(
    masks: Any, message: str, tfds_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    prepare_scene_parse150(tfds_folder, monkeypatch, masks)
    source = open_scenes("tfds:scene_parse150", "train")
    with pytest.raises(UserError, match=f"the mask of .*split 'train': {message}"):
        source[0]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("tfds:scene_parse150", None, r"scene_parse150 is not prepared: no files in .*TFDS_DATA"),
        ("tfds:scene_parse150:9.9.9", None, r"scene_parse150:9\.9\.9 cannot be opened: .*TFDS_D"),
        ("tfds:scene_parse15", None, "scene_parse15 cannot be opened: .*TFDS_DATA_DIR"),
        ("tfds:mnist", None, "mnist is not for segmentation: .*, found image, label"),
        ("digit_scenes", "val", "digit_scenes has the splits train, test, not 'val'"),
        (
            "digits",
            None,
            "no data set of scenes 'digits', expected digit_scenes, ade20k:PATH, folder:PATH or tf",
        ),
        ("folder:", None, "no data set of scenes 'folder:', expected"),
        ("ade20k", None, "no data set of scenes 'ade20k', expected"),
        ("folder:/no/where", None, "there is no folder /no/where; a folder of scenes has"),
    ],
)
def test_a_wrong_name_or_split_is_named(
    name: str, split: str | None, message: str, tfds_folder: Path
):
    del tfds_folder
    with pytest.raises(UserError, match=message) as error:
        open_scenes(name, split)
    assert one_line(error)


def test_another_split_of_scene_parse150_is_named(
    tfds_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    prepare_scene_parse150(tfds_folder, monkeypatch, even(1))
    with pytest.raises(UserError, match="split 'validation', cannot be read"):
        open_scenes("tfds:scene_parse150", "validation")


def test_the_bundled_scenes_are_opened_by_name():
    assert isinstance(open_scenes("digit_scenes"), DigitScenes)
    assert len(open_scenes("digit_scenes", "train")) == len(DigitScenes("train"))
    assert len(open_scenes("digit_scenes")) == len(DigitScenes("test"))
