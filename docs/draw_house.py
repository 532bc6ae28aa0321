"""Draw docs/images/house.png: the package's subpackages in the layers that import-linter checks.

Example:
  python docs/draw_house.py
"""

import ast
import textwrap
import tomllib
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "activemlp_jax"
PICTURE = ROOT / "docs" / "images" / "house.png"
WIDTH, LINE, MARGIN, GAP = 120.0, 2.0, 1.0, 1.2  # in units of about one character


def read_layers() -> list[list[str]]:
    """Names of the packages of each layer, top layer first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def describe(name: str, width: int) -> tuple[str, list[str], list[str]]:
    """Name of a package or file, and the wrapped lines of its summary and of its files."""
    path = PACKAGE / name
    is_room = path.is_dir()
    source = path / "__init__.py" if is_room else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text())) or ""
    summary = textwrap.wrap(
        docstring.split("\n\n")[0].split(";")[0].rstrip(".").replace("`", ""), width
    )
    files = sorted(p.stem for p in path.glob("*.py") if not p.stem.startswith("__"))
    return (
        (f"{name}/" if is_room else f"{name}.py"),
        summary,
        textwrap.wrap("  ".join(files), width),
    )


def draw() -> None:
    """Write the picture."""
    rows = []
    for layer in read_layers():
        box = (WIDTH - GAP * (len(layer) - 1)) / len(layer)
        packages = [describe(name, int(box * 1.25)) for name in layer]
        lines = max(1 + len(summary) + len(files) for _, summary, files in packages)
        rows.append((box, packages, lines * LINE + 2 * MARGIN))
    height = sum(row[2] for row in rows) + GAP * (len(rows) - 1)
    figure = Figure(figsize=(12, 12 * height / WIDTH), dpi=80)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    top = 0.0
    for box, packages, row_height in rows:
        for i, (name, summary, files) in enumerate(packages):
            left = i * (box + GAP)
            axes.add_patch(
                FancyBboxPatch(
                    (left + 0.5, top + 0.5),
                    box - 1,
                    row_height - 1,
                    boxstyle="round,pad=0.4",
                    facecolor="#f4f7fb",
                    edgecolor="#7a93b5",
                )
            )
            y = top + MARGIN + LINE / 2
            texts = [(name, "bold", "#1d3557")]
            texts += [(line, "normal", "#222222") for line in summary]
            texts += [(line, "normal", "#5a6b80") for line in files]
            for text, weight, color in texts:
                axes.text(
                    left + MARGIN, y, text, fontsize=8.5, weight=weight, color=color, va="center"
                )
                y += LINE
        top += row_height + GAP
    figure.savefig(PICTURE)


if __name__ == "__main__":
    draw()
