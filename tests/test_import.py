"""Imports of the package do not load slow, rarely used modules."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["activemlp_jax", "activemlp_jax.training.loop"])
def test_import_pulls_in_nothing_that_is_slow_and_rarely_used(module: str):
    program = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'cv2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]", f"imported: {result.stdout}"
