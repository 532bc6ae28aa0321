"""Resources that a compiled program needs on each device, as counted by the compiler."""

import math
import re
from typing import Any, NamedTuple

from activemlp_jax.utils.hardware import Chip

# Finds a collective operation in HLO text, with its result, kind, arguments and attributes, as in
# `%s = f32[8]{0} all-reduce-start(%a), replica_groups={{0,1},{2,3}}`
COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?P<start>-start)?\((?P<arguments>.*?)\)(?P<attributes>.*)"
)
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # a type: bf16[64,56] or pred[8]
# The replica groups of a collective operation. HLO has three notations for them; all of these mean
# groups of 4 devices: [2,4]<=[8], {{0,1,2,3},{4,5,6,7}}, mesh['a'=2,'b'=4] {'b'}
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})")


class Traffic(NamedTuple):
    """Collective operations of one kind: their number, and the bytes that they move."""

    number: int
    size: int  # bytes of their results on a device
    sent: float  # bytes that a device sends if data goes around a ring of its replica group


class Resources(NamedTuple):
    """Resources that one device needs per call of a program.

    The first four are bytes that are held at the same time. The other counts include the body of a
    loop once, however often it runs, and only the arguments and results of a kernel.
    """

    arguments: int
    results: int  # without results that reuse the buffers of arguments
    temporary: int
    program: int  # the machine code
    flops: float  # floating-point operations
    accessed: float  # bytes read and written
    collectives: dict[str, Traffic]  # by kind
    gathers: int  # reads by index
    scatters: int  # writes by index

    @property
    def memory(self) -> int:
        """Return the total number of bytes that are held at the same time."""
        return self.arguments + self.results + self.temporary + self.program


def _group_size(attributes: str, devices: int) -> int:
    """Read the number of devices in a replica group; all devices if no groups are given."""
    match = GROUPS.search(attributes)
    if match is None:
        return devices
    size, members, mesh, axes = match.groups()
    if mesh:
        sides = re.findall(r"('\w+')=(\d+)", mesh)
        return math.prod(int(side) for axis, side in sides if axis in axes)
    return int(size) if size else members.count(",") + 1


def count_collectives(text: str, devices: int) -> dict[str, Traffic]:
    """Count collective operations by kind in `text`, the HLO of a program for `devices` devices."""
    counts: dict[str, Traffic] = {}
    for match in COLLECTIVE.finditer(text):
        kind, number = match["kind"], match["arguments"].count("%")
        # Each argument has a result. The start of an asynchronous operation returns the arguments,
        # the results and its state, in this order; that of an all-reduce returns only the results.
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
        """Return the bound on the whole step if computing, memory and interconnect overlap."""
        return max(self)


def count_bounds(resources: Resources, flops: float, chip: Chip) -> Bounds:
    """Compute lower bounds on the time of a step that takes `flops` operations on each device."""
    sent = sum(traffic.sent for traffic in resources.collectives.values())
    return Bounds(flops / chip.flops, resources.accessed / chip.bandwidth, sent / chip.interconnect)
