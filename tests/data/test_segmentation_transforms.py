"""Transforms of scenes and their masks, compared with the original's segmentation training."""

import sys
from typing import Any

import goldens
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_sample_image

from activemlp_jax.data import segmentation_transforms
from activemlp_jax.data.segmentation_transforms import (
    IGNORED,
    change_brightness,
    change_contrast,
    change_hue,
    change_saturation,
    draw_crop_position,
    photometric_distortion,
    resize_image,
    resize_mask,
    resized_shape,
    scene_train_transform,
)
from activemlp_jax.training.config import default_config
from activemlp_jax.utils.errors import UserError

STEPS = {
    "brightness": change_brightness,
    "contrast": change_contrast,
    "saturation": change_saturation,
    "hue": lambda image, shift: change_hue(image, int(shift)),
}
GOLDENS = goldens.load("seg_transforms.npz")
PHOTOMETRIC = [key for key in GOLDENS if key.split("_")[0] in STEPS]


def settings(
    image_size: int, flip: float = 0.0, sides: tuple[int, int] = (0, 0), **scene: Any
) -> ConfigDict:
    """Return a config without resizing, flips or color changes, apart from the given settings."""
    config = default_config()
    config.data.image_size, config.augment.flip = image_size, flip
    config.data.scene.long_side, config.data.scene.short_side = sides
    fixed = {"min_scale": 1.0, "max_scale": 1.0, "max_class_share": 1.0, "photometric": False}
    config.augment.scene.update(fixed | scene)
    return config


def numbered(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Make a scene whose red is the row and green the column, and a mask with their sum."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, rows * 0 + 7], axis=-1), (rows + columns) % 250


def levels_apart(ours: np.ndarray, golden: np.ndarray) -> int:
    assert (ours.shape, ours.dtype) == (golden.shape, np.uint8)
    return int(np.abs(ours.astype(int) - golden).max())


@pytest.mark.parametrize("ratio", ["0.5", "1.0", "1.37", "2.0"])
def test_resizing_equals_the_originals(ratio: str):
    photo = load_sample_image("china.jpg")
    scale = int(2048 * float(ratio)), int(512 * float(ratio))
    shape = resized_shape(*photo.shape[:2], scale)
    ours = resize_image(photo, shape)
    assert ours.shape == tuple(GOLDENS[f"resize_{ratio}_shape"])
    assert levels_apart(ours[::16, ::16], GOLDENS[f"resize_{ratio}"]) <= 1
    np.testing.assert_allclose(ours.mean((0, 1)), GOLDENS[f"resize_{ratio}_mean"], atol=0.05)
    mask = resize_mask(photo[..., 0] // 32, shape)
    np.testing.assert_array_equal(mask[::16, ::16], GOLDENS[f"mask_{ratio}"])


@pytest.mark.parametrize(
    ("height", "width", "scale", "shape"),
    [
        (480, 640, (2048, 512), (512, 683)),
        (640, 480, (2048, 512), (683, 512)),
        (100, 1000, (2048, 512), (205, 2048)),
        (300, 301, (150, 150), (150, 150)),
        (1, 3000, (100, 50), (1, 100)),
        (64, 64, (64, 64), (64, 64)),
    ],
)
def test_both_sides_fit_into_the_scale_in_proportion(
    height: int, width: int, scale: tuple[int, int], shape: tuple[int, int]
):
    assert resized_shape(height, width, scale) == shape


def test_a_resized_mask_has_no_new_labels():
    mask = np.random.default_rng(0).choice(np.array([0, 7, 149, IGNORED], np.uint8), (33, 45))
    assert set(np.unique(resize_mask(mask, (70, 21)))) == {0, 7, 149, IGNORED}


@pytest.mark.parametrize("key", PHOTOMETRIC)
def test_each_photometric_step_equals_the_originals(key: str):
    step, amount = key.split("_")
    assert levels_apart(STEPS[step](GOLDENS["photo"], float(amount)), GOLDENS[key]) <= 1


def test_there_is_a_reference_for_every_photometric_step():
    assert {key.split("_")[0] for key in PHOTOMETRIC} == set(STEPS)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (lambda image: change_brightness(image, 20.7), [30, 220, 255]),
        (lambda image: change_brightness(image, -20.7), [0, 179, 234]),
        (lambda image: change_contrast(image, 1.27), [12, 254, 255]),
        (lambda image: change_saturation(image, 0.0), [255, 255, 255]),
    ],
)
def test_results_are_clipped_and_truncated(changed: Any, expected: list[int]):
    image = np.array([[[10, 200, 255]]], np.uint8)
    assert changed(image)[0, 0].tolist() == expected


@pytest.mark.parametrize("shift", [-18, 17, 60])
def test_a_turned_hue_goes_round(shift: int):
    red = np.array([[[255, 0, 0]]], np.uint8)
    back = change_hue(change_hue(red, shift), -shift)
    assert levels_apart(back, red) <= 4
    green = [0, 255, 0]
    assert change_hue(red, 60)[0, 0].tolist() == change_hue(red, 60 - 180)[0, 0].tolist() == green


def test_distortion_draws_each_step_half_of_the_time(monkeypatch: pytest.MonkeyPatch):
    calls: list[list[tuple[str, float]]] = []
    for name in STEPS:

        def step(image: np.ndarray, amount: float, name: str = name) -> np.ndarray:
            calls[-1].append((name, amount))
            return image

        monkeypatch.setattr(segmentation_transforms, f"change_{name}", step)
    image = np.zeros((2, 2, 3), np.uint8)
    draws = 4000
    for seed in range(draws):
        calls.append([])
        photometric_distortion(image, np.random.default_rng(seed))
    limits = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}
    for name in STEPS:
        amounts = [amount for call in calls for step, amount in call if step == name]
        assert 0.46 < len(amounts) / draws < 0.54, name
        if name == "hue":
            assert set(amounts) == set(range(-18, 18))
        else:
            low, high = limits[name]
            span = high - low
            assert low <= min(amounts) < low + 0.02 * span, name
            assert high - 0.02 * span < max(amounts) <= high, name
    names = [tuple(step for step, _ in call) for call in calls]
    assert ("brightness", "contrast", "saturation", "hue") in names
    assert ("brightness", "saturation", "hue", "contrast") in names
    last = np.mean([call[-1] == "contrast" for call in names if len(call) == 4])
    assert 0.4 < last < 0.6, "contrast is first as often as last"
    nothing = np.mean([not call for call in names])
    assert 0.04 < nothing < 0.09, "the steps are independent"


def test_a_crop_is_anywhere_within_the_scene():
    mask = np.zeros((9, 6), np.uint8)
    rng = np.random.default_rng(0)
    places = {draw_crop_position(mask, 4, rng, 1.0) for _ in range(500)}
    assert places == {(top, left) for top in range(6) for left in range(3)}


def test_a_side_that_is_shorter_than_the_crop_starts_at_zero():
    rng = np.random.default_rng(0)
    places = {draw_crop_position(np.zeros((3, 6), np.uint8), 4, rng, 0.75) for _ in range(99)}
    assert places == {(0, 0), (0, 1), (0, 2)}


def draws_taken(mask: np.ndarray, max_share: float) -> int:
    """Count the crop positions that were drawn; each takes two random numbers."""

    class Counted:
        calls = 0
        rng = np.random.default_rng(0)

        def integers(self, high: int) -> int:
            self.calls += 1
            return int(self.rng.integers(high))

    counted = Counted()
    draw_crop_position(mask, 16, counted, max_share)
    return counted.calls // 2


def halves(first: int, second: int, share: float) -> np.ndarray:
    """Make a 16 x 16 mask: the left `share` of each row is labeled `first`, the rest `second`."""
    mask = np.full((16, 16), second, np.uint8)
    mask[:, : int(16 * share)] = first
    return mask


@pytest.mark.parametrize(
    ("mask", "max_share", "draws"),
    [
        (halves(3, 4, 0.5), 0.75, 1),
        (halves(3, 4, 0.6875), 0.75, 1),
        (halves(3, 4, 0.75), 0.75, 11),
        (halves(3, 3, 0.5), 0.75, 11),
        (halves(3, IGNORED, 0.5), 0.75, 11),
        (halves(IGNORED, IGNORED, 0.5), 0.75, 11),
        (halves(3, 3, 0.5), 1.0, 1),
        (halves(IGNORED, IGNORED, 0.5), 1.0, 1),
    ],
)
def test_a_crop_of_too_few_classes_is_drawn_again_ten_times(
    mask: np.ndarray, max_share: float, draws: int
):
    assert draws_taken(mask, max_share) == draws


def test_a_class_share_leaves_ignored_pixels_out():
    mask = np.full((16, 16), IGNORED, np.uint8)
    mask[0, :8] = [1, 1, 1, 1, 1, 2, 2, 2]
    assert draws_taken(mask, 0.75) == 1
    mask[0, :8] = [1, 1, 1, 1, 1, 1, 2, 2]
    assert draws_taken(mask, 0.75) == 11


def test_redrawing_finds_the_crops_of_several_classes():
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 20:44] = np.arange(24 * 24).reshape(24, 24) % 5
    good = 0
    for seed in range(200):
        top, left = draw_crop_position(mask, 16, np.random.default_rng(seed), 0.75)
        counts = np.bincount(mask[top : top + 16, left : left + 16].ravel())
        good += counts.max() < 0.75 * 256
    assert good > 190


def test_a_crop_is_cut_out_of_image_and_mask_alike():
    image, mask = numbered(100, 120)
    for seed in range(20):
        ours, labels, extent = scene_train_transform(
            image, mask, np.random.default_rng(seed), settings(32)
        )
        top, left = ours[0, 0, :2]
        assert (ours.shape, ours.dtype) == ((32, 32, 3), np.uint8)
        assert (labels.shape, labels.dtype) == ((32, 32), np.uint8)
        assert (extent.tolist(), extent.dtype) == ([32, 32], np.int32)
        np.testing.assert_array_equal(ours, image[top : top + 32, left : left + 32])
        np.testing.assert_array_equal(labels, mask[top : top + 32, left : left + 32])


def test_a_flip_turns_image_and_mask_alike():
    image, mask = numbered(32, 32)
    config = settings(32, flip=1.0)
    ours, labels, _ = scene_train_transform(image, mask, np.random.default_rng(0), config)
    np.testing.assert_array_equal(ours, image[:, ::-1])
    np.testing.assert_array_equal(labels, mask[:, ::-1])
    config.augment.flip = 0.5
    flips = [
        scene_train_transform(image, mask, np.random.default_rng(seed), config)[0][0, 0, 1] == 31
        for seed in range(400)
    ]
    assert 0.42 < np.mean(flips) < 0.58


@pytest.mark.parametrize(("height", "width"), [(20, 40), (40, 20), (5, 7), (1, 1)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_what_is_smaller_than_the_crop_is_padded_at_the_bottom_and_right(
    height: int, width: int, flip: float
):
    image, mask = numbered(height, width)
    image, mask = image + 1, np.minimum(mask, 200)
    config = settings(32, flip)
    ours, labels, extent = scene_train_transform(image, mask, np.random.default_rng(1), config)
    rows, columns = min(height, 32), min(width, 32)
    assert extent.tolist() == [rows, columns]
    assert (ours[:rows, :columns] > 0).all()
    assert (labels[:rows, :columns] <= 200).all()
    ours[:rows, :columns], labels[:rows, :columns] = 0, IGNORED
    np.testing.assert_array_equal(ours, np.zeros((32, 32, 3)))
    np.testing.assert_array_equal(labels, np.full((32, 32), IGNORED))


def test_padding_stays_black_under_changed_colors():
    image, mask = np.full((10, 12, 3), 128, np.uint8), np.ones((10, 12), np.uint8)
    config = settings(32, photometric=True)
    for seed in range(40):
        ours, _, _ = scene_train_transform(image, mask, np.random.default_rng(seed), config)
        assert ours[10:].max() == ours[:, 12:].max() == 0


def test_resizing_draws_a_ratio_of_the_scale():
    image, mask = numbered(40, 60)
    config = settings(400, sides=(120, 60), min_scale=0.5, max_scale=2.0)
    extents = []
    for seed in range(300):
        _, _, extent = scene_train_transform(image, mask, np.random.default_rng(seed), config)
        extents.append(extent)
    short, long = np.transpose(extents)
    assert 30 <= short.min() < 32
    assert 117 < short.max() <= 120
    np.testing.assert_allclose(long, short * 1.5, atol=1)
    assert 70 < short.mean() < 80, "the ratio is uniform"


def test_all_steps_together_give_a_scene_of_the_right_size_and_depend_on_the_generator_alone():
    photo = load_sample_image("china.jpg")
    mask = photo[..., 0] // 32
    changes = {"min_scale": 0.5, "max_scale": 2.0, "max_class_share": 0.75, "photometric": True}
    config = settings(128, 0.5, (512, 128), **changes)
    seen = set()
    for seed in range(12):
        first, second = (
            scene_train_transform(photo, mask, np.random.default_rng(seed), config)
            for _ in range(2)
        )
        for ours, again in zip(first, second, strict=True):
            np.testing.assert_array_equal(ours, again)
        image, labels, extent = first
        assert (image.shape, labels.shape) == ((128, 128, 3), (128, 128))
        assert set(np.unique(labels)) <= {*range(8), IGNORED}
        assert (labels[: extent[0], : extent[1]] != IGNORED).all()
        seen.add(image.tobytes())
    assert len(seen) == 12


def test_neither_image_nor_mask_is_altered_even_where_they_are_read_only():
    picture = Image.fromarray(load_sample_image("flower.jpg")[:64, :80])
    image, mask = np.asarray(picture), np.asarray(picture.convert("L"))
    assert not image.flags.writeable
    before = image.tobytes(), mask.tobytes()
    for long_side in (0, 100):
        config = settings(48, 1.0, (long_side, 50), photometric=True)
        for seed in range(8):
            results = scene_train_transform(image, mask, np.random.default_rng(seed), config)
            for result in results:
                assert result.flags.c_contiguous
    assert (image.tobytes(), mask.tobytes()) == before


def test_missing_opencv_is_said_to_be_an_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    segmentation_transforms.load_opencv.cache_clear()
    message = r"segmentation needs OpenCV: pip install -c constraints.txt -e '\.\[segmentation\]'"
    with pytest.raises(UserError, match=message):
        resize_mask(np.zeros((4, 4), np.uint8), (2, 2))
