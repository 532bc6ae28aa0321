"""Label maps as pictures: every class has a color and a pixel value, and every name fits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from activemlp_jax.plots.overlays import (
    LEGEND_ENTRIES,
    class_colors,
    draw_comparison,
    draw_overlay,
    label_picture,
    paint,
)
from activemlp_jax.plots.pictures import save_picture
from activemlp_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("classes", "mode"), [(2, "L"), (255, "L"), (256, "I;16"), (300, "I;16"), (65536, "I;16")]
)
def test_a_label_map_keeps_every_class(classes: int, mode: str, tmp_path: Path):
    labels = np.array([[0, 1], [classes // 2, classes - 1]], np.int32)
    save_picture(label_picture(labels, classes), tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.mode == mode
        np.testing.assert_array_equal(np.asarray(picture), labels)


def test_a_picture_that_cannot_be_written_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: Image.Image, path: Path, *_arguments: object, **_options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"labels\.png cannot be written: No space left on device"):
        save_picture(label_picture(np.zeros((2, 2), int), 2), tmp_path / "labels.png")
    assert not list(tmp_path.iterdir())


def test_more_classes_than_a_byte_counts_have_colors():
    colors = class_colors(300)
    labels = np.array([[0, 254, 255], [256, 298, 299]])
    np.testing.assert_array_equal(paint(labels, colors), colors[labels])
    page = draw_overlay(np.zeros((2, 3, 3), np.uint8), labels, [f"{i}" for i in range(300)], 1.0)
    assert page.getpixel((0, 0)) == tuple(colors[0])
    assert page.getpixel((383, 255)) == tuple(colors[299])


def test_what_data_sets_ignore_is_black():
    assert (paint(np.array([[255]]), class_colors(150)) == 0).all()


def test_a_legend_names_classes_on_one_line_of_sensible_length():
    image, labels = np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), int)
    plain = draw_overlay(image, labels, ["m" * 60])
    assert draw_overlay(image, labels, ["m" * 9999]).width <= plain.width + 10
    assert draw_overlay(image, labels, ["two\nlines\x1b[2J"]).width < plain.width


def test_a_legend_has_a_header_and_as_many_lines_as_fit():
    image = np.zeros((10, 10, 3), np.uint8)
    heights = []
    for classes in (LEGEND_ENTRIES, LEGEND_ENTRIES + 1, 100):
        labels = np.arange(100).reshape(10, 10) % classes
        page = draw_overlay(image, labels, [f"class {i}" for i in range(classes)])
        heights.append(page.height)
        header = np.asarray(page)[8:28, 398:].min()
        assert header < 200, "nothing is written above the classes"
    assert heights == [516, 536, 536]


def test_a_comparison_shows_every_pixel_of_a_scene_in_its_color():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    true, predicted = rng.integers(0, 5, (2, 64, 64))
    true[:9] = 255
    page = np.asarray(draw_comparison([(image, true, predicted)], "abcde"))
    colors = class_colors(5)
    for row, pixels in enumerate((image, paint(true, colors), paint(predicted, colors))):
        shown = page[8 + 136 * row :, 60:][:128:2, :128:2]
        np.testing.assert_array_equal(shown, pixels)
    nothing = np.full((4, 4), 255)
    assert draw_comparison([(image[:4, :4], nothing, nothing)], "abcde").height == page.shape[0]
