"""A segmentation model directory, judged on a data set."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.data.segmentation_sources import open_scenes
from activemlp_jax.data.segmentation_transforms import load_opencv
from activemlp_jax.distributed import sharding
from activemlp_jax.inference.segmentation import (
    Part,
    Segmenter,
    Settings,
    make_evaluation,
    round_up,
)
from activemlp_jax.inference.tiling import Protocol, Shape
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.tasks.metrics import class_figures, scene_metrics
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.runtime import keep_compiled_programs
from activemlp_jax.weights.model_directory import ModelCard, check_classes, read_card, read_weights


class SceneEvaluation(NamedTuple):
    """What `evaluate_scene_directory` finds.

    `metrics` has by kind of weights `mean_iou`, `mean_accuracy` and `pixel_accuracy` in percent;
    `confusion` by kind the pixels `[K, K]`, label by prediction; `class_names` the name of each
    label; `protocol` how it was done, in words.
    """

    images: int
    metrics: dict[str, dict[str, float]]
    confusion: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    protocol: str


def open_segmenter(directory: str, protocol: Protocol) -> tuple[ModelCard, Segmenter]:
    """The card of a segmentation model's directory, and the model ready to be asked.

    Raises:
      UserError: no model directory, one of a classifier, or OpenCV is missing where it is needed.
    """
    card = read_card(directory)
    if not isinstance(card.model, ActiveSegmentor):
        raise UserError(
            f"{directory} has a classifier, expected a segmentation model, which labels pixels"
        )
    assert isinstance(card.preprocessing, ScenePreprocessing), "as every segmentation model's"
    if card.preprocessing.long_side or protocol.scales != (1.0,) or protocol.size_multiple > 1:
        load_opencv()  # to resize by; better missed now than at the first image
    return card, Segmenter(card.model, card.preprocessing, protocol)


def _watched(console: Console, parts: Sequence[Part]) -> Iterator[Part]:
    """The parts one by one, with a bar that counts images, and sizes that the network has seen."""
    images = sum(len(part.indices) for part in parts)
    sizes = len({shape for part in parts for shape, _ in part.key.views})
    shown = not console.is_terminal
    if shown:
        console.print(f"{images:,} images; the network is compiled for {sizes} sizes")
    with Progress(
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images, size {task.fields[size]} of " + str(sizes) + ", left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=shown,
    ) as progress:
        task = progress.add_task("", total=images, size=0)
        seen: set[Shape] = set()
        for part in parts:
            seen |= {shape for shape, _ in part.key.views}
            progress.update(task, size=len(seen))
            yield part
            progress.advance(task, len(part.indices))


def evaluate_scene_directory(
    directory: str,
    data: str,
    split: str | None = None,
    *,
    protocol: Protocol,
    batch_size: int | None = None,
    num_threads: int | None = None,
) -> SceneEvaluation:
    """Evaluate all weights of the directory of a segmentation model, in one pass over the data.

    Args:
      directory: a model directory.
      data: a data set, as `open_scenes` takes it.
      split: of the data set; None for the one to evaluate on.
      protocol: how label maps are asked for.
      batch_size: images of one size at a time over all devices, rounded up to a multiple of
        these; None for one a device.
      num_threads: that read images on each host; None for one a processor.

    Raises:
      UserError: an unusable directory or data set, or classes that are not the model's.
    """
    card, segmenter = open_segmenter(directory, protocol)
    source = open_scenes(data, split)
    check_classes(card, source.class_names, data)
    keep_compiled_programs()
    mesh = sharding.make_mesh()
    weights = {
        kind: sharding.put_everywhere(read_weights(directory, card, kind), mesh)
        for kind in card.kinds
    }
    console = Console(stderr=True, quiet=not sharding.is_first_host())
    settings = Settings(
        round_up(batch_size or 1, mesh.size),
        (os.cpu_count() or 1) if num_threads is None else num_threads,
        lambda parts: _watched(console, parts),
    )
    sums = make_evaluation(segmenter, mesh, settings)(weights, source)
    confusion = {kind: sums[kind]["confusion"] for kind in card.kinds}
    return SceneEvaluation(
        len(source),
        {kind: scene_metrics(found) for kind, found in confusion.items()},
        confusion,
        source.class_names,
        protocol.describe(segmenter.preprocessing),
    )


def class_table(confusion: np.ndarray, class_names: Sequence[str]) -> Table:
    """The figures of each class, for people."""
    figures = class_figures(confusion)
    table = Table("class", title="each class, in percent")
    for heading in ("IoU", "accuracy", "share of pixels"):
        table.add_column(heading, justify="right")
    shares = 100 * np.asarray(confusion).sum(1) / max(np.asarray(confusion).sum(), 1)
    for name, iou, accuracy, share in zip(
        class_names, figures["iou"], figures["accuracy"], shares, strict=True
    ):
        table.add_row(
            Text(one_line(name)),
            *("-" if np.isnan(value) else f"{value:.2f}" for value in (iou, accuracy, share)),
        )
    return table
