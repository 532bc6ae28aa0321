"""JSON: from files that somebody else may have written, within limits; and a line to print."""

import json
import math
import os
import re
import sys
from typing import Any, NoReturn

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import read_file

MOST_BYTES = 16 * 2**20
MOST_DEPTH = 32
MOST_DIGITS = 19  # of an integer: those of 64 bits

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def parse_json(text: str | bytes, name: object) -> Any:
    """Parse JSON; its numbers are finite and fit into 64 bits.

    Args:
      text: JSON in UTF-8.
      name: what to call it in an error.

    Raises:
      UserError: it is too long, too deeply nested, not JSON, or has such a number.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{name} has {len(text):,} bytes, expected at most {MOST_BYTES:,}")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        depth = _depth(text)
        if depth > MOST_DEPTH:
            raise ValueError(f"nested {depth} levels deep, expected at most {MOST_DEPTH}")
        return json.loads(
            text, parse_int=_integer, parse_float=_floating, parse_constant=_not_a_number
        )
    except ValueError as error:
        raise UserError(f"{name} is not readable as JSON: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read and parse a regular file; raises UserError as `read_file` and `parse_json`."""
    return parse_json(read_file(path, MOST_BYTES), path)


def expect(value: Any, name: str, kind: Any, low: float, high: float) -> Any:
    """Return `value` if it is a number of that kind from `low` to `high`, else raise ValueError.

    Booleans do not count as numbers; NaN is always refused.
    """
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} is {short(value)}, expected a number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {short(value)}, expected {low:,} to {high:,}")
    return value


def json_line(record: Any, name: object) -> str:
    """Write JSON on one line, letters as they are where standard output can show them.

    Raises:
      UserError: a number of the record, which is called `name`, is not finite.
    """
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # such as names of files that are not text
        return json.dumps(record)
    except ValueError as error:
        raise UserError(
            f"{name} has a number that is not finite, which JSON cannot express"
        ) from error
    # What is not printable could steer a terminal.
    return line if line.isprintable() else json.dumps(record)


def short(value: object, most: int = 80) -> str:
    """The value as Python writes it, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _depth(text: str) -> int:
    """How deep the brackets outside strings are nested; parsing them would recurse as deep."""
    depth = deepest = 0
    for character in re.sub(r"[^][{}]", "", _STRING.sub("", text)):
        depth += 1 if character in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, expected at most {MOST_DIGITS}")
    return int(digits)


def _floating(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is not finite in 64 bits")
    return value


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
