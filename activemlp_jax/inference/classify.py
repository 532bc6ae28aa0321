"""What a classifier says of images: probabilities of the classes, and the features behind them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.data.batch_transforms import normalise
from activemlp_jax.data.image_transforms import eval_transform
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.inference.imagenet_names import readable_names
from activemlp_jax.inference.images import all_pixels, list_images
from activemlp_jax.inference.preprocessing import preprocessing_for
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.models.layers import wide
from activemlp_jax.weights.model_directory import ModelCard

BATCH_SIZES = (1, 8, 32)  # each compiles once; few of them, and little padding
T = TypeVar("T")


class ClassProbability(NamedTuple):
    """A class that an image may show: its label, its name, and how probable it is, 0 to 1."""

    index: int  # type: ignore[assignment]  # in place of the method of tuples
    name: str
    probability: float

    def __repr__(self) -> str:
        return f"{self.name} {100 * self.probability:.1f}%"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier, made ready to be asked.

    Args:
      model: the model.
      preprocessing: of its images.
    """

    model: ActiveMLP
    preprocessing: Preprocessing

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """What the model is shown of `image` `[H, W, 3]`, as evaluation does; uint8."""
        return eval_transform(image, self.preprocessing)

    def _normalised(self, images: jax.Array) -> jax.Array:
        return normalise(images, self.preprocessing.mean, self.preprocessing.std)

    def probabilities(self, variables: Any, images: jax.Array) -> jax.Array:
        """`[B, num_classes]`, of prepared `images` `[B, S, S, 3]`."""
        logits = jnp.asarray(self.model.apply(variables, self._normalised(images)))
        return jax.nn.softmax(logits)

    def embeddings(self, variables: Any, images: jax.Array) -> jax.Array:
        """What the head sees, `[B, C]`, of prepared `images` `[B, S, S, 3]`."""

        def pooled(model: ActiveMLP, images: jax.Array) -> jax.Array:
            x = model.norm(model.features(images)[-1])
            return x.mean(axis=(1, 2), dtype=wide(model.dtype))

        return jnp.asarray(self.model.apply(variables, self._normalised(images), method=pooled))


probabilities = jax.jit(Classifier.probabilities, static_argnums=0)
embeddings = jax.jit(Classifier.embeddings, static_argnums=0)


def make_classifier(model: Any, card: ModelCard | None) -> Classifier:
    """The model with its preprocessing; see `preprocessing_for`.

    Raises:
      ValueError: it is no ActiveMLP, the card is of another model, or it is missing.
    """
    if not isinstance(model, ActiveMLP):
        raise ValueError(
            f"the model is an {type(model).__name__}, expected an ActiveMLP, which has a class for "
            "each image"
        )
    preprocessing = preprocessing_for(model, card)
    assert isinstance(preprocessing, Preprocessing), "as every classifier's"
    return Classifier(model, preprocessing)


def choose_batch_size(count: int) -> int:
    """Images at a time for `count` of them."""
    return next((size for size in BATCH_SIZES if size >= count), BATCH_SIZES[-1])


def ask(
    program: Callable[[Any], jax.Array], images: Iterable[tuple[T, np.ndarray]], batch_size: int
) -> Iterator[tuple[T, np.ndarray]]:
    """What `program` says of each image, in order.

    Args:
      program: from a batch `[batch_size, S, S, 3]` to a row for each of its images.
      images: what to call each, and its pixels `[S, S, 3]`; the last batch is filled up.
      batch_size: images at a time.

    Yields:
      What each is called, and its row.
    """
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, batch_size)):
        names, pixels = zip(*batch, strict=True)
        filled = [*pixels, *[pixels[-1]] * (batch_size - len(batch))]
        rows = np.asarray(program(np.stack(filled)))
        yield from zip(names, rows[: len(batch)], strict=True)


def most_probable(row: np.ndarray, names: tuple[str, ...], top: int) -> list[ClassProbability]:
    """The `top` classes of the probabilities `row` `[num_classes]`, the most probable first."""
    order = np.argsort(-row, kind="stable")[:top]
    return [ClassProbability(int(label), names[label], float(row[label])) for label in order]


def _rows(
    program: Callable[..., jax.Array], classifier: Classifier, variables: Any, images: list[Any]
) -> list[np.ndarray]:
    """What `program` says of each image."""
    shown = ((None, classifier.prepare(pixels)) for pixels in all_pixels(images))
    call = functools.partial(program, classifier, variables)
    return [row for _, row in ask(call, shown, choose_batch_size(len(images)))]


def classify(
    model: ActiveMLP, variables: Any, images: Any, card: ModelCard | None = None, top: int = 5
) -> list[ClassProbability] | list[list[ClassProbability]]:
    """The most probable classes of one image, or of each of many.

    Args:
      model: a classifier.
      variables: of the model.
      images: a Pillow image, a uint8 array `[H, W]` or `[H, W, 3]` or the path of a file; or many,
        in a sequence or an array `[B, H, W, 3]`. They are shown to the model as in evaluation.
      card: what `read_card` gives, for the names of the classes and the preprocessing. Only a model
        of ImageNet's 1,000 classes does without: they are named, and the preprocessing is the
        published one at 224 pixels.
      top: how many classes.

    Returns:
      `ClassProbability`s, the most probable first; of many images a list of such lists.

    Raises:
      ValueError: a model, card or image of another kind, no card where it takes one, no images,
        or `top` below 1.
    """
    classifier = make_classifier(model, card)
    if top < 1:
        raise ValueError(f"top is {top}, expected at least 1")
    listed, is_one = list_images(images)
    names = readable_names(card.class_names if card else None, model.num_classes)
    found = [
        most_probable(row, names, top)
        for row in _rows(probabilities, classifier, variables, listed)
    ]
    return found[0] if is_one else found


def embed_images(
    model: ActiveMLP, variables: Any, images: Any, card: ModelCard | None = None
) -> np.ndarray:
    """The features that a classifier's head sees: its last map, normalised and averaged.

    Args:
      model: a classifier.
      variables: of the model.
      images: one or many, as `classify` takes them.
      card: what `read_card` gives, for the preprocessing; without it, as in `classify`.

    Returns:
      `[N, C]` float32, a row an image, also of one alone.

    Raises:
      ValueError: a model, card or image of another kind, no card where it takes one, or no images.
    """
    classifier = make_classifier(model, card)
    listed, _ = list_images(images)
    return np.stack(_rows(embeddings, classifier, variables, listed)).astype(np.float32)
