"""The task of segmentation: a class for every pixel."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console
from rich.progress import track

from activemlp_jax.data.base import Example, Source
from activemlp_jax.data.batch_transforms import normalize
from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.data.segmentation_transforms import (
    IGNORED,
    load_opencv,
    scene_train_transform,
)
from activemlp_jax.data.sources import open_scenes
from activemlp_jax.distributed import hosts
from activemlp_jax.inference.images import ImageFile
from activemlp_jax.inference.segment import Segmenter, segment_image
from activemlp_jax.inference.segmentation_evaluation import Part, make_evaluation
from activemlp_jax.inference.tiling import MULTI_SCALE, PUBLISHED, Protocol, make_protocol
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.models.resizing import resize_bilinear
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.plots.overlays import draw_comparison
from activemlp_jax.tasks import segmentation_predict
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
from activemlp_jax.tasks.segmentation_metrics import class_metrics, class_table, scene_metrics
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Batch, Record, Variables
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_types import HEAD
from activemlp_jax.weights.torch_names import BACKBONE, variable_shapes

AUXILIARY_WEIGHT = 0.4
EXAMPLES_DRAWN = 8


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean cross entropy over all pixels; ignored pixels count with a loss of 0.

    Args:
      logits: `[B, h, w, K]`; they are resized to the size of the labels.
      labels: `[B, H, W]`, classes or `IGNORED`.

    Source: mmsegmentation's CrossEntropyLoss, whose mean also counts the ignored pixels.
    """
    logits = resize_bilinear(logits, *labels.shape[1:])
    known = labels != IGNORED
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(known, labels, 0).astype(jnp.int32)
    )
    return jnp.where(known, loss, 0).mean()


# Code for the README of an export; see `Usage`.
RESIZE = """\
factor = min(prep["long_side"] / max(photo.size), prep["short_side"] / min(photo.size))
width, height = (round(factor * length) for length in photo.size)
photo = photo.resize((width, height), Image.Resampling.BILINEAR)
"""
CROP = "left, top = ((length - side) // 2 for length in photo.size)  # one window of many"
ANSWER = """\
labels, counts = np.unique(np.argmax(logits[0], axis=-1), return_counts=True)
for label, count in zip(labels, counts):
    print(label_name, f"{count / counts.sum():.1%}")"""


@dataclasses.dataclass(frozen=True)
class Segmentation(Task):
    """The task of predicting a class for every pixel; `protocol` holds the inference settings."""

    model: ActiveSegmentor
    preprocessing: ScenePreprocessing
    config: ConfigDict | None = None
    protocol: Protocol = PUBLISHED

    name = "segmentation"
    score = "mean_iou"
    score_name = "mIoU"
    counted = "pixels"
    model_type = ActiveSegmentor
    dataset = (20_210, 150, "ADE20K")
    hub_name = "image-segmentation"
    does = "labels the pixels of images"
    noun = "segmentation model"
    default_batch_size = 1
    evaluate_options = ("multi_scale", "slide", "size_multiple")
    predict_options = ("output", "opacity", "labels", "multi_scale", "slide")
    written = (segmentation_predict.OVERLAY, segmentation_predict.LABELS)

    @classmethod
    def from_config(cls, config: ConfigDict, num_classes: int) -> "Segmentation":
        """Make the task of a run."""
        head, data = config.head, config.data
        build(ActiveMLP, "config.model: ", **config.model, num_classes=num_classes)
        model = build(
            ActiveSegmentor,
            "config.head: ",
            config.model.to_dict(),
            head.name,
            num_classes,
            head.channels or None,
            head.aux_channels,
            head.neck_channels,
            head.dropout_rate,
        )
        sides = data.scene.long_side, data.scene.short_side, data.image_size
        preprocessing = build(ScenePreprocessing, "config.data.", *sides, data.mean, data.std)
        return cls(model, preprocessing, config, Protocol(size_multiple=config.test.size_multiple))

    @classmethod
    def from_card(cls, card: ModelCard, options: Options) -> "Segmentation":
        """Make the task of a model directory; raise UserError if OpenCV is needed but missing."""
        assert isinstance(card.model, ActiveSegmentor), "checked by the registry"
        assert isinstance(card.preprocessing, ScenePreprocessing), "every segmentor has this type"
        protocol = make_protocol(
            options["multi_scale"], options["slide"], options.get("size_multiple")
        )
        if card.preprocessing.long_side or protocol.scales != (1.0,) or protocol.size_multiple > 1:
            load_opencv()  # to resize images; raises now, not at the first image
        return cls(card.model, card.preprocessing, protocol=protocol)

    @staticmethod
    def check_config(config: ConfigDict) -> None:
        """Raise UserError for settings that are only for classification."""
        for key in ("random_erasing", "mixup_alpha", "cutmix_alpha"):
            if value := config.augment[key]:
                raise UserError(
                    f"config.augment.{key} is {value}, expected 0 for segmentation; it is for "
                    "classification alone"
                )
        if config.accumulation != 1:
            raise UserError(
                f"config.accumulation is {config.accumulation}, expected 1 for segmentation, whose "
                "batch norm goes by whole batches; config.model.remat_stages saves memory too"
            )
        if config.batch_size < 2:
            raise UserError(
                f"config.batch_size is {config.batch_size}, expected at least 2 for segmentation, "
                "as one image makes no statistics for batch norm"
            )

    @staticmethod
    def check_packages(config: ConfigDict) -> None:
        """Raise UserError if OpenCV is needed but missing."""
        if config.data.scene.long_side or config.augment.scene.photometric:
            load_opencv()

    @staticmethod
    def open_data(name: str, split: str | None) -> Source:
        """Open a split of a dataset of images with masks."""
        return open_scenes(name, split)

    @staticmethod
    def transform(
        example: Example, rng: np.random.Generator, config: ConfigDict
    ) -> dict[str, np.ndarray]:
        """Make uint8 `image` `[S, S, 3]` and `label` `[S, S]`, and `extent`, the unpadded size."""
        image, label, extent = scene_train_transform(example.image, example.label, rng, config)
        return {"image": image, "label": label, "extent": extent}

    @staticmethod
    def adopt(config: ConfigDict, card: ModelCard) -> None:
        """Copy the architecture of the backbone and, if there is one, of the head into `config`."""
        Task.adopt(config, card)
        if isinstance(card.model, ActiveSegmentor):
            for field in HEAD:
                config.head["name" if field == "head" else field] = getattr(card.model, field)

    def start_from(
        self, card: ModelCard, variables: Variables, draw: Draw
    ) -> tuple[Variables, str]:
        """Use a segmentation model's variables, or a classifier's backbone with a random head."""
        if isinstance(card.model, ActiveSegmentor):
            return redraw_heads(self.model, card, variables, draw)
        shapes = variable_shapes(self.model)
        names = {path[2] for path in shapes if path[1] == BACKBONE}
        paths = sorted({path[:2] for path in shapes} - {("params", BACKBONE)})
        initial: Variables = {"params": {}, "batch_stats": {}}
        for (collection, name), drawn in zip(paths, draw(paths), strict=True):
            initial[collection][name] = drawn
        initial["params"][BACKBONE] = {name: variables["params"][name] for name in names}
        return initial, "the backbone, under a new head"

    @property
    def _segmenter(self) -> Segmenter:
        return Segmenter(self.model, self.preprocessing, self.protocol)

    def batch_shapes(self) -> Shapes:
        """Return the shapes and dtypes of a training batch."""
        batch, size = self.settings.batch_size, self.settings.data.image_size
        return {
            "image": ((batch, size, size, 3), "uint8"),
            "label": ((batch, size, size), "uint8"),
            "extent": ((batch, 2), "int32"),
        }

    def inputs(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Prepare images `[B, S, S, 3]` float32 and labels `[B, S, S]` uint8.

        Padding, the pixels beyond an image's `extent` (height, width), is 0 after normalization.
        """
        del key
        images = normalize(batch["image"], self.preprocessing.mean, self.preprocessing.std)
        index = jnp.arange(images.shape[1])[None]
        rows, columns = (index < batch["extent"][:, axis, None] for axis in (0, 1))
        inside = rows[:, :, None] & columns[:, None, :]
        return jnp.where(inside[..., None], images, 0), batch["label"]

    def loss(
        self, variables: Variables, inputs: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        """Compute the cross entropy and the updated batch statistics.

        With UperNet, the loss of the auxiliary head is added with weight `AUXILIARY_WEIGHT`.
        """
        images, labels = inputs
        has_aux = self.model.head == "upernet"
        output: Any = self.model.apply(
            variables,
            images,
            train=True,
            return_aux=has_aux,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        logits, updated = output
        if not has_aux:
            return pixel_cross_entropy(logits, labels), updated
        logits, auxiliary = logits
        loss = pixel_cross_entropy(logits, labels)
        return loss + AUXILIARY_WEIGHT * pixel_cross_entropy(auxiliary, labels), updated

    def make_test(
        self, mesh: Mesh, batch_size: int, num_threads: int, show_progress: bool = False
    ) -> Test:
        """See `Task.make_test`."""
        watch = watch_parts if show_progress and hosts.is_first() else iter
        return make_evaluation(self._segmenter, mesh, batch_size, num_threads, watch)

    @staticmethod
    def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
        """Compute `mean_iou`, `mean_accuracy` and `pixel_accuracy` in percent."""
        return scene_metrics(sums["confusion"])

    def draw_examples(
        self, variables: Variables, source: Source, class_names: Sequence[str]
    ) -> Image.Image:
        """Draw the first examples with their labels and the model's predictions."""
        examples = map(source.__getitem__, range(min(EXAMPLES_DRAWN, len(source))))
        rows = [
            (example.image, example.label, segment_image(self._segmenter, variables, example.image))
            for example in examples
        ]
        return draw_comparison(rows, class_names)

    @staticmethod
    def add_evaluate_options(parser: argparse._ArgumentGroup) -> None:
        """Add the options in `evaluate_options`."""
        parser.add_argument(
            "--multi-scale",
            action="store_true",
            help=f"average over the scales {', '.join(map(str, MULTI_SCALE))}, each also flipped",
        )
        parser.add_argument(
            "--slide",
            action="store_true",
            help="windows of the size trained on, every two thirds of it, in place of whole images",
        )
        parser.add_argument(
            "--size-multiple",
            type=int,
            help="round the sides of resized images to multiples of this many pixels, such as 32: "
            "fewer sizes to compile, but not quite the published protocol",
        )

    def report(
        self, results: Mapping[str, Sums], images: int, class_names: Sequence[str]
    ) -> tuple[list[Any], Record]:
        """Report the metrics of each kind of weights, after a table of the first kind's classes."""
        protocol = self.protocol.describe(self.preprocessing)
        lines, record = list[Any](), Record(protocol=protocol)
        for kind, sums in results.items():
            values = self.metrics(sums)
            lines.append(
                f"[{kind}] {images} test images, {protocol}: mIoU {values['mean_iou']:.2f}% | mAcc "
                f"{values['mean_accuracy']:.2f}% | aAcc {values['pixel_accuracy']:.2f}%"
            )
            per_class = class_metrics(sums["confusion"])
            record[kind] = values | {
                "iou": {
                    name: None if np.isnan(iou) else float(iou)
                    for name, iou in zip(class_names, per_class["iou"], strict=True)
                }
            }
        first = next(iter(results.values()))
        return [class_table(first["confusion"], class_names), *lines], record

    @staticmethod
    def add_predict_options(parser: argparse._ArgumentGroup) -> None:
        """Add the options in `predict_options`."""
        parser.add_argument("--output", metavar="DIR", help="for the overlays (next to the images)")
        parser.add_argument(
            "--opacity", type=float, help=f"of the colors, 0 to 1 ({segmentation_predict.OPACITY})"
        )
        parser.add_argument(
            "--labels",
            action="store_true",
            help="also write NAME_labels.png, a class index a pixel",
        )
        parser.add_argument(
            "--multi-scale", action="store_true", help="average over six scales, each also flipped"
        )
        parser.add_argument(
            "--slide",
            action="store_true",
            help="by windows of the size trained on, for large photos",
        )

    def plan_predict(
        self, card: ModelCard, files: Sequence[ImageFile], options: Options
    ) -> Callable[[Variables, list[ImageFile]], Iterator[Record]]:
        """Make the function that writes an overlay of each image and, if requested, a label map."""
        return segmentation_predict.plan(self._segmenter, card, files, options)

    @staticmethod
    def print_records(records: Iterator[Record]) -> None:
        """Print a line for each image, as soon as it is done."""
        for record in records:
            print(segmentation_predict.describe(record), flush=True)

    @staticmethod
    def usage(preprocessing: ScenePreprocessing) -> Usage:
        """Describe how to use an exported model."""
        prep, resized, resize = preprocessing, "", ""
        if prep.long_side:
            resized = (
                f", which is first resized to fit into {prep.long_side} by {prep.short_side} "
                "(bilinear)"
            )
            resize = RESIZE
        return Usage(
            f"Windows of {prep.window} by {prep.window} pixels are cut out of an image{resized}. "
            "There is a label for each fourth pixel along the height and the width.",
            'side = prep["window"]\n' + resize + CROP,
            ANSWER,
        )


def watch_parts(parts: Sequence[Part]) -> Iterator[Part]:
    """Print the number of images and of sizes to compile, and yield `parts` with a progress bar."""
    console = Console(stderr=True)
    images = sum(len(part.indices) for part in parts)
    sizes = len({shape for part in parts for shape, _ in part.key.views})
    console.print(f"{images:,} images; the network is compiled for {sizes} sizes")
    disable = not console.is_terminal
    yield from track(parts, "evaluating", console=console, transient=True, disable=disable)
