"""Classify photos with a classifier, or label their pixels with a segmentation model.

A classifier gives the most probable classes of each image, and a segmentation model gives colored
overlays with a legend. Images that cannot be read are reported and skipped, and the exit status is
then 1. Files that this command did not write are replaced only with --overwrite.

Examples:
  python -m activemlp_jax.predict models/active_tiny photo.jpg
  python -m activemlp_jax.predict models/active_tiny holiday/ 'more/**/*.png' --json
  curl -s https://example.org/photo.jpg | python -m activemlp_jax.predict models/active_tiny -
  python -m activemlp_jax.predict models/active_tiny photo.jpg --show-offsets looks.png
  python -m activemlp_jax.predict runs/digit_scenes/model scene.png
  python -m activemlp_jax.predict models/upernet_large holiday/ --output labeled --multi-scale
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.inference.images import IMAGES_HELP, STDIN, ImageFile, find_images
from activemlp_jax.inference.offsets import inspect_offsets, show_to_model
from activemlp_jax.plots.offsets import check_tokens, draw_offsets
from activemlp_jax.plots.pictures import check_picture, save_picture
from activemlp_jax.tasks.registry import TASKS, check_options, task_type
from activemlp_jax.utils.errors import UserError, errors_in_one_line
from activemlp_jax.utils.json_files import json_line
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_compiled_programs
from activemlp_jax.weights.model_directory import load_pretrained, read_card


def fractions(text: str) -> tuple[float, float]:
    """Parse `X,Y` as two numbers, a position in a picture; this is an argparse type."""
    try:
        x, y = map(float, text.split(","))
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected X,Y such as 0.3,0.6") from None
    return x, y


def check_offsets(files: Sequence[ImageFile], output: str, overwrite: bool) -> str:
    """Check that `--show-offsets` can work; return 'wrote' or 'replaced' for the final message."""
    if len(files) > 1:
        raise UserError(f"--show-offsets is for one image, but there are {len(files)}")
    if files[0].path == STDIN:
        raise UserError(f"--show-offsets needs a file, not {STDIN}")
    if Image.registered_extensions().get(Path(output).suffix.lower()) not in Image.SAVE:
        raise UserError(f"--show-offsets is {output}, expected a picture's ending such as .png")
    return check_picture(Path(output), overwrite)


def as_json(record: dict[str, Any]) -> str:
    """Format an image's record as one line; raise UserError for a number that is not finite."""
    return json_line(record, f"the record of {record['image']}")


def predict(arguments: dict[str, Any]) -> list[ImageFile]:
    """Run the command with its parsed arguments; return the files that cannot be read."""
    directory, output, broken = arguments["directory"], arguments["show_offsets"], list[ImageFile]()
    card = read_card(directory)
    task_class = task_type(card, directory)
    check_options(task_class, directory, "predict", arguments)
    check_numbers(arguments)
    task = task_class.from_card(card, arguments)
    files = find_images(arguments["images"], task.written)
    run = task.plan_predict(card, files, arguments)
    if arguments["token"] and not output:
        raise UserError("--token says what --show-offsets shows, which is missing")
    tokens = check_tokens(arguments["token"])
    done = check_offsets(files, output, arguments["overwrite"]) if output else ""
    keep_compiled_programs()
    model, variables = load_pretrained(directory)
    if output:
        path = files[0].path
        (shown,) = show_to_model(model, path, card)
        blocks = inspect_offsets(model, variables, path, card)
        save_picture(draw_offsets(shown, blocks, tokens or None), Path(output))
    records = run(variables, broken)
    if arguments["json"]:
        extra_fields = {"offsets": output} if output else {}
        for record in records:
            print(as_json(record | extra_fields), flush=True)
    else:
        task.print_records(records)
        if output:
            print(f"{done} {output}: where the model looks in {files[0].path}")
    return broken


def main() -> None:
    """Parse the command line and run the command."""
    parser = Parser(
        prog="python -m activemlp_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="from conversion or training")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=IMAGES_HELP)
    parser.add_argument("--json", action="store_true", help="print one line of JSON per image")
    parser.add_argument(
        "--show-offsets", metavar="OUT.png", help="draw where the model looks in the one image"
    )
    parser.add_argument(
        "--token",
        metavar="X,Y",
        action="append",
        type=fractions,
        default=[],
        help="position to look from, in fractions of what the model sees, from the top left, such "
        "as 0.3,0.6; may be repeated (three positions far apart)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files even if this command did not write them",
    )
    for task in TASKS.values():
        if task.predict_options:
            task.add_predict_options(parser.add_argument_group(f"{task.noun}s"))
    arguments = vars(parser.parse_args())
    collect_garbage_rarely()
    with errors_in_one_line(arguments["show_offsets"] or arguments["output"] or ""):
        broken = predict(arguments)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
