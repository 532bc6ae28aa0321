"""The one kind of error whose message is meant for the person at the keyboard."""

import sys
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Something the user can mend; commands print its one line and stop."""


def exit_with(message: object) -> NoReturn:
    """Print one line to standard error, naming the command, and exit with status 2.

    Names out of files may hold anything; what is not printable becomes a question mark.
    """
    line = " ".join(str(message).split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)
