"""Resources that a compiled program needs on each device, as counted by the compiler."""

import math
import re
from typing import Any, NamedTuple

from activemlp_jax.utils.hardware import Chip

# The result, kind, arguments and attributes of a line of a program's text, such as
# `%s = f32[8]{0} all-reduce-start(%a), replica_groups={{0,1},{2,3}}`
COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?P<start>-start)?\((?P<arguments>.*?)\)(?P<attributes>.*)"
)
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # such as bf16[64,56], or pred[8]
# Groups of devices: of 4 in [2,4]<=[8], {{0,1,2,3},{4,5,6,7}} and mesh['a'=2,'b'=4] {'b'}
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})")


class Traffic(NamedTuple):
    """Collective operations of one kind.

    `number` counts them. `size` is the bytes of their results on a device, and `sent` the bytes
    that a device sends for that, in rings over the devices that take part.
    """

    number: int
    size: int
    sent: float


class Resources(NamedTuple):
    """Resources one device needs per call.

    `arguments`, `results` outside the arguments' buffers, `temporary` and `program` are bytes that
    are held at the same time. `accessed` is the bytes read and written, and `flops` the operations.
    `gathers` and `scatters` count reads and writes by index. Except for memory, the body of a loop
    counts once, however often it runs, and a kernel counts only by its arguments and results.
    """

    arguments: int
    results: int
    temporary: int
    program: int
    flops: float
    accessed: float
    collectives: dict[str, Traffic]
    gathers: int
    scatters: int

    @property
    def memory(self) -> int:
        """Total bytes."""
        return self.arguments + self.results + self.temporary + self.program


def _group_size(attributes: str, devices: int) -> int:
    """Read how many devices take part together; all of them if no groups are given."""
    match = GROUPS.search(attributes)
    if match is None:
        return devices
    size, members, mesh, axes = match.groups()
    if mesh:
        sides = re.findall(r"('\w+')=(\d+)", mesh)
        return math.prod(int(side) for axis, side in sides if axis in axes)
    return int(size) if size else members.count(",") + 1


def count_collectives(text: str, devices: int) -> dict[str, Traffic]:
    """Count the collective operations of a program by kind.

    Args:
      text: the program in HLO's text form.
      devices: number of devices that run it.
    """
    counts: dict[str, Traffic] = {}
    for match in COLLECTIVE.finditer(text):
        kind, number = match["kind"], match["arguments"].count("%")
        # Each argument has a result. A start gives the arguments, the results, then its state.
        first = number if match["start"] and kind != "all-reduce" else 0
        size = sum(
            math.prod(int(side) for side in shape.split(",") if side) * int(bits or 8) // 8
            for bits, shape in ARRAY.findall(match["result"])[first : first + number]
        )
        group = _group_size(match["attributes"], devices)
        share = {
            "all-reduce": 2 * (group - 1) / group,
            "all-gather": (group - 1) / group,
            "reduce-scatter": group - 1,
            "all-to-all": (group - 1) / group,
            "collective-permute": 1,
        }[kind]
        before = counts.get(kind, Traffic(0, 0, 0.0))
        counts[kind] = Traffic(before.number + 1, before.size + size, before.sent + share * size)
    return counts


def count_resources(compiled: Any, devices: int) -> Resources:
    """Count the resources of a `jax.stages.Compiled` that runs on `devices` devices."""
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    return Resources(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        count_collectives(text, devices),
        text.count(" gather("),
        text.count(" scatter("),
    )


class Bounds(NamedTuple):
    """Lower bounds on the seconds of a step, from the chip's data sheet."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """Bound on the whole step, with all three running at the same time."""
        return max(self)


def count_bounds(resources: Resources, flops: float, chip: Chip) -> Bounds:
    """Compute lower bounds on the time of a step.

    Args:
      resources: resources of the step on one device.
      flops: floating-point operations of the step on one device, from the model's multiply-adds.
      chip: data sheet of the device.
    """
    sent = sum(traffic.sent for traffic in resources.collectives.values())
    return Bounds(flops / chip.flops, resources.accessed / chip.bandwidth, sent / chip.interconnect)
