"""Label every pixel of photos by a segmentation model: coloured overlays with a legend.

Examples:
  python -m activemlp_jax.predict runs/digit_scenes/model scene.png
  python -m activemlp_jax.predict models/upernet_large holiday/ --output labelled --multi-scale
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from activemlp_jax.data.decoding import BrokenImageError, decode
from activemlp_jax.data.sources import IMAGE_SUFFIXES
from activemlp_jax.errors import UserError, exit_with
from activemlp_jax.inference.overlays import class_shares, draw_overlay
from activemlp_jax.inference.scene_evaluation import keep_compiled_programs, open_segmenter
from activemlp_jax.inference.scenes import segment_image
from activemlp_jax.inference.views import PUBLISHED, Protocol, make_protocol
from activemlp_jax.weights.model_directory import read_weights

OVERLAY, LABELS = "_overlay.png", "_labels.png"  # what is written has these after its name
SHOWN = 5  # classes a line


def find_images(paths: list[str]) -> list[Path]:
    """Image files: those named, and those in the folders named, in order.

    Raises:
      UserError: there is no such file or folder, or a folder has none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                file
                for file in path.iterdir()
                if file.name.lower().endswith(IMAGE_SUFFIXES)
                and not file.name.endswith((OVERLAY, LABELS))
            )
            if not found:
                raise UserError(f"{path} has no images, expected {', '.join(IMAGE_SUFFIXES)}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    return files


def read_image(file: Path) -> np.ndarray:
    """The pixels `[H, W, 3]` uint8 of an image file; UserError if it has none."""
    try:
        return decode(file.read_bytes(), str(file))
    except OSError as error:
        raise BrokenImageError(f"{file} cannot be read: {error.strerror}") from error


def name_overlays(files: list[Path], output: Path | None) -> list[Path]:
    """Where to write the overlay of each file: beside it, or in `output`.

    Raises:
      UserError: two files have the same name.
    """
    targets = [(output or file.parent) / f"{file.stem}{OVERLAY}" for file in files]
    seen: dict[Path, Path] = {}
    for file, target in zip(files, targets, strict=True):
        if target in seen:
            raise UserError(f"{seen[target]} and {file} would both be written to {target}")
        seen[target] = file
    return targets


def predict(
    directory: str,
    images: list[str],
    *,
    protocol: Protocol = PUBLISHED,
    output: str | None = None,
    opacity: float = 0.6,
    labels: bool = False,
) -> Iterator[dict[str, Any]]:
    """Write the overlays one by one.

    Args:
      directory: of a segmentation model.
      images: files, or folders of them.
      protocol: how label maps are asked for.
      output: a folder for what is written; None for beside the images.
      opacity: of the colours, 0 to 1.
      labels: whether to write the label maps too, a class index a pixel.

    Yields:
      For each file, the names of `image` and `overlay`, and by class name the `shares` of the
      pixels of those that occur, the largest first.

    Raises:
      UserError: an unusable directory, image or option; overlays before it are written.
    """
    card, segmenter = open_segmenter(directory, protocol)
    if not 0 <= opacity <= 1:
        raise UserError(f"--opacity is {opacity}, expected 0 to 1")
    files = find_images(images)
    folder = Path(output) if output else None
    targets = name_overlays(files, folder)
    keep_compiled_programs()
    weights = read_weights(directory, card, card.default_kind)
    variables = jax.tree.map(jnp.asarray, weights)
    names = card.class_names or tuple(map(str, range(card.model.num_classes)))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    for file, target in zip(files, targets, strict=True):
        image = read_image(file)
        found = segment_image(segmenter, variables, image)
        draw_overlay(image, found, names, opacity).save(target)
        if labels:
            picture = Image.fromarray(found.astype(np.uint8))
            picture.save(target.with_name(f"{file.stem}{LABELS}"))
        shares = {names[label]: share for label, share in class_shares(found)}
        yield {"image": str(file), "overlay": str(target), "shares": shares}


def describe(record: dict[str, Any]) -> str:
    """What `predict` found of an image, for people."""
    shares = [f"{name} {100 * share:.1f}%" for name, share in record["shares"].items()]
    more = f" and {len(shares) - SHOWN} more" if len(shares) > SHOWN else ""
    return f"{record['image']}: {', '.join(shares[:SHOWN])}{more}; see {record['overlay']}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m activemlp_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="from conversion or training")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, or folders of them")
    parser.add_argument("--output", metavar="DIR", help="for the overlays (beside the images)")
    parser.add_argument("--opacity", type=float, default=0.6, help="of the colours, 0 to 1 (0.6)")
    parser.add_argument(
        "--labels", action="store_true", help="also write NAME_labels.png, a class index a pixel"
    )
    parser.add_argument(
        "--multi-scale", action="store_true", help="average over six scales, each also flipped"
    )
    parser.add_argument(
        "--slide", action="store_true", help="by windows of the size trained on, for large photos"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line an image")
    arguments = vars(parser.parse_args())
    show = json.dumps if arguments.pop("json") else describe
    protocol = make_protocol(arguments.pop("multi_scale"), arguments.pop("slide"))
    try:
        for record in predict(**arguments, protocol=protocol):
            print(show(record), flush=True)
    except UserError as error:
        exit_with(error)
    except OSError as error:
        exit_with(f"{error.filename or arguments['output']}: {error.strerror or error}")


if __name__ == "__main__":
    main()
