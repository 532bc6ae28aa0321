"""Parse JSON from untrusted files within limits, and print JSON on one line."""

import itertools
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
MOST_DIGITS = 19  # of an integer; enough for 64 bits

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def parse_json(text: str | bytes, name: object) -> Any:
    """Parse JSON, given as text or as bytes in UTF-8; error messages call it `name`.

    Raises:
      UserError: the text is too long, too deeply nested or not JSON, a number is not finite in 64
        bits, or an integer has more than `MOST_DIGITS` digits.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{name} has {len(text):,} bytes, expected at most {MOST_BYTES:,}")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        brackets = re.sub(r"[^][{}]", "", _STRING.sub("", text))
        levels = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
        depth = max(levels, default=0)  # the parser recurses to this depth
        if depth > MOST_DEPTH:
            raise ValueError(f"nested {depth} levels deep, expected at most {MOST_DEPTH}")
        return json.loads(
            text, parse_int=_integer, parse_float=_floating, parse_constant=_not_a_number
        )
    except ValueError as error:
        raise UserError(f"{name} is not readable as JSON: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read and parse a regular file; raise UserError as `read_file` and `parse_json` do."""
    return parse_json(read_file(path, MOST_BYTES), path)


def expect(value: Any, name: str, kind: Any, low: float, high: float) -> Any:
    """Return `value` if it is a number of type `kind` from `low` to `high`, else raise ValueError.

    Booleans do not count as numbers, and NaN is always refused. `name` is for the message.
    """
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} is {short(value)}, expected a number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {short(value)}, expected {low:,} to {high:,}")
    return value


def json_line(record: Any, name: object) -> str:
    """Format a record as one line of JSON, escaping only what standard output cannot show.

    Raises UserError, which calls the record `name`, if a number is not finite.
    """
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # such as file names that are not valid text
        return json.dumps(record)
    except ValueError as error:
        raise UserError(
            f"{name} has a number that is not finite, which JSON cannot express"
        ) from error
    # Unprintable characters could control a terminal.
    return line if line.isprintable() else json.dumps(record)


def short(value: object, most: int = 80) -> str:
    """Return the `repr` of a value, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


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
