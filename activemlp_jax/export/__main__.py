"""Write a model in forms that run elsewhere, in a new folder with a README that says how.

stablehlo    the function with its weights inside, for JAX on CPU, GPU and TPU without this package
safetensors  the weights alone, by the names that the original has
onnx         the function with its weights inside, for ONNX runtimes (extra `onnx`)

Examples:
  python -m activemlp_jax.export runs/digits/model exported/digits
  python -m activemlp_jax.export models/active_tiny exported/tiny --format onnx
  python -m activemlp_jax.export models/active_tiny exported/tiny_384 --image-size 384
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.export.description import describe, write_readme
from activemlp_jax.export.onnx import write_onnx
from activemlp_jax.export.stablehlo import write_stablehlo
from activemlp_jax.utils.errors import UserError, errors_in_one_line, install_command, one_line
from activemlp_jax.utils.files import check_output, write_directory_aside
from activemlp_jax.utils.runtime import collect_garbage_rarely
from activemlp_jax.weights.convert import NAMES
from activemlp_jax.weights.model_directory import (
    ModelCard,
    Variables,
    read_card,
    read_weights,
)
from activemlp_jax.weights.torch_files import write_checkpoint
from activemlp_jax.weights.torch_names import to_torch

FORMATS = ("stablehlo", "safetensors", "onnx")
USUAL = ("stablehlo", "safetensors")
# Packages that a format needs, of the extra of its name.
NEEDED = {"onnx": ("torch", "onnx", "onnxscript")}
CONFIG, README = "config.json", "README.md"  # as model hubs call them


def with_image_size(card: ModelCard, image_size: int | None) -> ModelCard:
    """`card` for inputs of another size, where one is given.

    Args:
      card: of the model.
      image_size: side in pixels, of segmentation models that of their windows.

    Raises:
      UserError: it is too small or too large.
    """
    if image_size is None:
        return card
    check_numbers({"image_size": image_size})
    shown = card.preprocessing
    try:
        if isinstance(shown, Preprocessing):
            return replace(card, preprocessing=replace(shown, image_size=image_size))
        return replace(card, preprocessing=replace(shown, window=image_size))
    except ValueError as error:
        raise UserError(f"--image-size: {error}") from error


def check_packages(formats: Iterable[str]) -> None:
    """Raises UserError if a package is missing that one of `formats` needs."""
    for name in formats:
        missing = [
            package for package in NEEDED.get(name, ()) if importlib.util.find_spec(package) is None
        ]
        if missing:
            raise UserError(
                f"--format {name} needs {' and '.join(missing)}: {install_command(name)}"
            )


def _write(
    name: str, path: Path, card: ModelCard, variables: Variables, image_size: int
) -> dict[str, Any]:
    """Write one format; returns what one must know of the file."""
    if name == "stablehlo":
        return write_stablehlo(path, card.model, variables, image_size)
    if name == "onnx":
        return write_onnx(path, card, variables, image_size)
    described = replace(card, kinds=(card.default_kind,)).to_json()
    write_checkpoint(path, {"model": to_torch(variables)}, described)
    return {"names": "of the original's PyTorch release"}


def export_model(
    directory: str,
    output: str,
    formats: Sequence[str] = USUAL,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Write the default weights of a model directory in forms that run elsewhere.

    Args:
      directory: a model directory.
      output: the folder to make; it is there whole or not at all.
      formats: out of `FORMATS`; each gives a file `model.FORMAT`.
      image_size: side of the input in pixels; None for the size that the model was made for, of a
        segmentation model that of its windows.

    Returns:
      The content of the folder's `config.json`.

    Raises:
      UserError: an unusable directory or size, `output` is already there, or a package is missing.
    """
    card = with_image_size(read_card(directory), image_size)
    target = Path(output)
    if os.path.lexists(target):
        raise UserError(f"{target} is already there; give another place")
    check_output(target)
    check_packages(formats)
    variables = read_weights(directory, card, card.default_kind)
    found = describe(card, variables)
    side = found["input"]["shape"][1]
    with write_directory_aside(target) as place:
        for name in dict.fromkeys(formats):
            file = f"model.{name}"
            found["files"][file] = _write(name, place / file, card, variables, side)
        topics = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
        (place / CONFIG).write_text("{\n" + ",\n".join(topics) + "\n}\n")
        write_readme(place / README, card, found)
    return found


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m activemlp_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="from conversion or training")
    parser.add_argument("output", metavar="OUT_DIR", help="the folder to make")
    parser.add_argument(
        "--format",
        dest="formats",
        action="append",
        choices=FORMATS,
        help=f"may be given several times ({' and '.join(USUAL)})",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="side of the input in pixels (the model's, or that of its windows)",
    )
    arguments = vars(parser.parse_args())
    collect_garbage_rarely()
    arguments["formats"] = arguments["formats"] or USUAL
    output = Path(arguments["output"])
    with errors_in_one_line(output):
        found = export_model(**arguments)
        weights, side = NAMES[found["weights"]], found["input"]["shape"][1]
        print(one_line(f"wrote {output}: the {weights} weights, images of {side} by {side} pixels"))
        for file in (*found["files"], CONFIG, README):
            print(f"  {file:<18}{(output / file).stat().st_size:>13,} bytes")


if __name__ == "__main__":
    main()
