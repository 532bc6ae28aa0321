"""`am.classify`, `am.embed_images` and `am.segment`: photos in, plain results out."""

from pathlib import Path
from typing import Any
from unittest import mock

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import photo
from PIL import Image
from small_models import CLASSIFIER, NAMES, PREPROCESSING, SEED, SEGMENTOR, save_photos

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.inference import classify
from activemlp_jax.inference.classify import ClassProbability, ask, make_classifier
from activemlp_jax.inference.imagenet_names import imagenet_names, readable_names
from activemlp_jax.inference.preprocessing import preprocessing_for
from activemlp_jax.inference.segment import Segmenter, segment_image
from activemlp_jax.weights.model_card import ModelCard

CARD = ModelCard(CLASSIFIER, PREPROCESSING, ("ema", "model"), "ema", NAMES)
SCENE_CARD = ModelCard(SEGMENTOR, ScenePreprocessing(0, window=64), ("model",), "model")
PHOTOS = [photo(number, 60, 45) for number in range(6)]
CLOSE = 1e-5  # tolerance for float32 numbers around 1


@pytest.fixture(scope="module")
def variables() -> Any:
    return goldens.rule_variables(CLASSIFIER, SEED)


@pytest.fixture(scope="module")
def scene_variables() -> Any:
    return goldens.rule_variables(SEGMENTOR, SEED)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small batches, which compile faster."""
    monkeypatch.setattr(classify, "BATCH_SIZES", (1, 4))


@pytest.fixture(scope="module")
def logits(variables: Any) -> np.ndarray:
    """Compute logits of photos prepared by hand: resized from 60 x 45 to 53 x 40, cropped to 32."""
    shown = [image.resize((53, 40), Image.Resampling.BICUBIC) for image in PHOTOS]
    pixels = np.stack([np.asarray(image)[4:36, 10:42] for image in shown]) / 255
    images = ((pixels - PREPROCESSING.mean) / PREPROCESSING.std).astype(np.float32)
    return np.asarray(jax.jit(CLASSIFIER.apply)(variables, images))


@pytest.fixture(scope="module")
def expected(logits: np.ndarray) -> np.ndarray:
    """Return the expected probabilities `[6, 7]`."""
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(-1, keepdims=True)


def as_rows(found: list[list[ClassProbability]]) -> np.ndarray:
    """Return the probabilities of each image as a row, in the order of labels."""
    rows = np.full((len(found), 7), np.nan)
    for row, classes in zip(rows, found, strict=True):
        for one in classes:
            row[one.index] = one.probability
    return rows


def assert_close(ours: Any, expected: np.ndarray) -> None:
    difference = np.abs(np.asarray(ours) - expected).max()
    assert difference < CLOSE, f"{difference:.1e}"


def test_probabilities_are_those_of_the_model_on_what_evaluation_shows_it(
    variables: Any, expected: np.ndarray
):
    """Six photos need two batches of four; the padding of the second changes no result."""
    found = am.classify(CLASSIFIER, variables, PHOTOS, CARD, top=7)
    assert np.ptp(expected, axis=0).max() > 0.1, "photos differ"
    assert_close(as_rows(found), expected)
    for classes in found:
        values = [one.probability for one in classes]
        assert values == sorted(values, reverse=True)
        assert {one.index: one.name for one in classes}[2] == "tench (n01440764)"
        assert {one.index: one.name for one in classes}[3] == "doe"


def test_one_image_gives_one_result(variables: Any, expected: np.ndarray, tmp_path: Path):
    alone = am.classify(CLASSIFIER, variables, PHOTOS[3], CARD)
    assert len(alone) == 5
    assert_close([one.probability for one in alone], np.sort(expected[3])[:1:-1])
    (file,) = save_photos(tmp_path, "photo.png")  # the first
    for form in (file, str(file), np.asarray(PHOTOS[0]), jnp.asarray(PHOTOS[0])):
        (best,) = am.classify(CLASSIFIER, variables, form, CARD, top=1)
        assert best.index == expected[0].argmax()
        assert best.probability == pytest.approx(expected[0].max(), abs=CLOSE)


def test_many_images_may_be_an_array_or_of_all_kinds(variables: Any, expected: np.ndarray):
    arrays = np.stack([np.asarray(image) for image in PHOTOS])
    assert_close(as_rows(am.classify(CLASSIFIER, variables, arrays, CARD, top=7)), expected)
    mixed = [PHOTOS[5], arrays[1], PHOTOS[5]]
    found = as_rows(am.classify(CLASSIFIER, variables, mixed, CARD, top=99))
    assert_close(found, expected[[5, 1, 5]])


def test_a_program_is_compiled_once_for_a_model_and_shape(variables: Any):
    am.classify(CLASSIFIER, variables, PHOTOS, CARD)
    programs = classify.probabilities._cache_size()
    with_lists = CLASSIFIER.clone(depths=[2, 2, 2, 2], embed_dims=[8, 8, 16, 16])
    for model in (CLASSIFIER, CLASSIFIER.clone(), with_lists):
        am.classify(model, variables, PHOTOS[:3], CARD)
    assert classify.probabilities._cache_size() == programs


def test_without_a_card_a_model_of_the_published_classes_has_the_published_preprocessing():
    published = CLASSIFIER.clone(num_classes=1000)
    assert make_classifier(published, None).preprocessing == Preprocessing(224, 256 / 224)
    assert preprocessing_for(SEGMENTOR.clone(num_classes=150), None) == ScenePreprocessing()
    assert make_classifier(CLASSIFIER, CARD).preprocessing == PREPROCESSING
    assert preprocessing_for(SEGMENTOR, SCENE_CARD) == SCENE_CARD.preprocessing


@pytest.mark.parametrize(
    ("call", "model", "data"),
    [
        (am.classify, CLASSIFIER, "ImageNet's 1000"),
        (am.classify, CLASSIFIER.clone(num_classes=150), "ImageNet's 1000"),
        (am.embed_images, CLASSIFIER, "ImageNet's 1000"),
        (am.inspect_offsets, CLASSIFIER, "ImageNet's 1000"),
        (am.inspect_offsets, SEGMENTOR, "ADE20K's 150"),
        (am.segment, SEGMENTOR, "ADE20K's 150"),
        (am.segment, SEGMENTOR.clone(num_classes=1000), "ADE20K's 150"),
    ],
)
def test_without_a_card_no_model_of_other_classes_is_shown_anything(
    call: Any, model: Any, data: str, variables: Any
):
    classes = model.num_classes
    message = f"the model has {classes} classes, not {data}, .*: pass card=am.read_card"
    with pytest.raises(ValueError, match=message) as raised:
        call(model, variables, PHOTOS)
    assert "\n" not in str(raised.value)


@given(st.integers(0, 12), st.integers(1, 5))
def test_each_image_is_asked_about_once_in_batches_of_one_size(count: int, size: int):
    def program(batch: np.ndarray) -> np.ndarray:
        assert batch.shape == (size, 2)
        return batch * 10

    images = [(f"name {number}", np.full(2, number)) for number in range(count)]
    with mock.patch.object(classify, "BATCH_SIZES", (size,)):
        answers = list(ask(program, images, count))
    assert [name for name, _ in answers] == [name for name, _ in images]
    assert [list(row) for _, row in answers] == [[10 * number] * 2 for number in range(count)]


def test_embeddings_are_what_the_head_sees(
    variables: Any, logits: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(classify, "BATCH_SIZES", (4,))
    rows = am.embed_images(CLASSIFIER, variables, PHOTOS, CARD)
    assert (rows.shape, rows.dtype) == ((6, 16), np.float32)
    head = jax.device_get(variables["params"]["head"])
    assert_close(rows @ head["kernel"] + head["bias"], logits)
    alone = am.embed_images(CLASSIFIER, variables, PHOTOS[4], CARD)
    assert_close(alone, rows[4:5])


def test_label_maps_have_the_size_of_the_photo(scene_variables: Any):
    segmenter = Segmenter(SEGMENTOR, ScenePreprocessing(0, window=64))
    image = np.asarray(PHOTOS[0].rotate(90, expand=True))
    expected = segment_image(segmenter, scene_variables, image)
    assert expected.shape == (60, 45)
    assert len(np.unique(expected)) > 4
    alone = am.segment(SEGMENTOR, scene_variables, image, SCENE_CARD)
    np.testing.assert_array_equal(alone, expected)
    found = am.segment(SEGMENTOR, scene_variables, [image, image[::-1]], SCENE_CARD)
    np.testing.assert_array_equal(found[0], expected)
    assert len(found) == 2
    assert (found[1] != expected).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: am.classify(SEGMENTOR, v, PHOTOS), "is an ActiveSegmentor, expected an Active"),
        (lambda v: am.embed_images(SEGMENTOR, v, PHOTOS), "expected an ActiveMLP, which has a cl"),
        (lambda v: am.segment(CLASSIFIER, v, PHOTOS), "is an ActiveMLP, expected an ActiveSeg"),
        (lambda v: am.classify(CLASSIFIER, v, PHOTOS, SCENE_CARD),
         "card is of an ActiveSegmentor of 7 classes, but the model is an ActiveMLP of 7 classes"),
        (lambda v: am.segment(SEGMENTOR, v, PHOTOS, CARD), "card is of an ActiveMLP of 7 classes"),
        (lambda v: am.classify(CLASSIFIER.clone(num_classes=8), v, PHOTOS, CARD), "of 8 classes"),
        (lambda v: am.classify(CLASSIFIER, v, PHOTOS, "models/x"), "card is a str, expected what"),
        (lambda v: am.classify(CLASSIFIER, v, PHOTOS, CARD, top=0), "top is 0, expected at least"),
        (lambda v: am.classify(CLASSIFIER, v, [], CARD), "images is empty, expected at least one"),
        (lambda v: am.classify(CLASSIFIER, v, [np.ones((4, 4, 3))], CARD), "has dtype float64, "),
        (lambda v: am.segment(SEGMENTOR, v, np.ones((9, 9, 2), np.uint8), SCENE_CARD),
         r"shape \(9, 9, 2\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_named(call: Any, message: str, variables: Any):
    with pytest.raises(ValueError, match=message) as raised:
        call(variables)
    assert "\n" not in str(raised.value)


def test_imagenet_has_a_thousand_names_in_the_order_of_its_ids():
    names = imagenet_names()
    assert len(names) == len(set(names.values())) == 1000
    assert list(names) == sorted(names)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in names)
    assert all(name == name.strip() and name for name in names.values())
    listed = list(names.values())
    # These labels often appear in papers and tutorials.
    for label, word in ((0, "tench"), (207, "golden retriever"), (340, "zebra"), (985, "daisy")):
        assert listed[label].split(",")[0] == word
    assert (listed[134], listed[517]) == ("crane (bird)", "crane (machine)")


def test_a_thousand_nameless_classes_are_imagenets():
    assert readable_names(None, 1000)[:2] == ("tench", "goldfish")
    assert readable_names(None, 3) == ("0", "1", "2")
    given_names = ("n01440764", "n99999999", "cat")
    assert readable_names(given_names, 3) == ("tench (n01440764)", "n99999999", "cat")


def test_results_and_cards_are_easy_to_read():
    assert repr([ClassProbability(0, "tench", 0.9312)]) == "[tench 93.1%]"
    assert repr(CARD) == (
        "ModelCard(an ActiveMLP of no published variant, 7 classes (ant, bee, n01440764 and 4 "
        "more), images of 32 pixels, weights ema (default), model)"
    )
    model = am.create_segmentor("active_tiny")
    card = ModelCard(model, ScenePreprocessing(), ("model",), "model")
    assert repr(card) == (
        "ModelCard(active_tiny under upernet, 150 classes, images resized into 2048 x 512 pixels, "
        "weights model (default))"
    )
    assert "images as large as they are" in repr(SCENE_CARD)
