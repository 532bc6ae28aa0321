"""Runs of a command's `main` in the test process, which saves the seconds that imports take."""

import contextlib
import io
import sys
from collections.abc import Callable
from subprocess import CompletedProcess
from unittest import mock


def run_main(main: Callable[[], None], *arguments: object) -> CompletedProcess[str]:
    """Run `main` as a process would, with these arguments; its name in messages is 'command'."""
    argv = ["command", *map(str, arguments)]
    output, errors, status = io.StringIO(), io.StringIO(), 0
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            # This is a setting of the whole process.
            mock.patch.object(sys.modules[main.__module__], "keep_freed_memory", create=True),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            main()
    except SystemExit as exit_error:
        status = int(exit_error.code or 0)
    return CompletedProcess(argv, status, output.getvalue(), errors.getvalue())


def error_line(main: Callable[[], None], *arguments: object) -> str:
    """Run `main`, check that it prints one error line and exits with 2; return the line."""
    result = run_main(main, *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result
    (line,) = result.stderr.splitlines()
    assert line.startswith("command: error: ")
    return line
