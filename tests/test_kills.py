"""Killed at any moment, a run of two processes loses nothing; `tests/kills.py` is the long form."""

import random
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
from kills import SAVING, STEPPING, Kill, torment


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_ends_as_one_that_is_not(tmp_path: Path):
    kills = (
        Kill(SAVING, SIGKILL, (0,)),
        Kill(STEPPING, SIGTERM, (1,)),
    )
    torment(tmp_path, kills, random.Random(0))
