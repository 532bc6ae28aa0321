"""Data sets as ArrayRecord files, which training reads at random, without TensorFlow.

Interrupted, the same command goes on with what is missing.

Examples:
  python -m activemlp_jax.prepare_data imagenet2012 ~/Downloads
  python -m activemlp_jax.prepare_data tfrecord /data/tfds/imagenet2012/5.1.0 --data-dir /data/new
  python -m activemlp_jax.prepare_data folder ~/photos my_photos
  python -m activemlp_jax.prepare_data tfds beans

The result is for `--config.data.name=tfds:NAME`, with the environment variable TFDS_DATA_DIR set to
the folder of --data-dir.
"""

import argparse
import os
from pathlib import Path

from rich.console import Console

from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.utils.errors import UserError, errors_in_one_line


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m activemlp_jax.prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    imagenet = commands.add_parser("imagenet2012", help="from the official tar files")
    imagenet.add_argument(
        "source", metavar="FOLDER", help="of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
    )
    tfrecord = commands.add_parser("tfrecord", help="from a copy in TFRecord files")
    tfrecord.add_argument("source", metavar="FOLDER", help="of one version, as imagenet2012/5.1.0")
    folder = commands.add_parser("folder", help="from class folders of images")
    folder.add_argument("source", metavar="FOLDER", help="of class folders, or one such a split")
    folder.add_argument("name", metavar="NAME", help="of the new data set, such as my_photos")
    download = commands.add_parser("tfds", help="let tensorflow-datasets do it")
    download.add_argument("name", metavar="NAME", help="of a data set it knows, such as beans")
    for command in (imagenet, tfrecord, folder, download):
        command.add_argument(
            "--data-dir", help="of your data sets (TFDS_DATA_DIR, or else ~/tensorflow_datasets)"
        )
    for command in (imagenet, tfrecord, folder):
        command.add_argument(
            "--num-threads", type=int, default=os.cpu_count(), help="that write (one a processor)"
        )
    arguments = parser.parse_args()
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    data_dir = _absolute(arguments.data_dir or default)

    with errors_in_one_line(data_dir):
        try:
            _prepare(arguments, data_dir, Console())
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on with what is missing")
            raise


def _prepare(arguments: argparse.Namespace, data_dir: Path, console: Console) -> None:
    from activemlp_jax.data import preparation  # here, as --help need not wait for it

    if arguments.command == "tfds":
        preparation.prepare_tfds(arguments.name, data_dir, console)
        return
    threads = arguments.num_threads
    if threads < 1:
        raise UserError(f"--num-threads is {threads}, expected at least 1")
    check_numbers({"num_threads": threads})
    source = _absolute(arguments.source)
    if arguments.command == "imagenet2012":
        preparation.prepare_imagenet(source, data_dir, threads, console)
    elif arguments.command == "tfrecord":
        preparation.prepare_tfrecord(source, data_dir, threads, console)
    else:
        preparation.prepare_folder(source, arguments.name, data_dir, threads, console)


if __name__ == "__main__":
    main()
