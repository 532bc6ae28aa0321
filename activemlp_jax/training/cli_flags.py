"""Command lines of programs that take a config, with one-line errors for wrong flags."""

import difflib
import os
import runpy
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from activemlp_jax.training.config import default_config, flatten
from activemlp_jax.utils.errors import (
    Interrupted,
    UserError,
    errors_in_one_line,
    exit_with,
    one_line,
)
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_freed_memory

# The fields of hosts.Hosts: name, type, default, help.
HOST_OPTIONS: tuple[tuple[str, type, Any, str], ...] = (
    (
        "coordinator",
        str,
        "",
        "HOST:PORT of the first of several processes. SLURM, Open MPI and TPU pods need none of "
        "these four.",
    ),
    ("num_processes", int, None, "Number of processes that share the work."),
    ("process_id", int, None, "Number of this process, from 0."),
    ("timeout", int, 300, "Seconds the processes wait for each other to start."),
)
_HOST_NAMES = tuple(name for name, *_ in HOST_OPTIONS)
HELP_FLAGS = ("help", "helpfull", "helpshort", "?")


def _keys(config: ConfigDict, prefix: str = "config.") -> list[str]:
    """Names of all keys and groups of keys."""
    keys = []
    for key, value in config.items():
        keys += [
            prefix + key,
            *(_keys(value, f"{prefix}{key}.") if hasattr(value, "items") else []),
        ]
    return keys


def load_config(path: str) -> ConfigDict:
    """Load a config from a Python file; raise UserError if the file does not give one."""
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config() if get_config else None
    except Exception as error:  # whatever the user's file does wrong
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {type(error).__name__}: {reason}") from error
    if get_config is None:
        raise UserError(f"{path} defines no function get_config()")
    if not isinstance(config, ConfigDict) or set(_keys(config)) != set(_keys(default_config())):
        raise UserError(f"{path}: get_config() must return default_config() with other values")
    return config


def _find_config_flags(argv: list[str], default_path: Path | None) -> tuple[str, list[str]]:
    """Find the path of the config file, '' if none is given, and the keys that flags override."""
    path, overrides = str(default_path or ""), []
    for position, argument in enumerate(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if name == "config":
            path = value or " ".join(argv[position + 1 : position + 2])
        elif name.startswith("config."):
            overrides.append(name)
    return path, overrides


def _check_keys(argv: list[str], default_path: Path | None) -> None:
    """Raise UserError for a broken config file or an override of a key that it lacks."""
    path, overrides = _find_config_flags(argv, default_path)
    if not path:
        raise UserError("--config is missing, expected a config file such as configs/digits.py")
    known = _keys(load_config(path))
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{path} has no key {name}{hint}")


def describe_keys(config: ConfigDict) -> str:
    """List all keys with their values for --help, one paragraph per group."""
    groups: dict[str, list[str]] = {}
    for key, value in flatten(config.to_dict()).items():
        group, _, name = key.rpartition(".")
        # No-break spaces, so that a line does not break inside a tuple.
        groups.setdefault(group, []).append(f"{name}={value!r}".replace(" ", "\N{NO-BREAK SPACE}"))
    paragraphs = [
        textwrap.fill(
            " ".join(pairs),
            width=100,
            initial_indent=f"  --config.{group}{'.' * bool(group)}  ",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for group, pairs in groups.items()
    ]
    return "\n".join(paragraphs).replace("\N{NO-BREAK SPACE}", " ")


def _print_keys(default_path: Path | None) -> None:
    """Print the keys of the config file given on the command line, for --help."""
    path, _ = _find_config_flags(sys.argv[1:], default_path)
    config = load_config(path) if path else default_config()
    print(f"\nKeys of {path or 'a config'}, changed by --config.KEY=VALUE:\n")
    print(describe_keys(config))


def start(
    main: Callable[[], None], own_flags: Sequence[str], default_path: Path | None = None
) -> NoReturn:
    """Parse the flags of a command that takes a config, run it and exit the process.

    A UserError, from the flags or from `main`, is printed as one line.

    Args:
      main: the command; it gets the config from `chosen_config`.
      own_flags: names of other flags to show in --help; they must be defined already.
      default_path: config file to use without --config; None if --config is required.
    """
    collect_garbage_rarely()
    asks_for_help = any(
        argument.startswith("-") and argument.lstrip("-") in HELP_FLAGS for argument in sys.argv[1:]
    )
    if not asks_for_help:
        try:
            _check_keys(sys.argv[1:], default_path)
        except UserError as error:
            exit_with(error)
    config_flags.DEFINE_config_file(
        "config",
        str(default_path) if default_path else None,
        "Config file; --config.KEY=VALUE changes a key of it.",
    )
    for name in ("config", *own_flags):
        # --help shows the key flags of the main module.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except SystemExit:  # absl has printed --help, and would exit with status 1
            with errors_in_one_line():
                _print_keys(default_path)
            sys.exit(0)
        except (flags.Error, TypeError, ValueError) as error:
            exit_with(" ".join(str(error).split()))
        if len(rest) > 1:
            exit_with(f"unexpected argument {rest[1]!r}; settings are given as --config.KEY=VALUE")
        if flags.FLAGS["verbosity"].using_default_value:
            # By default, absl shows what Orbax logs about every checkpoint.
            flags.FLAGS["verbosity"].value = logging.WARNING
            flags.FLAGS["verbosity"].using_default_value = False
            # Drop Orbax's advice to save less often: that is up to the config.
            logging.get_absl_logger().addFilter(
                lambda record: "previous save" not in str(record.msg)
            )
        return rest

    def run_main(argv: list[str]) -> None:
        del argv
        with errors_in_one_line():
            main()

    app.run(run_main, flags_parser=parse)


def chosen_config() -> tuple[str, ConfigDict]:
    """The path of the config file, and its config with the overrides of the command line."""
    return config_flags.get_config_filename(flags.FLAGS["config"]), flags.FLAGS.config


def run(default_path: Path) -> NoReturn:
    """Parse the flags of `train.py`, train and exit the process.

    Args:
      default_path: config file to use without --config.
    """
    flags.DEFINE_string("workdir", None, "Directory of the run; default: runs/NAME_OF_CONFIG.")
    for name, kind, default, text in HOST_OPTIONS:
        if kind is int:
            flags.DEFINE_integer(name, default, text, lower_bound=0)
        else:
            flags.DEFINE_string(name, default, text)
    keep_freed_memory()
    start(_train, ("workdir", *_HOST_NAMES), default_path)


def _train() -> None:
    path, config = chosen_config()
    name = Path(path).stem
    workdir = flags.FLAGS.workdir or f"runs/{name}"
    if "://" in workdir:
        raise UserError(f"--workdir is {workdir}, expected a directory of this machine")
    host_options: dict[str, Any] = {name: flags.FLAGS[name].value for name in _HOST_NAMES}
    workdir_path = Path(workdir).expanduser()
    if not host_options["process_id"]:
        # Print before the imports below, which take seconds, and longer on a slow disk.
        print(one_line(f"starting: config {name}, workdir {workdir}"), flush=True)
    from activemlp_jax.distributed import hosts  # slow; --help does not need it
    from activemlp_jax.training.loop import train

    try:
        with hosts.connected(hosts.Hosts(**host_options)):
            train(config, workdir_path, Console(), config_name=name)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\n{_interrupted(str(error), workdir_path)}")
        sys.exit(getattr(error, "status", 130))


def _interrupted(reason: str, workdir: Path) -> str:
    """Say what an interrupted run has saved and how to continue it."""
    reason, checkpoints = reason or "interrupted", workdir / "checkpoints"
    saved = checkpoints.is_dir() and any(name.isdigit() for name in os.listdir(checkpoints))
    if saved:
        return f"{reason}; the same command goes on from there in {one_line(workdir)}"
    return f"{reason}; nothing is saved yet, and the same command starts from the first step"
