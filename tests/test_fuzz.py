"""Every reader reads damaged and hostile files, or refuses them in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Tests in groups start first. This one takes long, and would be the last to finish.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("recipe")]

FUZZ = Path(__file__).parent / "helpers" / "fuzz.py"


def test_some_inputs_of_every_kind_are_read_or_refused():
    count = 54  # three of each kind
    done = subprocess.run(
        [sys.executable, str(FUZZ), f"--inputs={count}", "--seed=1"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{count} inputs, 0 failures" in done.stdout
