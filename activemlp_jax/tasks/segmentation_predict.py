"""The command `predict` for segmentation models: overlays and label maps of image files."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from activemlp_jax.inference.images import STDIN, ImageFile, read_images
from activemlp_jax.inference.segment import Segmenter, segment_image
from activemlp_jax.plots.overlays import class_shares, draw_overlay, label_picture
from activemlp_jax.plots.pictures import check_picture, save_picture
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.types import Record, Variables
from activemlp_jax.weights.model_card import ModelCard

OVERLAY, LABELS = "_overlay.png", "_labels.png"  # endings of the files to write
MAX_LISTED = 5  # classes to list per image
OPACITY = 0.6
MAX_LABELS = 2**16  # values of a pixel in a 16-bit picture


def plan(
    segmenter: Segmenter, card: ModelCard, files: Sequence[ImageFile], options: Mapping[str, Any]
) -> Callable[[Variables, list[ImageFile]], Iterator[Record]]:
    """Check the files to write, and make the function that writes overlays and label maps.

    The files go to the folder `options['output']`, with the same subfolders as the images, or next
    to each image.

    Returns:
      A function as `Task.plan_predict` returns it. A record has the paths `image` and `overlay`,
      whether the overlay `replaced` an older file, and `shares`, the fraction of the pixels in each
      class that occurs, keyed by class name, largest first.

    Raises:
      UserError: a file cannot be written or would be overwritten, or the model has too many
        classes for label maps.
    """
    num_classes = card.model.num_classes
    if options["labels"] and num_classes > MAX_LABELS:
        raise UserError(
            f"--labels is for at most {MAX_LABELS:,} classes, the model has {num_classes}"
        )
    output = Path(options["output"]) if options["output"] else None
    overlays: dict[Path, ImageFile] = {}
    for file in files:
        image_folder = Path() if file.path == STDIN else Path(file.path).parent
        folder = output / file.inside.parent if output else image_folder
        overlay = folder / f"{file.inside.stem}{OVERLAY}"
        if overlay in overlays:
            raise UserError(
                f"{overlays[overlay].path} and {file.path} would both be written to {overlay}"
            )
        overlays[overlay] = file
    for overlay in overlays:
        for path in (overlay, _label_map(overlay)) if options["labels"] else (overlay,):
            check_picture(path, options["overwrite"])
            if options["show_offsets"] and Path(options["show_offsets"]) == path:
                raise UserError(
                    f"--show-offsets is {path}, where the labels of an image are written"
                )
    opacity = OPACITY if options["opacity"] is None else options["opacity"]
    names = card.class_names or tuple(map(str, range(num_classes)))
    overlay_of = {file: overlay for overlay, file in overlays.items()}

    def run(variables: Variables, broken: list[ImageFile]) -> Iterator[Record]:
        for file, image in read_images(files, lambda image: image, 0, broken):
            label_map = segment_image(segmenter, variables, image)
            overlay = overlay_of[file]
            replaced = os.path.lexists(overlay)
            save_picture(draw_overlay(image, label_map, names, opacity), overlay)
            if options["labels"]:
                save_picture(label_picture(label_map, num_classes), _label_map(overlay))
            yield {
                "image": file.path,
                "overlay": str(overlay),
                "replaced": replaced,
                "shares": {names[label]: share for label, share in class_shares(label_map)},
            }

    return run


def _label_map(overlay: Path) -> Path:
    return overlay.with_name(overlay.name.removesuffix(OVERLAY) + LABELS)


def describe(record: Record) -> str:
    """Describe the record of an image in one readable line."""
    shares = [f"{name} {100 * share:.1f}%" for name, share in record["shares"].items()]
    more = f" and {len(shares) - MAX_LISTED} more" if len(shares) > MAX_LISTED else ""
    location = f"see {record['overlay']}{', replaced' * record['replaced']}"
    return one_line(f"{record['image']}: {', '.join(shares[:MAX_LISTED])}{more}; {location}")
