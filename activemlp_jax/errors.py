"""The one kind of error whose message is meant for the person at the keyboard."""

import sys
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Something the user can mend; commands print its one line and stop."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and has saved its state.

    Args:
      message: for the person at the keyboard.
      status: to exit with; 128 and the number of the signal, as shells count.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def install_command(extra: str) -> str:
    """What installs an extra in the project's folder, for messages; the pages say the same."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def one_line(message: object) -> str:
    """Fit to be printed: names out of files may hold anything."""
    line = " ".join(str(message).split())
    return "".join(character if character.isprintable() else "?" for character in line)


def exit_with(message: object) -> NoReturn:
    """Print one line to standard error, naming the command, and exit with status 2.

    What is not printable becomes a question mark.
    """
    print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)
