"""Rates, ratios, tables and files that the benchmarks compute from measured times."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from activemlp_jax.benchmark.timing import (
    COLUMNS,
    Contender,
    Machine,
    Measurement,
    Workload,
    summarize,
    table_lines,
    time_in_turns,
    write_csv,
)
from activemlp_jax.utils.errors import UserError

WORKLOAD = Workload("active_tiny", 8, 224, "float32")
MACHINE = Machine("cpu", 2, "Some CPU", "0.10.2", "", "2026-01-31")


def nothing(times: int) -> None:
    del times


def contender(
    what: str, implementation: str, flops: float | None, call: Callable[[int], None] = nothing
) -> Contender:
    workload = Workload("2048 x 2048", 0, 0, "float32") if what == "matmul" else WORKLOAD
    return Contender(what, implementation, workload, call, flops, 3 * 2**20, 1.5)


def in_words(line: str) -> str:
    return " ".join(line.split())


def moving(what: str, implementation: str, traffic: float) -> Contender:
    return contender(what, implementation, None)._replace(traffic=traffic)


def measured() -> list[Measurement]:
    contenders = [
        contender("matmul", "jax", 8e9),
        contender("forward", "jax", 2e9),
        contender("forward", "torch gather", 2e9),
    ]
    return summarize(contenders, [[0.1, 0.2, 0.4], [0.1, 0.05, 0.2], [0.4, 0.2, 0.1]])


def test_the_rate_is_the_rounds_median_between_the_slowest_and_the_fastest():
    _, ours, _ = measured()
    assert ours.images_per_second == pytest.approx(8 / 0.1)
    assert ours.images_per_second_min == pytest.approx(8 / 0.2)
    assert ours.images_per_second_max == pytest.approx(8 / 0.05)


def test_the_fraction_is_of_the_matrix_products_operations_a_second():
    product, ours, _ = measured()
    assert product.gflops == pytest.approx(40)
    assert product.matmul_fraction == 1
    assert product.images_per_second is None
    assert ours.gflops == pytest.approx(20)
    assert ours.matmul_fraction == pytest.approx(0.5)


def test_the_fraction_of_the_bandwidth_is_of_the_copys_bytes_a_second():
    copy, ours = summarize(
        [moving("copy", "jax", 8e9), moving("h forward", "jax", 2e9)], [[2], [1]]
    )
    assert (copy.gigabytes, copy.copy_fraction) == (4, 1)
    assert (ours.gigabytes, ours.copy_fraction) == (2, 0.5)
    assert measured()[1].copy_fraction is None


def test_a_peer_of_half_the_rate_has_ratio_one_half():
    _, ours, peer = measured()
    assert ours.ratio_to_jax == 1
    assert peer.ratio_to_jax == pytest.approx(0.5)


def test_ratios_are_to_the_fastest_of_jaxs_own_at_the_same():
    contenders = [
        contender("h forward", "jax slow", None),
        contender("h forward", "jax fast", None),
        contender("w forward", "jax slow", None),
    ]
    slow, fast, other = summarize(contenders, [[0.4], [0.1], [0.2]])
    assert slow.ratio_to_jax == pytest.approx(0.25)
    assert (fast.ratio_to_jax, other.ratio_to_jax) == (1, 1)
    assert (slow.gflops, slow.matmul_fraction) == (None, None)


def test_contenders_take_turns_after_all_have_run_once():
    calls: list[tuple[str, int]] = []
    contenders = [
        contender(name, "jax", None, lambda times, name=name: calls.append((name, times)))
        for name in ("a", "b")
    ]
    seconds = time_in_turns(contenders, steps=3, rounds=2)
    assert calls == [("a", 1), ("b", 1), ("a", 3), ("b", 3), ("a", 3), ("b", 3)]
    assert [len(found) for found in seconds] == [2, 2]


def test_a_file_has_a_row_a_measurement_with_what_is_unknown_left_empty(tmp_path: Path):
    path = tmp_path / "figures.csv"
    for _ in range(2):  # the second file replaces the first
        write_csv(path, measured(), MACHINE)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["implementation"] for row in rows] == ["jax", "jax", "torch gather"]
    assert [row["images_per_second"] for row in rows] == ["", "80.0", "40.0"]
    assert [row["batch_size"] for row in rows] == ["", "8", "8"]
    assert rows[2] | {"memory_bytes": "3145728", "cpu": "Some CPU", "torch_version": ""} == rows[2]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "figures.csv"
    with pytest.raises(UserError, match=r"figures\.csv: (File exists|Not a directory)"):
        write_csv(path, [], MACHINE)


def test_tables_fit_100_columns_and_tell_only_what_is_known():
    heading, product, _, peer = table_lines(measured(), in_milliseconds=False)
    assert max(map(len, (heading, product, peer))) <= 100
    assert in_words(heading) == "images/s min to max GFLOP/s matmul to jax MiB compile s"
    assert in_words(product) == "matmul jax 40.0 100.0% 1.00 3.0 1.5"
    assert in_words(peer) == "forward torch gather 40.0 20.0 to 80.0 10.0 25.0% 0.50 3.0 1.5"


def test_the_operators_times_are_told_in_milliseconds():
    contenders = [moving("h forward", "jax gather", 2e6), moving("copy", "jax", 4e6)]
    found = summarize(contenders, [[0.5e-3, 1e-3, 2e-3], [1e-3]])
    heading, line, _ = table_lines(found, in_milliseconds=True)
    assert in_words(heading) == "ms min to max GB/s copy to jax MiB compile s"
    assert in_words(line) == "h forward jax gather 1.000 0.500 to 2.000 2.0 50.0% 1.00 3.0 1.5"
