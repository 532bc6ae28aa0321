"""Classify images: compute class probabilities, or the features that the head receives."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.data.batch_transforms import normalize
from activemlp_jax.data.image_transforms import eval_transform
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.inference.imagenet_names import readable_names
from activemlp_jax.inference.images import all_pixels, list_images
from activemlp_jax.inference.preprocessing import preprocessing_for
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.weights.model_card import ModelCard

BATCH_SIZES = (1, 8, 32)  # few, so that little is compiled, but enough to keep padding small
T = TypeVar("T")


class ClassProbability(NamedTuple):
    """A class with its label, its name and its probability from 0 to 1."""

    index: int  # type: ignore[assignment]  # shadows tuple.index
    name: str
    probability: float

    def __repr__(self) -> str:
        return f"{self.name} {100 * self.probability:.1f}%"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classification model together with the preprocessing of its images."""

    model: ActiveMLP
    preprocessing: Preprocessing

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resize and crop `image` `[H, W, 3]` uint8 to `[S, S, 3]` uint8, as in evaluation."""
        return eval_transform(image, self.preprocessing)

    def _normalized(self, images: jax.Array) -> jax.Array:
        return normalize(images, self.preprocessing.mean, self.preprocessing.std)

    def probabilities(self, variables: Any, images: jax.Array) -> jax.Array:
        """Compute class probabilities `[B, num_classes]` of prepared `images` `[B, S, S, 3]`."""
        logits = jnp.asarray(self.model.apply(variables, self._normalized(images)))
        return jax.nn.softmax(logits)

    def embeddings(self, variables: Any, images: jax.Array) -> jax.Array:
        """Compute the head's input features `[B, C]` for prepared `images` `[B, S, S, 3]`."""
        images = self._normalized(images)
        return jnp.asarray(self.model.apply(variables, images, method="pooled_features"))


probabilities = jax.jit(Classifier.probabilities, static_argnums=0)
embeddings = jax.jit(Classifier.embeddings, static_argnums=0)


def make_classifier(model: Any, card: ModelCard | None) -> Classifier:
    """Combine a model with its preprocessing; raise ValueError if it is not an ActiveMLP."""
    if not isinstance(model, ActiveMLP):
        raise ValueError(
            f"the model is an {type(model).__name__}, expected an ActiveMLP, which has a class for "
            "each image"
        )
    preprocessing = preprocessing_for(model, card)
    assert isinstance(preprocessing, Preprocessing), "classifiers use Preprocessing"
    return Classifier(model, preprocessing)


def ask(
    program: Callable[[Any], jax.Array], images: Iterable[tuple[T, np.ndarray]], count: int
) -> Iterator[tuple[T, np.ndarray]]:
    """Run `program` on images in batches of one size from `BATCH_SIZES`; pad the last batch.

    Args:
      program: maps a batch `[B, S, S, 3]` to one row per image.
      images: pairs of a key, which can be anything, and pixels `[S, S, 3]`.
      count: expected number of images, to choose the batch size.

    Yields:
      The key and the row of each image, in order.
    """
    batch_size = next((size for size in BATCH_SIZES if size >= count), BATCH_SIZES[-1])
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, batch_size)):
        keys, pixels = zip(*batch, strict=True)
        padded = [*pixels, *[pixels[-1]] * (batch_size - len(batch))]
        rows = np.asarray(program(np.stack(padded)))
        yield from zip(keys, rows[: len(batch)], strict=True)


def most_probable(row: np.ndarray, names: tuple[str, ...], top: int) -> list[ClassProbability]:
    """List the `top` most probable classes of `row`, the probabilities `[num_classes]`."""
    order = np.argsort(-row, kind="stable")[:top]
    return [ClassProbability(int(label), names[label], float(row[label])) for label in order]


def _run_on_images(
    program: Callable[..., jax.Array], classifier: Classifier, variables: Any, images: list[Any]
) -> list[np.ndarray]:
    """Run `program` on all images and return one row per image."""
    prepared = ((None, classifier.prepare(pixels)) for pixels in all_pixels(images))
    call = functools.partial(program, classifier, variables)
    return [row for _, row in ask(call, prepared, len(images))]


def classify(
    model: ActiveMLP, variables: Any, images: Any, card: ModelCard | None = None, top: int = 5
) -> list[ClassProbability] | list[list[ClassProbability]]:
    """Find the most probable classes of one image, or of each of several images.

    Args:
      model: a classifier.
      variables: variables of the model.
      images: a Pillow image, a uint8 array `[H, W]` or `[H, W, 3]`, or the path of a file; or
        several of these, as a sequence or an array `[B, H, W, 3]`. They are prepared as in
        evaluation.
      card: result of `read_card`, for the class names and the preprocessing. A model with
        ImageNet's 1,000 classes does not need it: it gets ImageNet's names and the published
        preprocessing at 224 pixels.
      top: number of classes to return.

    Returns:
      A list of `ClassProbability`, most probable first; for several images, a list of such lists.

    Raises:
      ValueError: if the model is not a classifier, the card is required but missing or does not
        match the model, an image is invalid, there are no images, or `top` is below 1.
    """
    classifier = make_classifier(model, card)
    if top < 1:
        raise ValueError(f"top is {top}, expected at least 1")
    listed, is_one = list_images(images)
    names = readable_names(card.class_names if card else None, model.num_classes)
    results = [
        most_probable(row, names, top)
        for row in _run_on_images(probabilities, classifier, variables, listed)
    ]
    return results[0] if is_one else results


def embed_images(
    model: ActiveMLP, variables: Any, images: Any, card: ModelCard | None = None
) -> np.ndarray:
    """Compute the features that a classifier's head receives for one image or several.

    The features are the last feature map, normalized and averaged over positions.

    Args:
      model: a classifier.
      variables: variables of the model.
      images: one image or several, as for `classify`.
      card: result of `read_card`, for the preprocessing; required whenever `classify` requires it.

    Returns:
      `[N, C]` float32, one row per image; a single image also gives one row.

    Raises:
      ValueError: if the model is not a classifier, the card is required but missing or does not
        match the model, an image is invalid, or there are no images.
    """
    classifier = make_classifier(model, card)
    listed, _ = list_images(images)
    return np.stack(_run_on_images(embeddings, classifier, variables, listed)).astype(np.float32)
