"""Errors that are meant for the user, and how commands report them."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """A problem the user can fix; commands print its message as one line and exit."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """Raised when a run was asked to stop and has saved its state.

    `status` is the exit status, 128 plus the number of the signal, as in shells.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def install_command(extra: str) -> str:
    """Return the command, for the project folder, that installs optional dependencies `extra`."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def one_line(message: object) -> str:
    """Return `message` as one line; unprintable characters become question marks."""
    line = " ".join(str(message).split())
    return "".join(character if character.isprintable() else "?" for character in line)


def command_name() -> str:
    """Return the name of the running command, which starts its error messages."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def exit_with(message: object) -> NoReturn:
    """Print command name and message as one line to standard error; exit with status 2."""
    print(f"{command_name()}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def errors_in_one_line(output: object = "") -> Iterator[None]:
    """Run the body of a command; report errors in its input or output as one line.

    An `OSError` without a file name is attributed to `output`. Errors in the command's own code
    keep their traceback. Ctrl-C, SIGTERM and SIGHUP end the process, with the exit status that
    shells expect, after the code inside has cleaned up.
    """
    previous = {
        number: signal.signal(number, lambda number, _: sys.exit(128 + number))
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # `nohup` ignores SIGHUP
    }
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        exit_with(error)
    except BrokenPipeError:  # the reader, such as `head`, has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        exit_with(describe_os_error(error, output))
    except MemoryError as error:
        exit_with(f"there is not enough memory: {str(error) or 'an input is too large'}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe_os_error(error: OSError, path: object = "") -> str:
    """Return one line that says what failed and why; `path` is used if `error` names no file."""
    path = error.filename or path
    reason = error.strerror or str(error) or type(error).__name__
    return f"{path}: {reason}" if path else reason
