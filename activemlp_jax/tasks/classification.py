"""The task of classification: one label for each image."""

import argparse
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from activemlp_jax.data.base import Example, Source
from activemlp_jax.data.batch_transforms import (
    draw_mixing,
    group_size,
    mix,
    mixes,
    normalize,
    random_erasing,
)
from activemlp_jax.data.image_transforms import POLICIES
from activemlp_jax.data.loader import eval_batches
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sources import open_source
from activemlp_jax.distributed import sharding
from activemlp_jax.inference.classify import (
    ask,
    make_classifier,
    most_probable,
    probabilities,
)
from activemlp_jax.inference.imagenet_names import imagenet_names, readable_names
from activemlp_jax.inference.images import ImageFile, read_images
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.tasks.base import (
    Draw,
    Options,
    Shapes,
    Sums,
    Task,
    Test,
    Usage,
    build,
    redraw_heads,
)
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.types import Batch, Record, Variables
from activemlp_jax.weights.model_card import ModelCard

NUM_HARDEST = 5
TOP_CLASSES = 5  # listed for each image by `predict`


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute the mean cross entropy of `logits` `[B, K]` with probabilities `targets` `[B, K]`."""
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


# Code for the README of an export; see `Usage`.
CROP = """\
side = prep["image_size"]
short = int(prep["resize_factor"] * side)
width, height = (int(short * length / min(photo.size)) for length in photo.size)
photo = photo.resize((width, height), Image.Resampling.BICUBIC)
left, top = round((width - side) / 2), round((height - side) / 2)"""
ANSWER = """\
scores = np.exp(logits[0] - np.max(logits[0]))
for label in np.argsort(-scores)[:5]:
    print(label_name, f"{scores[label] / scores.sum():.1%}")"""


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """The task of predicting one label for each image."""

    model: ActiveMLP
    preprocessing: Preprocessing
    config: ConfigDict | None = None

    name = "classification"
    score = "accuracy"
    score_name = "accuracy"
    counted = "images"
    model_type = ActiveMLP
    dataset = (1_281_167, 1000, "ImageNet")
    hub_name = "image-classification"
    does = "names what images show"
    noun = "classifier"
    evaluate_options = ("image_size",)

    @classmethod
    def from_config(cls, config: ConfigDict, num_classes: int) -> "Classification":
        """Make the task of a run."""
        data = config.data
        model = build(ActiveMLP, "config.model: ", **config.model, num_classes=num_classes)
        values = data.image_size, data.resize_factor, data.mean, data.std
        return cls(model, build(Preprocessing, "config.data.", *values), config)

    @classmethod
    def from_card(cls, card: ModelCard, options: Options) -> "Classification":
        """Make the task of a model directory; `options['image_size']` replaces its image size."""
        assert isinstance(card.model, ActiveMLP), "checked by the registry"
        preprocessing = card.preprocessing
        assert isinstance(preprocessing, Preprocessing), "every classifier has this type"
        if (side := options.get("image_size")) is not None:
            preprocessing = build(dataclasses.replace, "", preprocessing, image_size=side)
        return cls(card.model, preprocessing)

    @staticmethod
    def open_data(name: str, split: str | None) -> Source:
        """Open a split of a dataset of labeled images."""
        return open_source(name, split)

    @staticmethod
    def transform(
        example: Example, rng: np.random.Generator, config: ConfigDict
    ) -> dict[str, np.ndarray]:
        """Make `image` `[S, S, 3]` uint8 and `label`, an int32 scalar."""
        image = POLICIES[config.augment.policy](example.image, rng, config)
        return {"image": image, "label": np.asarray(example.label, np.int32)}

    @staticmethod
    def adopt(config: ConfigDict, card: ModelCard) -> None:
        """Copy a classifier's architecture into `config`; raise UserError for another model."""
        if not isinstance(card.model, ActiveMLP):
            raise UserError(
                f"config.init_from is {config.init_from}, a segmentation model, and config.task is "
                "classification, expected the directory of a classifier"
            )
        Task.adopt(config, card)

    def start_from(
        self, card: ModelCard, variables: Variables, draw: Draw
    ) -> tuple[Variables, str]:
        """Use a classifier's variables, with a random head if the number of classes differs."""
        return redraw_heads(self.model, card, variables, draw)

    def batch_shapes(self) -> Shapes:
        """Return the shapes and dtypes of a training batch."""
        batch, size = self.settings.batch_size, self.settings.data.image_size
        return {"image": ((batch, size, size, 3), "uint8"), "label": ((batch,), "int32")}

    def _normalize(self, images: jax.Array) -> jax.Array:
        return normalize(images, self.preprocessing.mean, self.preprocessing.std)

    def _logits(self, variables: Variables, images: jax.Array, **kwargs: Any) -> jax.Array:
        return jnp.asarray(self.model.apply(variables, images, **kwargs))

    def inputs(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Prepare images `[B, H, W, 3]` and targets `[B, K]`, both float32.

        Images are normalized, randomly erased and mixed; labels are smoothed and mixed.
        """
        config, augment = self.settings, self.settings.augment
        erasing_key, mixing_key = jax.random.split(key)
        images = self._normalize(batch["image"])
        if augment.random_erasing:
            images = random_erasing(erasing_key, images, augment.random_erasing)
        labels = jax.nn.one_hot(batch["label"], self.model.num_classes)
        targets = optax.smooth_labels(labels, config.label_smoothing)
        if mixes(config):
            mixing = draw_mixing(
                mixing_key,
                len(images) // group_size(config),
                *images.shape[1:3],
                mixup_alpha=augment.mixup_alpha,
                cutmix_alpha=augment.cutmix_alpha,
                cutmix_probability=augment.cutmix_probability,
            )
            images, targets = mix(images, targets, mixing)
        return images, targets

    def loss(
        self, variables: Variables, inputs: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        """Compute the mean cross entropy, with drop path on."""
        images, targets = inputs
        logits = self._logits(variables, images, train=True, rngs={"dropout": key})
        return soft_cross_entropy(logits, targets), {}

    def count(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Sum losses, top-5 hits and the confusion matrix over a batch, leaving out its padding.

        The batch has `image` `[B, S, S, 3]` uint8, `label` `[B]` int32, and `mask` `[B]` float32,
        which is 0 for padding. The result has the scalars `loss`, `top5` and `examples`, and
        `confusion` `[K, K]`, label by prediction.
        """
        logits = self._logits(variables, self._normalize(batch["image"]))
        labels, mask, classes = batch["label"], batch["mask"], self.model.num_classes
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        _, top5 = jax.lax.top_k(logits, min(5, classes))
        confusion = jnp.zeros((classes, classes)).at[labels, logits.argmax(-1)].add(mask)
        return {
            "loss": (loss * mask).sum(),
            "top5": ((top5 == labels[:, None]).any(-1) * mask).sum(),
            "examples": mask.sum(),
            "confusion": confusion,
        }

    def make_test(
        self, mesh: Mesh, batch_size: int, num_threads: int, show_progress: bool = False
    ) -> Test:
        """See `Task.make_test`."""

        def count_batch(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
            return self.count(sharding.gather(variables, mesh), batch)

        count = jax.jit(
            sharding.on_mesh(count_batch, mesh), out_shardings=sharding.replicated(mesh)
        )

        def test(weights: Mapping[str, Variables], source: Source) -> dict[str, Sums]:
            batches = eval_batches(
                source,
                self.preprocessing,
                batch_size,
                num_threads=num_threads,
                process=jax.process_index(),
                processes=jax.process_count(),
            )
            console = Console(stderr=True)
            tracked = track(
                batches,
                "evaluating",
                total=-(-len(source) // batch_size),
                console=console,
                transient=True,
                disable=not (show_progress and console.is_terminal),
            )
            sums: dict[str, Sums] = {name: {} for name in weights}
            with contextlib.closing(batches):
                for batch in tracked:
                    placed = sharding.put_batch(batch, mesh)
                    counted = {name: count(weights[name], placed) for name in weights}
                    for name, values in jax.device_get(counted).items():
                        sums[name] = {key: sums[name].get(key, 0) + values[key] for key in values}
            return sums

        return test

    @staticmethod
    def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
        """Compute the mean `loss`, and `accuracy` and `accuracy_top5` in percent."""
        examples = float(sums["examples"])
        return {
            "loss": float(sums["loss"]) / examples,
            "accuracy": 100 * float(np.trace(sums["confusion"])) / examples,
            "accuracy_top5": 100 * float(sums["top5"]) / examples,
        }

    @staticmethod
    def add_evaluate_options(parser: argparse._ArgumentGroup) -> None:
        """Add the options in `evaluate_options`."""
        parser.add_argument("--image-size", type=int, help="side in pixels (the model's)")

    def report(
        self, results: Mapping[str, Sums], images: int, class_names: Sequence[str]
    ) -> tuple[list[Any], Record]:
        """Report the accuracy of each kind of weights, and the first kind's hardest classes."""
        lines, record = list[Any](), Record()
        for kind, sums in results.items():
            values = self.metrics(sums)
            acc1, acc5 = values["accuracy"], values["accuracy_top5"]
            among_five = f" | {acc5:.3f}% acc@5" if len(class_names) > 5 else ""
            lines.append(
                f"[{kind}] accuracy on {images} test images: {acc1:.3f}% acc@1{among_five}"
            )
            hardest = hardest_classes(sums["confusion"], class_names)
            accuracies = {"acc1": acc1} | ({"acc5": acc5} if among_five else {})
            record[kind] = {**accuracies, "loss": values["loss"], "hardest": hardest}
        kind = next(iter(results))
        hardest_texts = [
            f"{row['class']} ({row['accuracy']:.1f}% of {row['images']}, else {row['taken_for']})"
            for row in record[kind]["hardest"]
        ]
        if hardest_texts:
            lines.append(one_line(f"[{kind}] hardest classes: {', '.join(hardest_texts)}"))
        return lines, record

    def plan_predict(
        self, card: ModelCard, files: Sequence[ImageFile], options: Options
    ) -> Callable[[Variables, list[ImageFile]], Iterator[Record]]:
        """Make the function that yields a record of each image with its most probable classes.

        A record has the path `image` and the list `classes`. The function raises UserError for
        probabilities that are not finite.
        """
        del options
        classifier = make_classifier(card.model, card)
        names = readable_names(card.class_names, card.model.num_classes)

        def run(variables: Variables, broken: list[ImageFile]) -> Iterator[Record]:
            program = functools.partial(probabilities, classifier, variables)
            images = read_images(files, classifier.prepare, os.cpu_count() or 1, broken)
            for file, row in ask(program, images, len(files)):
                if not np.isfinite(row).all():
                    raise UserError(
                        f"the model gives {file.path} probabilities that are not finite"
                    )
                top = most_probable(row, names, TOP_CLASSES)
                yield {"image": file.path, "classes": [each._asdict() for each in top]}

        return run

    @staticmethod
    def print_records(records: Iterator[Record]) -> None:
        """Print a table of the classes of each image, if there are any records."""
        table = Table()
        table.add_column("image", overflow="fold")
        table.add_column("class", overflow="fold")
        table.add_column("probability", justify="right")
        for record in records:
            for rank, prediction in enumerate(record["classes"]):
                image = "" if rank else one_line(record["image"])
                percent = f"{100 * prediction['probability']:.1f}%"
                table.add_row(Text(image), Text(one_line(prediction["name"])), percent)
            table.add_section()
        if table.row_count:
            Console().print(table)

    @staticmethod
    def class_names(card: ModelCard) -> tuple[str, ...] | None:
        """Return class names in label order, with WordNet IDs made readable; None if unknown."""
        count = card.model.num_classes
        is_known = card.class_names or count == len(imagenet_names())
        return readable_names(card.class_names, count) if is_known else None

    @staticmethod
    def usage(preprocessing: Preprocessing) -> Usage:
        """Describe how to use an exported model."""
        side = preprocessing.image_size
        short = int(preprocessing.resize_factor * side)
        return Usage(
            f"The short side of an image is resized to {short} pixels (bicubic), and of that the "
            f"center, {side} by {side}, is cut out.",
            CROP,
            ANSWER,
        )


def hardest_classes(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Find the classes with the lowest accuracy, leaving out classes without mistakes.

    `confusion` `[K, K]` counts images, label by prediction.

    Returns:
      At most `NUM_HARDEST` dicts, lowest accuracy first: the `class`, its `accuracy` in percent,
      its number of `images`, and the class that it is most often `taken_for`.
    """
    confusion = np.asarray(confusion, np.float64)
    images, correct = confusion.sum(1), np.diag(confusion)
    wrong = confusion - np.diag(correct)
    accuracy = 100 * correct / np.maximum(images, 1)
    labels = [label for label in np.argsort(accuracy, kind="stable") if wrong[label].any()]
    return [
        {
            "class": class_names[label],
            "accuracy": float(accuracy[label]),
            "images": int(images[label]),
            "taken_for": class_names[wrong[label].argmax()],
        }
        for label in labels[:NUM_HARDEST]
    ]
