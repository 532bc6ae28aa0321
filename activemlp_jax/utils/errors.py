"""The one kind of error whose message is meant for the person at the keyboard."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
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


def command_name() -> str:
    """The name of the running command, as it begins error messages."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def exit_with(message: object) -> NoReturn:
    """Print one line to standard error, naming the command, and exit with status 2.

    What is not printable becomes a question mark.
    """
    print(f"{command_name()}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def errors_in_one_line(output: object = "") -> Iterator[None]:
    """Run a command's work inside: what goes wrong with its input or output becomes one line.

    Errors of a command's own code keep their traceback. Ctrl-C, SIGTERM and SIGHUP end the
    process, with the status that shells expect, after everything inside has cleaned up.

    Args:
      output: what the command writes, to name where the system does not say which file failed.
    """
    before = {
        number: signal.signal(number, _stop)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as `nohup` leaves SIGHUP
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
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_os_error(error: OSError, place: object = "") -> str:
    """What failed and why, as one line; `place` where the error does not name a file."""
    place = error.filename or place
    reason = error.strerror or str(error) or type(error).__name__
    return f"{place}: {reason}" if place else reason


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    sys.exit(128 + number)
