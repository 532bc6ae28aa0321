"""The built-in segmentation dataset: scenes of handwritten digits."""

import numpy as np
import pytest

from activemlp_jax.data.digits import DigitScenes
from activemlp_jax.utils.errors import UserError

SOME = 120


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    source = DigitScenes("train")
    return [source[index] for index in range(SOME)]


def test_a_scene_is_a_small_image_with_a_class_for_every_pixel(
    scenes: list[tuple[np.ndarray, np.ndarray]],
):
    for image, mask in scenes:
        assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((64, 64), np.uint8)


def test_there_are_scenes_to_train_and_others_to_test():
    train, test = DigitScenes("train"), DigitScenes("test")
    assert (len(train), len(test), len(DigitScenes())) == (10_000, 500, 500)
    assert train.class_names == ("background", *"0123456789")
    assert train.shape(3) == test[3].image.shape[:2] == (64, 64)


def test_a_scene_follows_from_its_split_and_index_alone():
    train = DigitScenes("train")
    later = train[1234]
    for ours, again in zip(DigitScenes("train")[1234], later, strict=True):
        np.testing.assert_array_equal(ours, again)
    images = [train[0], train[1], DigitScenes("test")[0], DigitScenes("test")[1]]
    assert len({image.tobytes() for image, _ in images}) == 4


def test_altering_a_scene_leaves_the_next_reading_alone():
    source = DigitScenes("test")
    image, mask = source[5]
    image[:], mask[:] = 0, 0
    assert source[5].image.any()
    assert source[5].label.any()


def test_every_digit_takes_up_a_like_share(scenes: list[tuple[np.ndarray, np.ndarray]]):
    masks = np.stack([mask for _, mask in scenes])
    shares = np.bincount(masks.ravel(), minlength=11) / masks.size
    assert len(shares) == 11
    assert 0.65 < shares[0] < 0.85, "most of a scene is background"
    assert (shares[1:] > 0.012).all()
    assert (shares[1:] < 0.05).all()
    present = [len(np.unique(mask)) - 1 for mask in masks]
    assert min(present) >= 1
    assert max(present) == 3
    assert 2 < np.mean(present) < 3


def test_digits_stand_out_from_what_is_behind_them(scenes: list[tuple[np.ndarray, np.ndarray]]):
    contrasts = []
    for image, mask in scenes:
        colors = [np.median(image[mask == label], axis=0) for label in np.unique(mask)]
        contrasts += [np.linalg.norm(color - colors[0]) for color in colors[1:]]
    assert np.quantile(contrasts, 0.1) > 60, "in gray levels, over three channels"


def test_background_has_strokes_of_its_own(scenes: list[tuple[np.ndarray, np.ndarray]]):
    """A class cannot be told by color alone: some background looks like ink."""
    outliers = []
    for image, mask in scenes:
        pixels = image[mask == 0].astype(float)
        far = np.linalg.norm(pixels - np.median(pixels, axis=0), axis=-1) > 130
        outliers.append(far.mean())
    assert 0.02 < np.mean(outliers) < 0.3


@pytest.mark.parametrize("index", [500, -501])
def test_there_is_nothing_beyond_the_last_scene(index: int):
    with pytest.raises(IndexError):
        DigitScenes("test")[index]


def test_another_split_is_named():
    with pytest.raises(UserError, match="digit_scenes has the splits train, test, not 'val'"):
        DigitScenes("val")
