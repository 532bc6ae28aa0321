"""The rates of models in docs/performance.md are those of the files in results/."""

import csv
import re

import pytest
from processes import ROOT

PAGE = (ROOT / "docs" / "performance.md").read_text()
ROWS = re.findall(r"^\| (`active_\w+`.*) \|$", PAGE, re.MULTILINE)


def rates(file: str, model: str, what: str, *peers: str, digits: int) -> list[str]:
    """Format images per second of JAX and of `peers`, and JAX's ratio to each, as in the page."""
    with (ROOT / "results" / file).open(newline="") as lines:
        found = {
            row["implementation"]: row
            for row in csv.DictReader(lines)
            if (row["model"], row["what"]) == (model, what)
        }
    shown = [f"{float(found[name]['images_per_second']):,.{digits}f}" for name in ("jax", *peers)]
    return [*shown, ", ".join(f"{1 / float(found[name]['ratio_to_jax']):.2f}" for name in peers)]


@pytest.mark.parametrize("row", ROWS)
def test_rates_in_the_page_are_those_of_the_files(row: str):
    title, *cells = row.replace("*", "").split(" | ")
    model, what = re.fullmatch(r"`(\w+)`(?:, (?:whole )?(\w+).*)?", title).groups()
    if what is None:
        peers = ("torch gather", "torch deform_conv2d")
        assert cells == rates("train_gpu.csv", model, "step", *peers, digits=0)
        return
    file = "model" if what == "forward" else "train"
    expected = [
        rates(f"{file}_{machine}.csv", model, what, "torch gather", digits=1)
        for machine in ("cpu", "cpu_amd")
    ]
    assert [cells[:3], cells[4:7]] == expected  # next come shares of the matmul's rate
