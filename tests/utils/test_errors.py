"""Errors are one line, whatever they quote, and agree with the documentation."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest
from documents import ROOT

from activemlp_jax.utils.errors import UserError, errors_in_one_line, exit_with, install_command


def test_an_error_is_one_printable_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        exit_with(ValueError("a key\nof two lines and \x1b[31mcolor, größer"))
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.endswith("error: a key of two lines and ?[31mcolor, größer\n")
    assert line.count("\n") == 1


def test_messages_install_extras_that_there_are_as_the_pages_do():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = [path.read_text() for path in (ROOT / "activemlp_jax").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"install_command\('(\w+)'\)", text)}
    assert {"torch", "parquet", "tpu"} <= named <= set(extras["optional-dependencies"])
    assert install_command("onnx") in (ROOT / "docs" / "export.md").read_text()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a.pth is empty"), "a.pth is empty"),
        (PermissionError(13, "Permission denied", "a.png"), "a.png: Permission denied"),
        (OSError(28, "No space left on device"), "out: No space left on device"),
        (OSError("cannot write mode F as PNG"), "out: cannot write mode F as PNG"),
        (MemoryError(), "there is not enough memory: an input is too large"),
        (MemoryError("3 GiB for x"), "there is not enough memory: 3 GiB for x"),
    ],
)
def test_an_error_of_input_or_output_is_one_line_and_status_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped, errors_in_one_line("out"):
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {line}\n")


def test_an_error_of_the_code_itself_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), errors_in_one_line():
        raise ZeroDivisionError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_after_it_has_cleaned_up(number: signal.Signals, tmp_path: Path):
    script = """
        import time
        from pathlib import Path
        from activemlp_jax.utils.errors import errors_in_one_line
        from activemlp_jax.utils.files import write_aside

        with errors_in_one_line(), write_aside(Path("file")) as aside:
            aside.write_text("half")
            Path("begun").touch()
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_a_reader_who_has_enough_is_no_error():
    script = """
        from activemlp_jax.utils.errors import errors_in_one_line

        with errors_in_one_line():
            for _ in range(100_000):
                print("a line")
    """
    command = f"{sys.executable} -c '{textwrap.dedent(script)}' | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("a line\n", "")
