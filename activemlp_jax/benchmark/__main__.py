"""Count the cost of models, and time models, data loading and scaling over devices.

Examples:
  python -m activemlp_jax.benchmark table --image-size 384
  python -m activemlp_jax.benchmark table --head upernet --image-size 512x2048
  python -m activemlp_jax.benchmark data --config configs/throughput.py --num-threads 2
  python -m activemlp_jax.benchmark scaling --config configs/digits.py --devices 4
  python -m activemlp_jax.benchmark model --model active_xtiny --compare
  python -m activemlp_jax.benchmark train --model active_xtiny --batch-size 16
  python -m activemlp_jax.benchmark op --csv results/op.csv
"""

import argparse
import os
import re
from collections.abc import Iterator
from functools import partial
from statistics import median

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from activemlp_jax.benchmark.command import add_commands, run
from activemlp_jax.benchmark.loading import measure
from activemlp_jax.benchmark.scaling import device_counts, measure_scaling
from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.data.base import EncodedSource
from activemlp_jax.data.sources import open_source
from activemlp_jax.models.active_mlp import create_model, list_models
from activemlp_jax.models.flops import count_cost
from activemlp_jax.models.segmentor import HEADS, create_segmentor
from activemlp_jax.training.cli_flags import load_config
from activemlp_jax.training.config import check_config
from activemlp_jax.utils.errors import UserError, errors_in_one_line
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_freed_memory


def parse_size(text: str) -> tuple[int, int]:
    """Parse '224' or '512x2048' as height and width; raise UserError for anything else."""
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    if not match:
        raise UserError(f"--image-size is {text!r}, expected a side, or HEIGHTxWIDTH as 512x2048")
    height, width = int(match[1]), int(match[2] or match[1])
    for side in (height, width):
        check_numbers({"image_size": side})
    return height, width


def cost_table(names: list[str], height: int, width: int, head: str | None = None) -> Table:
    """Make a table of the parameters and multiply-adds of models for one image.

    Args:
      names: names of classifiers, or of backbones if `head` is given.
      height: height of the image in pixels.
      width: width of the image in pixels.
      head: head of segmentation models for ADE20K; None for ImageNet classifiers.

    Raises:
      ValueError: the models do not take images of that size, or a name is unknown.
    """
    classes = f"{head}, 150" if head else "1000"
    table = Table(title=f"one image of {height} x {width}, {classes} classes")
    table.add_column("backbone" if head else "model")
    # The published figures for segmentation also count batch norms and pooling.
    last = "with LayerNorms" if head else "as published"
    for heading in ("parameters", "GMACs conv+linear", f"GMACs {last}"):
        table.add_column(heading, justify="right")
    for name in names:
        model = create_segmentor(name, head) if head else create_model(name)
        cost = count_cost(model, height, width)
        table.add_row(
            name,
            f"{cost.parameters:,}",
            f"{cost.macs / 1e9:.3f}",
            f"{cost.published_macs / 1e9:.3f}",
        )
    return table


def print_data_rates(
    config: str,
    data: str | None,
    batch_size: int | None,
    num_threads: int | None,
    num_workers: int | None,
    steps: int,
    rounds: int,
) -> None:
    """Run the command `data`: print images per second, and the ratio to plain Pillow.

    Raises:
      UserError: the config is invalid, or does not train on random crops of image files.
    """
    settings = load_config(config)
    for key, value in (
        ("data.name", data),
        ("data.num_threads", num_threads),
        ("data.num_workers", num_workers),
        ("batch_size", batch_size),
    ):
        if value is not None:
            settings.update_from_flattened_dict({key: value})
    check_config(settings)
    source = open_source(settings.data.name, settings.data.train_split)
    if settings.augment.policy != "random_resized_crop" or not isinstance(source, EncodedSource):
        raise UserError(
            f"{config} does not train on random crops of image files, which this command times"
        )
    flags.FLAGS.mark_as_parsed()  # for Grain's worker processes
    size = settings.data.image_size
    workers = (
        f"{settings.data.num_workers} process(es)"
        if settings.data.num_workers
        else f"{settings.data.num_threads} thread(s)"
    )
    say = partial(print, flush=True)
    say(f"{settings.data.name}: {settings.batch_size} images of {size} x {size} a batch, {workers}")
    rates = measure(source, settings, steps, rounds)
    for name, values in (("this pipeline", rates.ours), ("plain Pillow", rates.plain)):
        say(
            f"{name:14}{median(values):9,.0f} images/s, median of {rounds} "
            f"({min(values):,.0f} to {max(values):,.0f})"
        )
    say(f"{'ratio':14}{median(rates.ours) / median(rates.plain):9.2f}")


def print_scaling(config: str, devices: int, classes: int, steps: int, rounds: int) -> None:
    """Run the command `scaling`: print images per second for each number of devices.

    Raises:
      UserError: the config is invalid, or the machine has fewer devices.
    """
    jax.config.update("jax_num_cpu_devices", devices)  # for machines without an accelerator
    settings = load_config(config)
    check_config(settings)
    rates = measure_scaling(settings, classes, device_counts(devices), steps, rounds)
    kind = jax.devices()[0].device_kind
    print(
        f"{config}, {settings.batch_size} images a step and device, {kind}, {os.cpu_count()} cores"
    )
    for line in scaling_lines(rates):
        print(line)


def scaling_lines(rates: dict[int, list[float]]) -> Iterator[str]:
    """Yield a line per number of devices: images per second, and the percentage of ideal."""
    alone = median(rates[1])
    for count, values in rates.items():
        rate = median(values)
        yield (
            f"{count:4} device(s) {rate:9,.1f} images/s, median of {len(values)} "
            f"({min(values):,.1f} to {max(values):,.1f}); {rate / alone:.2f} times one device's, "
            f"{100 * rate / alone / count:.0f}% of ideal"
        )


def main() -> None:
    """Run the command line."""
    parser = Parser(
        prog="python -m activemlp_jax.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="parameters and multiply-adds, counted from shapes")
    table.add_argument("--image-size", default="224", help="side in pixels, or HEIGHTxWIDTH (224)")
    table.add_argument(
        "--head", choices=list(HEADS), help="segmentation models with this head, not classifiers"
    )
    table.add_argument(
        "--model", action="append", choices=list_models(), help="only this one; may be repeated"
    )
    data = commands.add_parser(
        "data",
        help="images per second of data loading alone",
        description="Times the loading of a config's batches on this host, without training, and "
        "that of a plain implementation which reads, decodes and transforms every sample with "
        "Pillow alone, in as many threads, to the same pixels.",
    )
    data.add_argument(
        "--config", required=True, metavar="FILE", help="such as configs/throughput.py"
    )
    data.add_argument("--data", metavar="NAME", help="dataset (the config's)")
    data.add_argument("--batch-size", type=int, help="images per batch (the config's)")
    data.add_argument("--num-threads", type=int, help="threads that read (the config's)")
    data.add_argument("--num-workers", type=int, help="processes instead of threads (the config's)")
    data.add_argument("--steps", type=int, default=5, help="batches per round (5)")
    data.add_argument("--rounds", type=int, default=3, help="rounds of each, in turns (3)")
    scaling = commands.add_parser(
        "scaling",
        help="images per second on 1, 2, 4 and so on of this machine's devices",
        description="Times the train step, without data loading, on some of this machine's "
        "devices, each with the config's batch size. CPU devices share the machine's cores.",
    )
    scaling.add_argument(
        "--config", required=True, metavar="FILE", help="such as configs/digits.py"
    )
    scaling.add_argument("--devices", type=int, required=True, help="largest number to use")
    scaling.add_argument("--classes", type=int, default=10, help="classes of the model (10)")
    scaling.add_argument("--steps", type=int, default=10, help="steps per round (10)")
    scaling.add_argument("--rounds", type=int, default=3, help="rounds of each, in turns (3)")
    add_commands(commands)
    arguments = vars(parser.parse_args())
    keep_freed_memory()  # as train.py does
    collect_garbage_rarely()
    command = arguments.pop("command")
    with errors_in_one_line(arguments.get("csv") or ""):
        try:
            if command == "table":
                print_costs(**arguments)
                return
            check_numbers(arguments)
            if command == "scaling":
                print_scaling(**arguments)
            elif command == "data":
                print_data_rates(**arguments)
            else:
                run(command, arguments)
        except ValueError as error:  # from an unknown model or a wrong image size
            raise UserError(str(error)) from error


def print_costs(model: list[str] | None, image_size: str, head: str | None) -> None:
    """Run the command `table`."""
    Console().print(cost_table(model or list_models(), *parse_size(image_size), head))


if __name__ == "__main__":
    main()
