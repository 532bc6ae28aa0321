"""Write a classifier's image features to a file, one row per image.

The features are the backbone's last map, normalized and averaged over positions: the input of the
classifier's head. If IMAGE is a single folder, images are named by their path inside it, so class
folders stay apart; otherwise by their path as given. Images that cannot be read are reported and
skipped, and the exit status is then 1.

Examples:
  python -m activemlp_jax.embed models/active_tiny photos/ --output features.npz
  python -m activemlp_jax.embed models/active_tiny 'val/n0*/*.JPEG' --output val.parquet

An .npz file has the arrays `names` [N] and `embeddings` [N, C] float32; a Parquet file has the
columns `name` and `embedding`.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from activemlp_jax.command_line import Parser
from activemlp_jax.inference.classify import ask, embeddings, make_classifier
from activemlp_jax.inference.images import IMAGES_HELP, ImageFile, find_images, read_images
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.utils.errors import UserError, errors_in_one_line, install_command, one_line
from activemlp_jax.utils.files import check_output_file, write_aside
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_compiled_programs
from activemlp_jax.weights.model_directory import load_pretrained, read_card

Write = Callable[[IO[bytes], Sequence[str], np.ndarray], None]


def _write_npz(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
    np.savez(file, names=np.array(names), embeddings=rows)


def _write_parquet(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
    import pyarrow as pa  # optional, and slow to import
    from pyarrow import parquet

    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    table = pa.table({"name": pa.array(names, pa.string()), "embedding": column})
    parquet.write_table(table, file)


WRITERS: dict[str, Write] = {".npz": _write_npz, ".parquet": _write_parquet}


def find_writer(output: Path) -> Write:
    """Find the function that writes the format given by the suffix of `output`."""
    writer = WRITERS.get(output.suffix.lower())
    if writer is None:
        raise UserError(
            f"--output is {output}, expected a name that ends in {' or '.join(WRITERS)}"
        )
    if writer is _write_parquet:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(f"Parquet files need pyarrow: {install_command('parquet')}") from error
    return writer


def name_images(paths: Sequence[str], files: Sequence[ImageFile]) -> list[str]:
    """Name each file by its path inside the folder if `paths` is one folder, else by its path."""
    is_one_folder = len(paths) == 1 and os.path.isdir(os.path.expanduser(paths[0]))
    names = (file.inside.as_posix() if is_one_folder else file.path for file in files)
    # File names can be arbitrary bytes, but the output needs valid text.
    return [name.encode("utf-8", "replace").decode("utf-8") for name in names]


def embed(arguments: dict[str, Any]) -> list[ImageFile]:
    """Run the command with its parsed arguments; return the files that cannot be read."""
    directory, paths, broken = arguments["directory"], arguments["images"], list[ImageFile]()
    target = Path(arguments["output"])
    card = read_card(directory)
    if not isinstance(card.model, ActiveMLP):
        # A segmentation model's maps are trained to tell positions apart, at each photo's size.
        raise UserError(
            f"{directory} has a segmentation model, which sees no image as a whole; expected a "
            "classifier"
        )
    write = find_writer(target)
    done = check_output_file(target)
    files = find_images(paths)
    keep_compiled_programs()
    classifier = make_classifier(card.model, card)
    _, variables = load_pretrained(directory)
    program = functools.partial(embeddings, classifier, variables)
    images = read_images(files, classifier.prepare, os.cpu_count() or 1, broken)
    features = list(ask(program, images, len(files)))
    if not features:
        raise UserError(f"none of the {len(files)} images can be read; {target} is not written")
    names = name_images(paths, [file for file, _ in features])
    rows = np.stack([row for _, row in features]).astype(np.float32)
    for name, row in zip(names, rows, strict=True):
        if not np.isfinite(row).all():
            raise UserError(f"{directory} gives {name} features that are not finite")
    with write_aside(target) as aside, open(aside, "wb") as file:
        write(file, names, rows)
    summary = f"{len(names)} images, {rows.shape[1]} numbers each"
    print(one_line(f"{done} {arguments['output']}: {summary}"))
    return broken


def main() -> None:
    """Parse the command line and run the command."""
    parser = Parser(
        prog="python -m activemlp_jax.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="model directory of a classifier")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=IMAGES_HELP)
    parser.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="file to write: .npz, or .parquet (needs pyarrow)",
    )
    arguments = vars(parser.parse_args())
    collect_garbage_rarely()
    with errors_in_one_line(arguments["output"]):
        broken = embed(arguments)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
