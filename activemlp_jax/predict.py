"""Name what photos show by a classifier, or label their pixels by a segmentation model.

Of a classifier, the most probable classes of each image; of a segmentation model, coloured overlays
with a legend. Images that cannot be read are named and left out; the status is 1 then. Files that
this command did not write are replaced only with --overwrite.

Examples:
  python -m activemlp_jax.predict models/active_tiny photo.jpg
  python -m activemlp_jax.predict models/active_tiny holiday/ 'more/**/*.png' --json
  curl -s https://example.org/photo.jpg | python -m activemlp_jax.predict models/active_tiny -
  python -m activemlp_jax.predict models/active_tiny photo.jpg --show-offsets looks.png
  python -m activemlp_jax.predict runs/digit_scenes/model scene.png
  python -m activemlp_jax.predict models/upernet_large holiday/ --output labelled --multi-scale
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.inference.classify import (
    ask,
    choose_batch_size,
    make_classifier,
    most_probable,
    probabilities,
)
from activemlp_jax.inference.files import (
    IMAGES_HELP,
    STDIN,
    ImageFile,
    find_images,
    read_images,
    unbroken,
    watched,
)
from activemlp_jax.inference.imagenet_names import readable_names
from activemlp_jax.inference.offsets import inspect_offsets, show_to_model
from activemlp_jax.inference.picture_files import check_picture, save_picture
from activemlp_jax.inference.segmentation import segment_image
from activemlp_jax.inference.tiling import PUBLISHED, Protocol, make_protocol
from activemlp_jax.plots.offsets import Point, check_tokens, draw_offsets
from activemlp_jax.plots.overlays import class_shares, draw_overlay, label_picture
from activemlp_jax.tasks.segmentation_evaluation import open_segmenter
from activemlp_jax.utils.errors import UserError, errors_in_one_line, one_line
from activemlp_jax.utils.json_files import json_line
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_compiled_programs
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_directory import ModelCard, read_card, read_weights

OVERLAY, LABELS = "_overlay.png", "_labels.png"  # what is written has these after its name
SHOWN = 5  # classes an image
OPACITY = 0.6
MOST_LABELS = 2**16  # in a picture of 16 bits
# Options of segmentation models, and what they are where they are not given.
SCENE_OPTIONS: dict[str, Any] = {
    "output": None,
    "opacity": None,
    "labels": False,
    "multi_scale": False,
    "slide": False,
}

Record = dict[str, Any]


def load_variables(directory: str, card: ModelCard) -> Variables:
    """The variables to predict with, on the default device."""
    return jax.tree.map(jnp.asarray, read_weights(directory, card, card.default_kind))


def classify_files(
    directory: str, files: Sequence[ImageFile], broken: list[ImageFile]
) -> Iterator[Record]:
    """Ask a classifier about the files, some at a time.

    Args:
      directory: of a classifier.
      files: the images.
      broken: those that cannot be read are added to it.

    Yields:
      For each file that can be read, the name of `image`, and the most probable `classes`.

    Raises:
      UserError: an unusable directory.
    """
    card = read_card(directory)
    classifier = make_classifier(card.model, card)
    names = readable_names(card.class_names, card.model.num_classes)
    program = functools.partial(probabilities, classifier, load_variables(directory, card))
    read = watched(read_images(files, classifier.prepare, os.cpu_count() or 1), len(files))
    for file, row in ask(program, unbroken(read, broken), choose_batch_size(len(files))):
        if not np.isfinite(row).all():
            raise UserError(f"{directory} gives {file.path} probabilities that are not finite")
        yield {"image": file.path, "classes": most_probable(row, names, SHOWN)}


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


def label_files(
    directory: str,
    files: Sequence[ImageFile],
    targets: Sequence[Targets],
    broken: list[ImageFile],
    *,
    protocol: Protocol = PUBLISHED,
    opacity: float = OPACITY,
) -> Iterator[Record]:
    """Write the overlays one by one.

    Args:
      directory: of a segmentation model.
      files: the images.
      targets: for each image what to write, over what is there.
      broken: those that cannot be read are added to it.
      protocol: how label maps are asked for.
      opacity: of the colors, 0 to 1.

    Yields:
      For each file that can be read, the names of `image` and `overlay`, whether that `replaced` an
      older one, and by class name the `shares` of the pixels of those that occur, the largest
      first.

    Raises:
      UserError: an unusable directory.
    """
    card, segmenter = open_segmenter(directory, protocol)
    by_file = dict(zip(files, targets, strict=True))
    variables = load_variables(directory, card)
    number = card.model.num_classes
    names = card.class_names or tuple(map(str, range(number)))
    read = watched(read_images(files, lambda image: image, num_threads=0), len(files))
    for file, image in unbroken(read, broken):
        found = segment_image(segmenter, variables, image)
        overlay, labels = by_file[file]
        replaced = os.path.lexists(overlay)
        save_picture(draw_overlay(image, found, names, opacity), overlay)
        if labels:
            save_picture(label_picture(found, number), labels)
        shares = {names[label]: share for label, share in class_shares(found)}
        yield {
            "image": file.path,
            "overlay": str(overlay),
            "replaced": replaced,
            "shares": shares,
        }


def fractions(text: str) -> tuple[float, float]:
    """A place of a picture from `X,Y`, as argparse takes it for a type."""
    try:
        x, y = map(float, text.split(","))
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected X,Y such as 0.3,0.6") from None
    return x, y


def show_offsets(
    directory: str,
    files: Sequence[ImageFile],
    output: str,
    tokens: Sequence[Point],
    overwrite: bool = False,
) -> str:
    """Draw where the model looks in an image.

    Args:
      directory: of a model of either kind.
      files: the one image.
      output: the file to write; its ending says the format.
      tokens: from where it looks, (x, y) in fractions of the picture; a few of its own if empty.
      overwrite: whether to replace a file that this command did not write.

    Returns:
      What was done, for people.

    Raises:
      UserError: an unusable directory, image, token or output, or more than one image.
    """
    if len(files) > 1:
        raise UserError(f"--show-offsets is for one image, but there are {len(files)}")
    path, tokens, target = files[0].path, check_tokens(tokens), Path(output)
    if path == STDIN:
        raise UserError(f"--show-offsets needs a file, not {STDIN}")
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--show-offsets is {output}, expected a picture's ending such as .png")
    done = check_picture(target, overwrite)
    card = read_card(directory)
    seen = show_to_model(card.model, path, card)
    blocks = inspect_offsets(card.model, load_variables(directory, card), path, card)
    save_picture(draw_offsets(seen[0], blocks, tokens or None), target)
    return f"{done} {output}: where the model looks in {path}"


def class_table(records: Sequence[Record]) -> Table:
    """What `classify_files` found, for people."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for record in records:
        for rank, found in enumerate(record["classes"]):
            image = "" if rank else one_line(record["image"])
            percent = f"{100 * found.probability:.1f}%"
            table.add_row(Text(image), Text(one_line(found.name)), percent)
        table.add_section()
    return table


def describe_labels(record: Record) -> str:
    """What `label_files` found of an image, for people."""
    shares = [f"{name} {100 * share:.1f}%" for name, share in record["shares"].items()]
    more = f" and {len(shares) - SHOWN} more" if len(shares) > SHOWN else ""
    place = f"see {record['overlay']}{', replaced' * record['replaced']}"
    return one_line(f"{record['image']}: {', '.join(shares[:SHOWN])}{more}; {place}")


def as_json(record: Record) -> str:
    """A record of either kind on one line."""
    if "classes" in record:
        record = {**record, "classes": [found._asdict() for found in record["classes"]]}
    return json_line(record, f"the record of {record['image']}")


def plan_targets(
    directory: str, files: Sequence[ImageFile], arguments: dict[str, Any]
) -> list[Targets]:
    """What `label_files` is to write for each file, checked before any work.

    Raises:
      UserError: a file cannot be written or would be lost, or there are too many classes.
    """
    classes, labels = read_card(directory).model.num_classes, arguments["labels"]
    if labels and classes > MOST_LABELS:
        raise UserError(f"--labels is for at most {MOST_LABELS:,} classes, the model has {classes}")
    output = Path(arguments["output"]) if arguments["output"] else None
    targets = name_targets(files, output, labels)
    for path in filter(None, (path for pair in targets for path in pair)):
        check_picture(path, arguments["overwrite"])
        if arguments["show_offsets"] and Path(arguments["show_offsets"]) == path:
            raise UserError(f"--show-offsets is {path}, where the labels of an image are written")
    return targets


def predict(arguments: dict[str, Any]) -> list[ImageFile]:
    """Do what the command line asks for; returns the files that cannot be read."""
    directory, to_json, broken = arguments["directory"], arguments["json"], list[ImageFile]()
    to_label = read_card(directory).is_segmentor
    given = [name for name, unset in SCENE_OPTIONS.items() if arguments[name] is not unset]
    if given and not to_label:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option} is for segmentation models, but {directory} has a classifier")
    check_numbers(arguments)
    files = find_images(arguments["images"], (OVERLAY, LABELS) if to_label else ())
    opacity = OPACITY if arguments["opacity"] is None else arguments["opacity"]
    overwrite, targets = arguments["overwrite"], list[Targets]()
    if to_label:
        targets = plan_targets(directory, files, arguments)
    keep_compiled_programs()
    looks, shown = "", dict[str, str]()
    if arguments["show_offsets"]:
        place = arguments["show_offsets"]
        looks = show_offsets(directory, files, place, arguments["token"], overwrite)
        shown = {"offsets": place}
    elif arguments["token"]:
        raise UserError("--token says what --show-offsets shows, which is missing")
    if to_label:
        protocol = make_protocol(arguments["multi_scale"], arguments["slide"])
        records = label_files(directory, files, targets, broken, protocol=protocol, opacity=opacity)
    else:
        records = classify_files(directory, files, broken)
    if to_json or to_label:
        for record in records:
            print(as_json(record | shown) if to_json else describe_labels(record), flush=True)
    elif found := list(records):
        Console().print(class_table(found))
    if looks and not to_json:
        print(looks)
    return broken


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m activemlp_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="from conversion or training")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=IMAGES_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON line an image")
    parser.add_argument(
        "--show-offsets", metavar="OUT.png", help="draw where the model looks in the one image"
    )
    parser.add_argument(
        "--token",
        metavar="X,Y",
        action="append",
        type=fractions,
        default=[],
        help="a place to look from, in fractions of what the model sees from its top left, such as "
        "0.3,0.6; may be repeated (three places that are well apart)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of these names that this command did not write",
    )
    scenes = parser.add_argument_group("segmentation models")
    scenes.add_argument("--output", metavar="DIR", help="for the overlays (beside the images)")
    scenes.add_argument("--opacity", type=float, help=f"of the colors, 0 to 1 ({OPACITY})")
    scenes.add_argument(
        "--labels", action="store_true", help="also write NAME_labels.png, a class index a pixel"
    )
    scenes.add_argument(
        "--multi-scale", action="store_true", help="average over six scales, each also flipped"
    )
    scenes.add_argument(
        "--slide", action="store_true", help="by windows of the size trained on, for large photos"
    )
    arguments = vars(parser.parse_args())
    collect_garbage_rarely()
    with errors_in_one_line(arguments["show_offsets"] or arguments["output"] or ""):
        broken = predict(arguments)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
