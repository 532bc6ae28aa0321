"""Errors are one line, whatever they quote."""

import pytest

from activemlp_jax.errors import exit_with


def test_an_error_is_one_printable_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        exit_with(ValueError("a key\nof two lines and \x1b[31mcolour, größer"))
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.endswith("error: a key of two lines and ?[31mcolour, größer\n")
    assert line.count("\n") == 1
