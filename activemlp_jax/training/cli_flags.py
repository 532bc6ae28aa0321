"""Parsing of command lines that take a config, and the command line of `train.py`."""

import argparse
import difflib
import inspect
import logging
import os
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from rich.console import Console

from activemlp_jax.command_line import Parser, add_host_options
from activemlp_jax.training.config import current_name, default_config, flatten
from activemlp_jax.utils.errors import Interrupted, UserError, errors_in_one_line, one_line
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_freed_memory

PROJECT = str(Path(__file__).parents[2])


def load_config(path: str) -> ConfigDict:
    """Load a config from a Python file.

    The file can import the project's other configs as `configs.NAME` from any working directory.

    Args:
      path: FILE.py, or FILE.py:VARIANT to call its `get_config` with a variant.

    Raises:
      UserError: the file does not give a config with the keys of `default_config`.
    """
    file, *variant = path.split(":", 1)
    if not Path(file).is_file():
        raise UserError(f"there is no config file {file}")
    if PROJECT not in sys.path:
        sys.path.append(PROJECT)
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise UserError("the file defines no function get_config()")
        if variant and not inspect.signature(get_config).parameters:
            raise UserError("get_config() of this file takes no variant")
        config = get_config(*variant)
        known = flatten(default_config()).keys()
        if not isinstance(config, ConfigDict) or flatten(config).keys() != known:
            raise UserError("get_config() must return default_config() with other values")
    except Exception as error:  # whatever the user's file does wrong
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path}: {kind}{one_line(error)}") from error
    return config


def config_name(path: str) -> str:
    """Return a config's name from its path: the file's stem and, after '_', the variant if any."""
    file, *variant = path.split(":", 1)
    return "_".join([Path(file).stem, *variant])


def parse_arguments(
    parser: Parser, default_path: Path | None = None
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parse the command line of a command that takes a config.

    ml_collections parses the options --config.KEY=VALUE, each to the type of the key's current
    value. With --help, the keys of the config are printed as well, and the process exits.

    Args:
      parser: a parser with the command's other options, made with `add_help=False`.
      default_path: config file to use without --config; None if --config is required.

    Returns:
      The parsed options, whose `config` is the path of the config file, and the config itself.
    """
    parser.add_argument(
        "--config",
        default=str(default_path or ""),
        metavar="FILE[:VARIANT]",
        help="config file; --config.KEY=VALUE changes a key of it",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and all keys")
    arguments, others = parser.parse_known_args()
    if arguments.help:
        config = load_config(arguments.config) if arguments.config else default_config()
        parser.print_help()
        print(f"\nKeys of {arguments.config or 'a config'}, changed by --config.KEY=VALUE:\n")
        for key, value in flatten(config).items():
            print(f"  --config.{key}={value!r}")
        sys.exit(0)
    if not arguments.config:
        raise UserError("--config is missing, expected a config file such as configs/digits.py")
    config = load_config(arguments.config)
    _set_keys(config, others, arguments.config)
    return arguments, config


def _set_keys(config: ConfigDict, words: Sequence[str], path: str) -> None:
    """Set keys of `config` from `words` such as --config.KEY=VALUE; refuse other words."""
    keys = flatten(config)
    for word in words:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", word)
        if match and not any(f"{key}.".startswith(f"{match[1]}.") for key in keys):
            close = difflib.get_close_matches(current_name(match[1]), keys, n=1)
            hint = f"; did you mean config.{close[0]}?" if close else ""
            raise UserError(f"{path} has no key config.{match[1]}{hint}")
    flag_values, argv = flags.FlagValues(), [sys.argv[0], *words]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
        rest = flag_values(argv)[1:]
    except (flags.Error, IndexError, TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if rest:
        raise UserError(
            f"unexpected argument {rest[0]!r}; settings are given as --config.KEY=VALUE"
        )


def run(description: str | None, default_path: Path) -> None:
    """Run `train.py`: parse its command line, then train."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("--workdir", help="directory of the run (runs/NAME_OF_CONFIG)")
    add_host_options(parser)
    collect_garbage_rarely()
    keep_freed_memory()
    # Drop Orbax's advice to save less often: that is up to the config.
    logging.getLogger("absl").addFilter(lambda record: "previous save" not in str(record.msg))
    with errors_in_one_line():
        _train(*parse_arguments(parser, default_path))


def _train(arguments: argparse.Namespace, config: ConfigDict) -> None:
    name = config_name(arguments.config)
    workdir = arguments.workdir or f"runs/{name}"
    if "://" in workdir:
        raise UserError(f"--workdir is {workdir}, expected a directory of this machine")
    workdir_path = Path(workdir).expanduser()
    if not arguments.process_id:
        # Print before the imports below, which take seconds, and longer on a slow disk.
        print(one_line(f"starting: config {name}, workdir {workdir}"), flush=True)
    from activemlp_jax.distributed import hosts  # slow; --help does not need it
    from activemlp_jax.training.loop import train

    host_options = hosts.Hosts(*(getattr(arguments, field) for field in hosts.Hosts._fields))
    try:
        with hosts.connected(host_options):
            train(config, workdir_path, Console(), config_name=name)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\n{_interrupted(str(error), workdir_path)}")
        sys.exit(getattr(error, "status", 130))


def _interrupted(reason: str, workdir: Path) -> str:
    """Return a message that says what an interrupted run has saved and how to continue it."""
    reason, checkpoints = reason or "interrupted", workdir / "checkpoints"
    saved = checkpoints.is_dir() and any(name.isdigit() for name in os.listdir(checkpoints))
    if saved:
        return f"{reason}; the same command goes on from there in {one_line(workdir)}"
    return f"{reason}; nothing is saved yet, and the same command starts from the first step"
