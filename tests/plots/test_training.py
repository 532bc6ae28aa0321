"""The picture of the confusion matrix: its colors, numbers and readable names."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from activemlp_jax.plots.training import MAX_NAMED_CLASSES, draw_confusion


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **options: object) -> None:
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def confusion(classes: int, count: int = 9) -> np.ndarray:
    """Make a confusion matrix in which one example per class is predicted as the next class."""
    return np.roll(np.eye(classes, dtype=int), 1, axis=1) + (count - 1) * np.eye(classes, dtype=int)


def boxes(texts: list[Text]) -> list[Bbox]:
    """Return the bounding boxes of texts, in pixels."""
    return [text.get_window_extent() for text in texts]


def assert_apart(texts: list[Text]) -> None:
    found = boxes(texts)
    for text, one, other in zip(texts, found, found[1:], strict=False):
        assert not one.overlaps(other), f"{text.get_text()} runs into the next: {one}, {other}"


@pytest.mark.parametrize("classes", [2, 10, 26, MAX_NAMED_CLASSES])
@pytest.mark.parametrize("length", [1, 3, 24])
def test_each_class_is_named_on_both_axes_and_no_name_runs_into_another(
    figures: list[Figure], classes: int, length: int, tmp_path: Path
):
    names = [f"{chr(ord('A') + i)}{'m' * (length - 1)}" for i in range(classes)]
    draw_confusion(confusion(classes), names, "a title", tmp_path / "confusion.png")
    (figure,) = figures
    (axes,) = figure.axes
    page = figure.bbox
    for axis in (axes.xaxis, axes.yaxis):
        labels = axis.get_ticklabels()
        assert [label.get_text() for label in labels] == names
        assert_apart(labels)
        for label, box in zip(labels, boxes(labels), strict=True):
            assert page.containsx(box.x0), f"{label.get_text()} is cut: {box}"
            assert page.containsy(box.y0), f"{label.get_text()} is cut: {box}"


@pytest.mark.parametrize("count", [9, 9999, 10**9])
@pytest.mark.parametrize("classes", [10, 26, MAX_NAMED_CLASSES])
def test_numbers_stay_in_their_cells(
    figures: list[Figure], classes: int, count: int, tmp_path: Path
):
    names = [f"class {i}" for i in range(classes)]
    draw_confusion(confusion(classes, count), names, "a title", tmp_path / "confusion.png")
    (axes,) = figures[0].axes
    cell = axes.bbox.width / classes
    widest = max(boxes(axes.texts), key=lambda box: box.width)
    assert widest.width < cell, f"{widest.width:.1f} pixels, in cells of {cell:.1f}"


@pytest.mark.parametrize("classes", [3, MAX_NAMED_CLASSES + 1])
def test_right_is_blue_wrong_is_red_and_the_darker_the_more(
    figures: list[Figure], classes: int, tmp_path: Path
):
    counts = np.zeros((classes, classes), int)
    counts[0, :3], counts[1, :3], counts[2, 2] = (1, 98, 1), (0, 100, 0), 100
    draw_confusion(counts, [f"{i}" for i in range(classes)], "a title", tmp_path / "c.png")
    (picture,) = figures[0].axes[0].images
    red, green, blue, _ = np.moveaxis(np.asarray(picture.get_array()), -1, 0)
    for cell in ((0, 0), (1, 1), (2, 2)):
        assert blue[cell] > red[cell] + 0.1, f"{cell} is right"
    for cell in ((0, 1), (0, 2)):
        assert red[cell] > blue[cell] + 0.1, f"{cell} is wrong"
    assert green[1, 1] < green[0, 0] < 0.95, "one right of a hundred is paler, and not white"
    assert green[0, 1] < green[0, 2] < 0.95
    assert red[1, 0] == green[1, 0] == blue[1, 0] == 1, "nothing is there"


def test_more_classes_than_can_be_named_are_numbered(figures: list[Figure], tmp_path: Path):
    classes = MAX_NAMED_CLASSES + 1
    names = [f"class {i}" for i in range(classes)]
    draw_confusion(confusion(classes), names, "a title", tmp_path / "confusion.png")
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert "20" in labels
    assert not set(names) & set(labels)


def test_names_may_be_long_or_look_like_formulas(figures: list[Figure], tmp_path: Path):
    names = ["$x_$", "$\\frac$", "african hunting dog of the plains"]
    draw_confusion(confusion(3), names, "a title", tmp_path / "confusion.png")
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert labels == [*names[:2], "african hunting dog of …"]


def test_the_picture_grows_with_the_names(tmp_path: Path):
    sides = []
    for classes in (10, 26):
        names = [f"class {i}" for i in range(classes)]
        draw_confusion(confusion(classes), names, "a title", tmp_path / "confusion.png")
        with Image.open(tmp_path / "confusion.png") as picture:
            sides.append(picture.width)
    assert 600 < sides[0] < sides[1] < 1200, sides
