"""Convert datasets to ArrayRecord files, which training reads at random and without TensorFlow.

After an interruption, the same command continues with the missing files.

Examples:
  python -m activemlp_jax.prepare_data imagenet2012 ~/Downloads
  python -m activemlp_jax.prepare_data tfrecord /data/tfds/imagenet2012/5.1.0 --data-dir /data/new
  python -m activemlp_jax.prepare_data folder ~/photos my_photos
  python -m activemlp_jax.prepare_data tfds beans

To train on the result, use `--config.data.name=tfds:NAME` and set the environment variable
TFDS_DATA_DIR to the folder given by --data-dir.
"""

import argparse
import os
from pathlib import Path

from rich.console import Console

from activemlp_jax.command_line import LIMITS, Parser, check_range
from activemlp_jax.utils.errors import errors_in_one_line


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def main() -> None:
    """Parse the command line and run the command."""
    parser = Parser(
        prog="python -m activemlp_jax.prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    imagenet = commands.add_parser("imagenet2012", help="from the official tar files")
    tfrecord = commands.add_parser("tfrecord", help="from a copy in TFRecord files")
    folder = commands.add_parser("folder", help="from class folders of images")
    download = commands.add_parser("tfds", help="let tensorflow-datasets do it")
    for command, source in (
        (imagenet, "folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"),
        (tfrecord, "folder of one version, such as imagenet2012/5.1.0"),
        (folder, "folder with class folders, or with one of these per split"),
    ):
        command.add_argument("source", metavar="FOLDER", type=_absolute, help=source)
        command.add_argument(
            "--num-threads",
            type=int,
            default=os.cpu_count(),
            help="threads that write (one per CPU)",
        )
    folder.add_argument("name", metavar="NAME", help="name of the new dataset, such as my_photos")
    download.add_argument("name", metavar="NAME", help="name of one of its datasets, such as beans")
    for command in (imagenet, tfrecord, folder, download):
        command.add_argument(
            "--data-dir",
            type=_absolute,
            default=os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"),
            help="folder of your datasets (TFDS_DATA_DIR, or else ~/tensorflow_datasets)",
        )
    arguments = parser.parse_args()
    with errors_in_one_line(arguments.data_dir):
        try:
            prepare(arguments)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on with what is missing")
            raise


def prepare(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    from activemlp_jax.data import preparation  # slow to import, and --help does not need it

    if arguments.command == "tfds":
        preparation.prepare_tfds(arguments.name, arguments.data_dir, Console())
        return
    source, threads = arguments.source, arguments.num_threads
    check_range("--num-threads", threads, 1, LIMITS["num_threads"][1])
    where = arguments.data_dir, threads, Console()
    if arguments.command == "imagenet2012":
        preparation.prepare_imagenet(source, *where)
    elif arguments.command == "tfrecord":
        preparation.prepare_tfrecord(source, *where)
    else:
        preparation.prepare_folder(source, arguments.name, *where)


if __name__ == "__main__":
    main()
