"""Export a model to a new folder, with a README that explains how to use each file.

stablehlo    the function with its weights, for JAX on CPU, GPU and TPU without this package
safetensors  the weights alone, with the names of the authors' PyTorch release
onnx         the function with its weights, for ONNX runtimes (optional dependencies [onnx])

Examples:
  python -m activemlp_jax.export runs/digits/model exported/digits
  python -m activemlp_jax.export models/active_tiny exported/tiny --format onnx
  python -m activemlp_jax.export models/active_tiny exported/tiny_384 --image-size 384
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.export.onnx import write_onnx
from activemlp_jax.export.readme import write_readme
from activemlp_jax.export.stablehlo import write_stablehlo
from activemlp_jax.models.flops import count_cost
from activemlp_jax.tasks.registry import TASKS, task_type
from activemlp_jax.utils.errors import UserError, errors_in_one_line, install_command, one_line
from activemlp_jax.utils.files import check_output, write_directory_aside
from activemlp_jax.utils.runtime import collect_garbage_rarely
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.convert import NAMES
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import read_card, read_weights
from activemlp_jax.weights.torch_files import write_checkpoint
from activemlp_jax.weights.torch_names import to_torch

FORMATS = ("stablehlo", "safetensors", "onnx")
DEFAULT_FORMATS = ("stablehlo", "safetensors")
ONNX_PACKAGES = ("torch", "onnx", "onnxscript")  # the optional dependencies [onnx]
CONFIG, README = "config.json", "README.md"  # names that model hubs expect


def with_image_size(card: ModelCard, image_size: int | None) -> ModelCard:
    """Change the side of the images or of a segmentation model's windows; None changes nothing."""
    if image_size is None:
        return card
    check_numbers({"image_size": image_size})
    try:
        return replace(card, preprocessing=card.preprocessing.with_side(image_size))
    except ValueError as error:
        raise UserError(f"--image-size: {error}") from error


def describe(card: ModelCard, variables: Variables) -> dict[str, Any]:
    """Return the content of `config.json` for the default weights, without entries in `files`."""
    content, side = card.to_json(), card.preprocessing.side
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    logits = jax.eval_shape(card.model.apply, variables, images)
    cost = count_cost(card.model, side, side)
    if names := TASKS[card.task].class_names(card):
        content["classes"]["names"] = names
    copied_keys = ("task", "name", "architecture", "classes", "preprocessing", "source")
    return {
        **{key: content[key] for key in copied_keys},
        "weights": card.default_kind,
        "parameters": cost.parameters,
        "multiply_adds": cost.macs,
        "input": {"name": "images", "shape": ["batch", *images.shape[1:]], "dtype": "float32"},
        "output": {"name": "logits", "shape": ["batch", *logits.shape[1:]], "dtype": "float32"},
        "files": {},
    }


def export_model(
    directory: str,
    output: str,
    formats: Sequence[str] = DEFAULT_FORMATS,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Export the default weights of a model directory; return the content of `config.json`.

    The folder `output` appears only when it is complete, with a file `model.FORMAT` for each of the
    `formats`. `image_size` is the side of the input in pixels (of the windows for a segmentation
    model); None keeps the model's.

    Raises UserError if the directory, its task or the size is invalid, `output` exists, or a
    package is missing.
    """
    card = with_image_size(read_card(directory), image_size)
    task_type(card, directory)
    target = Path(output)
    if os.path.lexists(target):
        raise UserError(f"{target} is already there; give another place")
    check_output(target)
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: {install_command('onnx')}")
    variables = read_weights(directory, card, card.default_kind)
    config = describe(card, variables)
    side = config["input"]["shape"][1]
    with write_directory_aside(target) as folder:
        for name in dict.fromkeys(formats):
            path = folder / f"model.{name}"
            if name == "stablehlo":
                facts = write_stablehlo(path, card.model, variables, side)
            elif name == "onnx":
                facts = write_onnx(path, card, variables, side)
            else:
                description = replace(card, kinds=(card.default_kind,)).to_json()
                write_checkpoint(path, {"model": to_torch(variables)}, description)
                facts = {"names": "of the original's PyTorch release"}
            config["files"][path.name] = facts
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in config.items()]
        (folder / CONFIG).write_text("{\n" + ",\n".join(lines) + "\n}\n")
        write_readme(folder / README, card, config)
    return config


def main() -> None:
    """Run the command line."""
    parser = Parser(
        prog="python -m activemlp_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="from conversion or training")
    parser.add_argument("output", metavar="OUT_DIR", help="the folder to create")
    parser.add_argument(
        "--format",
        dest="formats",
        action="append",
        choices=FORMATS,
        help=f"may be given several times ({' and '.join(DEFAULT_FORMATS)})",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="side of the input in pixels (the model's, or that of its windows)",
    )
    arguments = vars(parser.parse_args())
    collect_garbage_rarely()
    arguments["formats"] = arguments["formats"] or DEFAULT_FORMATS
    output = Path(arguments["output"])
    with errors_in_one_line(output):
        config = export_model(**arguments)
        weights, side = NAMES[config["weights"]], config["input"]["shape"][1]
        print(one_line(f"wrote {output}: the {weights} weights, images of {side} by {side} pixels"))
        for file in (*config["files"], CONFIG, README):
            print(f"  {file:<18}{(output / file).stat().st_size:>13,} bytes")


if __name__ == "__main__":
    main()
