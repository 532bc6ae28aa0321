"""JSON is parsed within limits, and an error of one line names the limit that is exceeded."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.json_files import (
    MOST_BYTES,
    MOST_DEPTH,
    expect,
    parse_json,
    read_json,
    short,
)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, {"b": 'brackets [[[ in "strings" {{ \\'}]},
        [2**63, -(2**63), 1e308, "ä\u2028"],
        "[" * 1000,
    ],
)
def test_what_json_dumps_writes_is_read(value: Any):
    assert parse_json(json.dumps(value), "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "x") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "nested 33 levels deep"),
        ("[" * 10**6, "nested 1000000 levels deep"),
        ('{"a":' * 10**5, "nested 100000 levels deep"),
        ("9" * 400, "a number has 400 digits, expected at most 19"),
        ("9" * 10**5, "a number has 100000 digits"),
        ("[1e400]", "the number 1e400 is not finite"),
        ("[-1e999]", "the number -1e999 is not finite"),
        ("[NaN]", "NaN is not a number of JSON"),
        ("[-Infinity]", "-Infinity is not a number of JSON"),
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('"a', "Unterminated string"),
        (b'"\xff"', "codec can't decode byte 0xff"),
        (" " * (MOST_BYTES + 1), "has 16,777,217 bytes, expected at most 16,777,216"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) or len(value) > 60 else str(value),
)
def test_what_is_beyond_the_limits_is_named(text: str | bytes, message: str):
    with pytest.raises(UserError, match=f"^model.json .*{re.escape(message)}") as error:
        parse_json(text, "model.json")
    assert len(str(error.value)) < 300


def test_a_file_is_named_by_its_path(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(UserError, match=f"^{path} is not readable as JSON"):
        read_json(path)


@pytest.mark.parametrize("value", [1, 5, 10])
def test_a_number_within_its_range_is_taken(value: int):
    assert expect(value, "depth", int, 1, 10) is value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "depth is 0, expected 1 to 10"),
        (10**9, "depth is 1000000000, expected 1 to 10"),
        (2.0, "depth is 2.0, expected a number"),
        (True, "depth is True, expected a number"),
        ("3", "depth is '3', expected a number"),
        (["x" * 1000], "depth is ['xxxx"),
    ],
)
def test_another_value_is_named(value: Any, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        expect(value, "depth", int, 1, 10)
    assert len(str(error.value)) < 150


def test_a_float_that_is_not_a_number_is_in_no_range():
    with pytest.raises(ValueError, match="mean is nan, expected 0 to 1"):
        expect(float("nan"), "mean", (int, float), 0, 1)


def test_a_long_value_is_cut():
    assert short("a" * 100) == "'" + "a" * 76 + "..."
    assert short([1, 2]) == "[1, 2]"
