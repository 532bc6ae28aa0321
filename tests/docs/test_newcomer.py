"""The first pages run as they are printed, and so does the notebook.

The blocks of README.md and docs/first_steps.md go into bash one after the other, in a fresh copy of
the project. What differs from a newcomer's machine:

- pip installs nothing: `.venv` is new and finds the packages of the environment of the tests;
- `make demo` trains a smaller model for fewer epochs, by DEMO_FLAGS, and LLVM does not optimize;
- blocks with `NOT_RUN` are left to other tests.
"""

import os
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import Passage, output_lines, steps
from processes import ROOT, SMALL

# One process with tests/commands/test_train.py: whichever comes second finds the compiled programs
# in JAX's cache.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]

# Runs the cells of a notebook, and shows the last value of each, as Jupyter does.
RUN_NOTEBOOK = """
import ast, json, sys
names = {}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        *statements, last = ast.parse("".join(cell["source"])).body
        shows = isinstance(last, ast.Expr)
        rest = statements if shows else [*statements, last]
        exec(compile(ast.Module(rest, []), cell["id"], "exec"), names)
        value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names) if shows else 0
        is_picture = hasattr(value, "_repr_png_")
        print(f"picture {value.size} {len(value._repr_png_())}" if is_picture else repr(value))
"""


# CI runs `make test` itself. A published model compiles for long; test_docs computes its shapes.
NOT_RUN = ("make test", "am.create_model(")
# Starts a line that is printed only if the last epoch is not the best.
BY_CHANCE = "best_model is from step"
PAGES = ("README.md", "docs/first_steps.md")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the project, as `git clone` does, and add the `.venv` that `make` expects."""
    place = tmp_path_factory.mktemp("newcomer") / "activemlp-jax"
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    environment = place / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "newcomer.pth").write_text("\n".join([str(place), *site.getsitepackages()]))
    (environment / "demo-installed").touch()
    return place


def variables() -> dict[str, str]:
    """Return the environment of a newcomer's shell, with the tests' cache and a short demo."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return inherited | {"DEMO_FLAGS": shlex.join(SMALL)}


def script(block: Passage) -> str:
    """Return the bash input that runs a block of a page."""
    return f"python - <<'END'\n{block.text}END\n" if block.language == "python" else block.text


def follow(page: str, place: Path) -> list[tuple[Passage, str, str]]:
    """Run a page's blocks in one bash; return each with the expected and the actual output."""
    run = [step for step in steps(ROOT / page) if not any(part in step[0].text for part in NOT_RUN)]
    mark = "-- block "
    scripts = (f"echo '{mark}'\n{script(block)}" for block, _ in run)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join(scripts)], cwd=place, env=variables(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=900,
    )  # fmt: skip
    printed = result.stdout.split(mark)[1:]
    assert result.returncode == 0, f"{run[len(printed) - 1][0]}\n{printed[-1][-3000:]}"
    return [(*step, output) for step, output in zip(run, printed, strict=True)]


@pytest.fixture(scope="module")
def followed(place: Path) -> dict[str, list[tuple[Passage, str, str]]]:
    """Follow the pages in the order of the README, each in the state that the last one left."""
    return {page: follow(page, place) for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_it_is_printed_and_shows_what_it_says(
    page: str, followed: dict[str, list[tuple[Passage, str, str]]]
):
    assert followed[page]
    for block, shown, printed in followed[page]:
        lines = iter(output_lines(printed))
        for line in output_lines(shown):
            is_printed = line.startswith(BY_CHANCE) or any(x.startswith(line) for x in lines)
            assert is_printed, f"{block}\ndoes not print {line!r} in this order, but\n{printed}"


@pytest.mark.usefixtures("followed")
def test_what_the_pages_write_is_complete(place: Path):
    with np.load(place / "digits.npz") as arrays:
        assert list(arrays["names"]) == [f"{index}.png" for index in range(10)]
        assert arrays["embeddings"].shape == (10, 16)
    exported = place / "exported" / "digits"
    names = {file.name for file in exported.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "model.stablehlo"}
    text = (exported / "README.md").read_text()
    recipe = "Trained by the config `digits` on 360 images of `digits` for 4 epochs"
    assert recipe in text
    assert "on the 360 test images of `digits`, measured after 4 epochs." in text


@pytest.mark.usefixtures("followed")
def test_the_notebook_runs_and_shows_pictures(place: Path):
    notebook = place / "examples" / "activemlp.ipynb"
    result = subprocess.run(
        [place / ".venv" / "bin" / "python", "-c", RUN_NOTEBOOK, notebook],
        cwd=notebook.parent, env=variables(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    output = result.stdout
    pictures = [line for line in output.splitlines() if line.startswith("picture")]
    assert len(pictures) == 3, output
    assert "[(12, 8, 8, 8), (12, 4, 4, 8), (12, 2, 2, 16), (12, 1, 1, 16)]" in output
