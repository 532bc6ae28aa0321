"""What docs/performance.md says of models is what the files in results/ hold."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHATS = {"forward": "forward", "gradient": "gradient", "whole step": "step"}
CPUS = (("model_cpu.csv", "train_cpu.csv"), ("model_cpu_amd.csv", "train_cpu_amd.csv"))


def table_rows(section: str, first: str = r"`active_\w+`") -> list[list[str]]:
    """The cells of the rows in a section of the page that begin so, without emphasis."""
    page = (ROOT / "docs" / "performance.md").read_text()
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(rf"^\| ({first}.*) \|$", text, re.MULTILINE)
    return [row.replace("*", "").split(" | ") for row in rows]


def measured(*names: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """Rows of files by model, what was measured, and implementation."""
    found = {}
    for name in names:
        with (ROOT / "results" / name).open(newline="") as file:
            for row in csv.DictReader(file):
                found[row["model"], row["what"], row["implementation"]] = row
    return found


def test_the_table_of_cpus_is_that_of_the_files():
    rows = table_rows("On a CPU")
    assert len(rows) == 6
    machines = [measured(*names) for names in CPUS]
    for title, *cells in rows:
        model, what = re.fullmatch(r"`(\w+)`, (forward|gradient|whole step).*", title).groups()
        expected = []
        for machine in machines:
            jax, torch = (machine[model, WHATS[what], of] for of in ("jax", "torch gather"))
            expected += [f"{float(row['images_per_second']):.1f}" for row in (jax, torch)]
            expected += [f"{1 / float(torch['ratio_to_jax']):.2f}"]
            expected += [f"{float(jax['matmul_fraction']):.0%}"]
        assert cells == expected, title


def test_the_table_of_training_on_a_gpu_is_that_of_the_file():
    rows, found = table_rows("On a GPU"), measured("train_gpu.csv")
    models = {model for model, what, _ in found if what == "step"}
    assert {title.strip("`") for title, *_ in rows} == models
    for title, *cells in rows:
        jax, *peers = (
            found[title.strip("`"), "step", of]
            for of in ("jax", "torch gather", "torch deform_conv2d")
        )
        rates = [f"{float(row['images_per_second']):,.0f}" for row in (jax, *peers)]
        ratios = [f"{1 / float(row['ratio_to_jax']):.2f}" for row in peers]
        assert cells == [*rates, ", ".join(ratios)], title


def test_the_table_of_the_operator_on_a_gpu_is_that_of_the_file():
    forms = ("jax pallas_gpu", "jax gather_dense", "jax gather")
    peers = ("torch gather", "torch deform_conv2d")
    rows, found = table_rows("On a GPU", r"\d+ x \d+ x \d+, [hw] "), measured("op_gpu.csv")
    assert len(rows) == 8
    for number, (title, *cells) in enumerate(rows):
        model, axis = f"active_tiny stage {number // 2 + 1}", title[-1]
        both = [
            [found[model, f"{axis} {what}", of] for what in ("forward", "forward+backward")]
            for of in (*forms, *peers)
        ]
        times = [
            [1000 * int(row["batch_size"]) / float(row["images_per_second"]) for row in pair]
            for pair in both
        ]
        shares = [float(row["copy_fraction"]) for row in both[0]]
        expected = [f"{forward:.2f}, {backward:.2f}" for forward, backward in times]
        assert cells == [*expected, "{:.0%}, {:.0%}".format(*shares)], title


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("*.csv")), ids=lambda path: path.name
)
def test_every_file_is_told_about(path: Path):
    assert f"`{path.name}`" in (ROOT / "results" / "README.md").read_text()
