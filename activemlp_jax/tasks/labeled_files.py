"""What `predict` does with a segmentation model: overlays and label maps of image files."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from activemlp_jax.inference.files import STDIN, ImageFile, read_images, unbroken, watched
from activemlp_jax.inference.picture_files import check_picture, save_picture
from activemlp_jax.inference.segmentation import Segmenter, segment_image
from activemlp_jax.plots.overlays import class_shares, draw_overlay, label_picture
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_directory import ModelCard

OVERLAY, LABELS = "_overlay.png", "_labels.png"  # endings of what is written
SHOWN = 5  # classes an image
OPACITY = 0.6
MOST_LABELS = 2**16  # in a picture of 16 bits

Record = dict[str, Any]


class Targets(NamedTuple):
    """The files to write for an image; `labels` is None where label maps are not asked for."""

    overlay: Path
    labels: Path | None


def name_targets(files: Sequence[ImageFile], output: Path | None, labels: bool) -> list[Targets]:
    """What to write for each file: in the image's folder, or at its place in `output`.

    Raises:
      UserError: two files have the same name.
    """
    targets, seen = [], dict[Path, ImageFile]()
    for file in files:
        source = Path() if file.path == STDIN else Path(file.path).parent
        folder = output / file.inside.parent if output else source
        overlay = folder / f"{file.inside.stem}{OVERLAY}"
        if overlay in seen:
            raise UserError(
                f"{seen[overlay].path} and {file.path} would both be written to {overlay}"
            )
        seen[overlay] = file
        maps = folder / f"{file.inside.stem}{LABELS}" if labels else None
        targets.append(Targets(overlay, maps))
    return targets


def plan(
    segmenter: Segmenter, card: ModelCard, files: Sequence[ImageFile], options: Mapping[str, Any]
) -> Callable[[Variables, list[ImageFile]], Iterator[Record]]:
    """The function that writes the overlays one by one, after checking where they go.

    It yields, for each file that can be read, the names of `image` and `overlay`, whether that
    `replaced` an older one, and the `shares` of the pixels by name of the classes that occur, the
    largest first.

    Raises:
      UserError: a file cannot be written or would be lost, or there are too many classes.
    """
    number, labels = card.model.num_classes, options["labels"]
    if labels and number > MOST_LABELS:
        raise UserError(f"--labels is for at most {MOST_LABELS:,} classes, the model has {number}")
    output = Path(options["output"]) if options["output"] else None
    targets = name_targets(files, output, labels)
    for path in filter(None, (path for pair in targets for path in pair)):
        check_picture(path, options["overwrite"])
        if options["show_offsets"] and Path(options["show_offsets"]) == path:
            raise UserError(f"--show-offsets is {path}, where the labels of an image are written")
    opacity = OPACITY if options["opacity"] is None else options["opacity"]
    names = card.class_names or tuple(map(str, range(number)))
    by_file = dict(zip(files, targets, strict=True))

    def run(variables: Variables, broken: list[ImageFile]) -> Iterator[Record]:
        read = watched(read_images(files, lambda image: image, num_threads=0), len(files))
        for file, image in unbroken(read, broken):
            found = segment_image(segmenter, variables, image)
            target = by_file[file]
            replaced = os.path.lexists(target.overlay)
            save_picture(draw_overlay(image, found, names, opacity), target.overlay)
            if target.labels:
                save_picture(label_picture(found, number), target.labels)
            yield {
                "image": file.path,
                "overlay": str(target.overlay),
                "replaced": replaced,
                "shares": {names[label]: share for label, share in class_shares(found)},
            }

    return run


def describe(record: Record) -> str:
    """What was found in an image, for people."""
    shares = [f"{name} {100 * share:.1f}%" for name, share in record["shares"].items()]
    more = f" and {len(shares) - SHOWN} more" if len(shares) > SHOWN else ""
    place = f"see {record['overlay']}{', replaced' * record['replaced']}"
    return one_line(f"{record['image']}: {', '.join(shares[:SHOWN])}{more}; {place}")
