"""The one kind of error whose message is meant for the person at the keyboard."""

import sys
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Something the user can mend; commands print its one line and stop."""


def exit_with(message: object) -> NoReturn:
    """Print one line to standard error, naming the command, and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)
