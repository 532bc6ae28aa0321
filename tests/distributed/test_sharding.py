"""Transfer of batches to the devices."""

import dataclasses
from collections.abc import Generator

import numpy as np
import pytest

from activemlp_jax.distributed.sharding import make_mesh, place_rows, prefetch, put_batch


def test_batches_arrive_in_order_and_are_asked_for_ahead_of_time():
    log: list[str] = []

    def batches() -> Generator[dict[str, np.ndarray]]:
        try:
            for number in range(5):
                log.append(f"made {number}")
                yield {"label": np.full(2, number, np.int32)}
        finally:
            log.append("closed")

    placed = prefetch(batches(), make_mesh(), ahead=2)
    log.extend(f"used {int(batch['label'][0])}" for batch in placed)
    assert log == [
        *("made 0", "made 1", "made 2", "used 0", "made 3", "used 1", "made 4", "used 2"),
        *("closed", "used 3", "used 4"),
    ]


def test_closing_ends_what_makes_the_batches():
    closed = []

    def batches() -> Generator[dict[str, np.ndarray]]:
        try:
            while True:
                yield {"label": np.zeros(2, np.int32)}
        finally:
            closed.append(True)

    placed = prefetch(batches(), make_mesh())
    next(placed)
    placed.close()
    assert closed == [True]


def test_the_step_is_compiled_for_the_batches_it_gets():
    mesh = make_mesh()
    batch = {"image": np.zeros((8, 32, 32, 3), np.uint8), "label": np.zeros(8, np.int32)}
    shapes = place_rows({"image": ((8, 32, 32, 3), "uint8"), "label": ((8,), "int32")}, mesh)
    placed = put_batch(batch, mesh)
    for key, shape in shapes.items():
        assert (placed[key].shape, placed[key].dtype) == (shape.shape, shape.dtype)
        assert placed[key].sharding == shape.sharding


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU slice, with the fields that making a mesh reads."""

    id: int
    process_index: int
    platform: str = "tpu"


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (2, 4)])
def test_each_host_has_its_rows_side_by_side_wherever_its_devices_lie(data: int, fsdp: int):
    chips = [Chip(number, number % 4) for number in range(8)]
    mesh = make_mesh(data, fsdp, chips)
    assert mesh.devices.shape == (data, fsdp)
    assert [chip.process_index for chip in mesh.devices.flat] == [0, 0, 1, 1, 2, 2, 3, 3]
