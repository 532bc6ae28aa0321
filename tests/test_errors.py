"""Errors are one line, whatever they quote, and say the same as the pages."""

import re
import tomllib

import pytest
from documents import ROOT

from activemlp_jax.errors import exit_with, install_command


def test_an_error_is_one_printable_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        exit_with(ValueError("a key\nof two lines and \x1b[31mcolour, größer"))
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.endswith("error: a key of two lines and ?[31mcolour, größer\n")
    assert line.count("\n") == 1


def test_messages_install_extras_that_there_are_as_the_pages_do():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = [path.read_text() for path in (ROOT / "activemlp_jax").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"install_command\('(\w+)'\)", text)}
    assert {"torch", "parquet", "tpu"} <= named <= set(extras["optional-dependencies"])
    assert install_command("onnx") in (ROOT / "docs" / "export.md").read_text()
