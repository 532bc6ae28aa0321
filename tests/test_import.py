"""What importing the package costs."""

import subprocess
import sys


def test_import_pulls_in_neither_torch_nor_tensorflow_nor_opencv():
    program = (
        "import sys, activemlp_jax\n"
        "heavy = {'torch', 'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'cv2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]", f"imported: {result.stdout}"
