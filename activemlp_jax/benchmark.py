"""What the models cost.

Example:
  python -m activemlp_jax.benchmark table --image-size 384
"""

import argparse

from rich.console import Console
from rich.table import Table

from activemlp_jax.errors import exit_with
from activemlp_jax.models.backbone import create_model, list_models
from activemlp_jax.models.counting import count_cost


def cost_table(names: list[str], image_size: int) -> Table:
    """Parameters and multiply-adds of the models `names` for one square image.

    Raises:
      ValueError: the models take no images of that size, or a name is unknown.
    """
    table = Table(title=f"one image of {image_size} x {image_size}, 1000 classes")
    table.add_column("model")
    for heading in ("parameters", "GMACs conv+linear", "GMACs as published"):
        table.add_column(heading, justify="right")
    for name in names:
        cost = count_cost(create_model(name), image_size, image_size)
        table.add_row(
            name,
            f"{cost.parameters:,}",
            f"{cost.macs / 1e9:.3f}",
            f"{cost.published_macs / 1e9:.3f}",
        )
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m activemlp_jax.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="parameters and multiply-adds, counted from shapes")
    table.add_argument("--image-size", type=int, default=224, help="side in pixels (224)")
    table.add_argument(
        "--model", action="append", choices=list_models(), help="only this one; may be repeated"
    )
    arguments = parser.parse_args()
    try:
        costs = cost_table(arguments.model or list_models(), arguments.image_size)
    except ValueError as error:
        exit_with(error)
    Console().print(costs)


if __name__ == "__main__":
    main()
