"""Whole, sliding and multi-scale inference against the original, and each scene counted once."""

import re
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import activemlp_jax as am
from activemlp_jax.data.base import Example
from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.distributed.sharding import make_mesh
from activemlp_jax.inference.segment import (
    Segmenter,
    label_maps,
    merge_views,
    segment_image,
    view_logits,
)
from activemlp_jax.inference.segmentation_evaluation import make_evaluation, plan_parts
from activemlp_jax.inference.tiling import (
    PUBLISHED,
    SLIDE_STRIDE_SHARE,
    Protocol,
    bilinear_matrix,
    cut_views,
    plan_views,
    view_matrices,
)
from activemlp_jax.models.resizing import resize_bilinear

BOUND = 1e-9
AS_IT_IS = ScenePreprocessing(long_side=0, window=64)


def golden_views(protocol: Protocol, height: int, width: int) -> tuple[list[Any], list[np.ndarray]]:
    """Return the views of a golden run, and the normalized pixels of each view."""
    views = plan_views(height, width, AS_IT_IS, protocol)
    name = "seg_micro_inference.npz"
    shown = []
    for view in views:
        scale = view.resized[0] / height
        key = "slide_input" if protocol.stride_share else f"input_{scale:.1f}"
        image = goldens.golden_input(name, key)
        assert image.shape[1:3] == view.resized
        image = image[:, :, ::-1] if view.flipped else image
        (top, left), (tall, wide) = view.start, view.shape
        shown.append(image[:, top : top + tall, left : left + wide])
    return views, shown


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("prefix", "protocol", "width"),
    [
        ("tta", Protocol(scales=(0.5, 1.0, 1.5), flip=True), 128),
        ("slide", Protocol(stride_share=43 / 64), 150),
    ],
)
def test_probabilities_and_labels_are_the_originals(prefix: str, protocol: Protocol, width: int):
    golden = goldens.load("seg_micro_inference.npz")
    model = am.ActiveSegmentor(**goldens.SEG_MICRO["upernet"], dtype=jnp.float64)
    variables = goldens.rule_variables(model)
    views, shown = golden_views(protocol, 96, width)
    matrices = view_matrices(96, width, views)
    groups = [view.group for view in views]
    network = jax.jit(lambda variables, images: view_logits(model, variables, images))
    logits = [network(variables, jnp.asarray(image)) for image in shown]
    rows, columns = (
        [
            np.pad(pair[axis], ((0, 0), (0, maps.shape[1 + axis] - pair[axis].shape[1])))[None]
            for pair, maps in zip(matrices, logits, strict=True)
        ]
        for axis in (0, 1)
    )
    batch = {f"rows_{i}": value for i, value in enumerate(rows)}
    batch |= {f"columns_{i}": value for i, value in enumerate(columns)}

    @jax.jit
    def results(batch: Any, logits: Any, rows: Any, columns: Any) -> tuple[jax.Array, jax.Array]:
        return merge_views(logits, rows, columns, groups), label_maps(batch, logits, groups)

    probabilities, labels = results(batch, logits, rows, columns)
    goldens.assert_close(
        np.asarray(probabilities)[:, ::4, ::4], golden[f"{prefix}_prob"], BOUND, prefix
    )
    np.testing.assert_array_equal(labels, golden[f"{prefix}_argmax"])


def test_a_matrix_resizes_as_the_models_do():
    line = goldens.normal(0, "line", (1, 7, 1, 2))
    sizes = (3, 7, 12, 14, 50)
    resize = jax.jit(lambda line: [resize_bilinear(line, size, 1) for size in sizes])
    for size, expected in zip(sizes, resize(jnp.asarray(line, jnp.float32)), strict=True):
        ours = np.einsum("ij,bjwc->biwc", bilinear_matrix(size, 7), line)
        goldens.assert_close(ours, np.asarray(expected), 1e-6, f"7 to {size}")


def test_windows_cover_the_image_and_the_last_is_shifted_back_inside():
    preprocessing = ScenePreprocessing(long_side=0, window=64)
    views = plan_views(64, 150, preprocessing, Protocol(stride_share=43 / 64))
    assert [view.start for view in views] == [(0, 0), (0, 43), (0, 86)]
    assert {view.shape for view in views} == {(64, 64)}
    narrow = plan_views(40, 64, preprocessing, Protocol(stride_share=43 / 64))
    assert [(view.start, view.shape) for view in narrow] == [((0, 0), (40, 64))]


@pytest.mark.parametrize(
    ("height", "width", "multiple", "expected"),
    [
        (600, 800, 1, (512, 683)),
        (600, 800, 32, (512, 672)),
        (300, 3000, 1, (205, 2048)),
        (20, 500, 1, (82, 2048)),
        (20, 1000, 32, (32, 2048)),
        (20, 4000, 1, (32, 2048)),  # not the published protocol's 10, which no stage 3 can see
    ],
)
def test_images_are_fitted_into_the_published_size(
    height: int, width: int, multiple: int, expected: tuple[int, int]
):
    protocol = Protocol(size_multiple=multiple)
    (view,) = plan_views(height, width, ScenePreprocessing(), protocol)
    assert view.resized == view.shape == expected
    assert ("not as published" in protocol.describe(ScenePreprocessing())) == (multiple > 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("scales", value) for value in ((), (1.0, 0.0), (-0.5,), (float("nan"),))),
        *(("size_multiple", value) for value in (0, -32)),
        *(("stride_share", value) for value in (-0.1, 1.5, float("nan"))),
    ],
)
def test_a_protocol_that_cannot_work_is_refused(field: str, value: Any):
    with pytest.raises(ValueError, match=f"^{field} is {re.escape(repr(value))}, expected "):
        Protocol(**{field: value})


def test_a_protocol_is_told_in_words():
    assert PUBLISHED.describe(ScenePreprocessing()) == "whole images"
    protocol = Protocol(scales=(0.5, 1.0), flip=True, stride_share=SLIDE_STRIDE_SHARE)
    assert protocol.stride(ScenePreprocessing()) == 341
    words = "windows of 512 every 341 pixels, scales 0.5, 1.0, flips"
    assert protocol.describe(ScenePreprocessing()) == words


def test_views_are_resized_flipped_and_cut():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    views = plan_views(64, 96, AS_IT_IS, Protocol(flip=True, stride_share=0.5))
    shown = cut_views(image, views)
    assert len(views) == len(shown) == 4
    np.testing.assert_array_equal(shown[1], image[:, 32:])
    np.testing.assert_array_equal(shown[2], image[:, ::-1][:, :64])


class Scenes:
    """Random scenes of given shapes."""

    class_names = tuple("abcdefg")

    def __init__(self, shapes: list[tuple[int, int]]):
        self._shapes = shapes

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, index: int) -> tuple[int, int]:
        return self._shapes[index]

    def image_name(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Example:
        rng, shape = np.random.default_rng(index), self._shapes[index]
        label = rng.integers(0, 8, shape).astype(np.uint8)
        label[label == 7] = 255
        return Example(rng.integers(0, 256, (*shape, 3), np.uint8), label)


SHAPES = [(40, 50), (64, 64), (40, 50), (50, 40), (40, 50), (64, 64), (90, 33)]


def test_every_scene_is_in_one_batch_of_its_size_and_the_largest_come_first():
    model = am.ActiveSegmentor(**goldens.SEG_MICRO["fpn"])
    segmenter = Segmenter(model, AS_IT_IS)
    parts = plan_parts([segmenter.key(shape) for shape in SHAPES], batch_size=2)
    assert sorted(index for part in parts for index in part.indices) == list(range(7))
    assert [len(part.indices) for part in parts] == [2, 1, 2, 1, 1]
    assert [SHAPES[part.indices[0]] for part in parts] == [
        (64, 64), (90, 33), (40, 50), (40, 50), (50, 40),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """Return a segmenter that shows scenes of all sizes at one size, so that it compiles once."""
    model = am.ActiveSegmentor(**goldens.SEG_MICRO["fpn"])
    return Segmenter(model, AS_IT_IS, Protocol(size_multiple=64))


@pytest.fixture(scope="module")
def variables(segmenter: Segmenter) -> dict[str, Any]:
    return goldens.rule_variables(segmenter.model)


def test_sums_over_a_data_set_are_those_of_its_scenes(
    segmenter: Segmenter, variables: dict[str, Any]
):
    source = Scenes([(40, 50), (70, 64), (40, 50), (70, 64), (40, 50)])
    expected = np.zeros((7, 7), np.int64)
    for index in range(len(source)):
        example = source[index]
        labels = segment_image(segmenter, variables, example.image)
        assert labels.shape == example.label.shape
        known = example.label != 255
        np.add.at(expected, (example.label[known], labels[known]), 1)
    watched: list[int] = []

    def watch(parts: Any) -> Any:
        for part in parts:
            yield part
            watched.extend(part.indices)

    evaluate = make_evaluation(segmenter, make_mesh(), 2, num_threads=2, watch=watch)
    found = evaluate({"model": variables}, source)
    np.testing.assert_array_equal(found["model"]["confusion"], expected)
    assert sorted(watched) == list(range(5))


def test_a_block_of_rows_at_a_time_gives_what_the_whole_does(
    segmenter: Segmenter, variables: dict[str, Any]
):
    """Compare a scene taller than one block with resizing by the model's own function."""
    image = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    mean, std = np.array(AS_IT_IS.mean), np.array(AS_IT_IS.std)
    normalized = jnp.asarray((image / 255 - mean) / std, jnp.float32)[None]

    def resized(variables: Any, images: jax.Array) -> jax.Array:
        return resize_bilinear(jnp.asarray(segmenter.model.apply(variables, images)), 64, 64)[0]

    expected = np.asarray(jax.jit(resized)(variables, normalized))
    labels = segment_image(segmenter, variables, image)
    chosen = np.take_along_axis(expected, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, expected.max(-1), rtol=1e-4, atol=1e-5)
