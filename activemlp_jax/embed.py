"""Write the features that a classifier sees in images to a file: one row of numbers an image.

They are the last map of the backbone, normalised and averaged: what the classifier's head sees. Of
one folder, names are places in it, so folders of classes stay apart; else they are as given.
Images that cannot be read are named and left out; the status is 1 then.

Examples:
  python -m activemlp_jax.embed models/active_tiny photos/ --output features.npz
  python -m activemlp_jax.embed models/active_tiny 'val/n0*/*.JPEG' --output val.parquet

An .npz file has the arrays `names` [N] and `embeddings` [N, C] float32, a Parquet file the columns
`name` and `embedding`.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.command_line import Parser
from activemlp_jax.inference.classify import ask, choose_batch_size, embeddings, make_classifier
from activemlp_jax.inference.files import (
    IMAGES_HELP,
    ImageFile,
    find_images,
    read_images,
    unbroken,
    watched,
)
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.utils.errors import UserError, errors_in_one_line, install_command, one_line
from activemlp_jax.utils.files import check_output_file, write_aside
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_compiled_programs
from activemlp_jax.weights.model_directory import read_card, read_weights

Write = Callable[[IO[bytes], Sequence[str], np.ndarray], None]


def _write_npz(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
    np.savez(file, names=np.array(names), embeddings=rows)


def _write_parquet(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
    import pyarrow as pa  # an extra, and slow to import
    from pyarrow import parquet

    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    table = pa.table({"name": pa.array(names, pa.string()), "embedding": column})
    parquet.write_table(table, file)


WRITERS: dict[str, Write] = {".npz": _write_npz, ".parquet": _write_parquet}


def find_writer(output: Path) -> Write:
    """What writes a file of this name.

    Raises:
      UserError: its end says no form that is known, or pyarrow is needed and missing.
    """
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
    """What to call each file: of one folder its place in it, else as it was found."""
    in_one = len(paths) == 1 and os.path.isdir(os.path.expanduser(paths[0]))
    names = (file.inside.as_posix() if in_one else file.path for file in files)
    # Names of files need not be text in any encoding, those in the file do.
    return [name.encode("utf-8", "replace").decode("utf-8") for name in names]


def embed(
    directory: str, paths: Sequence[str], output: str, broken: list[ImageFile]
) -> tuple[str, list[str], np.ndarray]:
    """Write the embeddings of images.

    Args:
      directory: of a classifier.
      paths: of images, as `find_images` takes them.
      output: the file to write.
      broken: images that cannot be read are added to it.

    Returns:
      'wrote' or 'replaced', for what was done to the file; and what is in it: the names of the
      images, and `[N, C]` float32.

    Raises:
      UserError: an unusable directory or output, or no image that can be read.
    """
    card = read_card(directory)
    if not isinstance(card.model, ActiveMLP):
        # Its maps were trained to tell places apart, at the size of each photo.
        raise UserError(
            f"{directory} has a segmentation model, which sees no image as a whole; expected a "
            "classifier"
        )
    target = Path(output)
    write = find_writer(target)
    done = check_output_file(target)
    files = find_images(paths)
    keep_compiled_programs()
    classifier = make_classifier(card.model, card)
    weights = read_weights(directory, card, card.default_kind)
    program = functools.partial(embeddings, classifier, jax.tree.map(jnp.asarray, weights))
    read = watched(read_images(files, classifier.prepare, os.cpu_count() or 1), len(files))
    found = list(ask(program, unbroken(read, broken), choose_batch_size(len(files))))
    if not found:
        raise UserError(f"none of the {len(files)} images can be read; {target} is not written")
    names = name_images(paths, [file for file, _ in found])
    rows = np.stack([row for _, row in found]).astype(np.float32)
    for name, row in zip(names, rows, strict=True):
        if not np.isfinite(row).all():
            raise UserError(f"{directory} gives {name} features that are not finite")
    with write_aside(target) as aside, open(aside, "wb") as file:
        write(file, names, rows)
    return done, names, rows


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m activemlp_jax.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="of a classifier")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=IMAGES_HELP)
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="to write, .npz or .parquet (by pyarrow)"
    )
    arguments: dict[str, Any] = vars(parser.parse_args())
    collect_garbage_rarely()
    output, broken = arguments["output"], list[ImageFile]()
    with errors_in_one_line(output):
        done, names, rows = embed(arguments["directory"], arguments["images"], output, broken)
        print(one_line(f"{done} {output}: {len(names)} images, {rows.shape[1]} numbers each"))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
