"""Resources that a compiled program needs on each device, as counted by the compiler."""

import math
import re
from typing import Any, NamedTuple

from activemlp_jax.utils.hardware import Chip

ITEM = re.compile(r"\b(pred|[a-z]+\d+)(?:e\w+)?\[([\d,]*)\]")  # such as bf16[64,56,56,64]
COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?P<start>-start)?\((?P<rest>.*)"
)


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


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(int(side) for side in shape.split(",") if side) * bits // 8


def _top_level(result: str) -> list[str]:
    """Split a tuple in HLO's text form into its elements; anything else is a single element."""
    if not result.startswith("("):
        return [result]
    elements, depth = [""], 0
    for character in result[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _group_size(attributes: str, devices: int) -> int:
    """Read how many devices take part together from the attributes of a collective operation."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sides = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(sides[axis]) for axis in re.findall(r"'\w+'", match[2]))
    return devices


def count_collectives(text: str, devices: int) -> dict[str, Traffic]:
    """Count the collective operations of a program by kind.

    Args:
      text: the program in HLO's text form.
      devices: number of devices that run it.
    """
    counts: dict[str, Traffic] = {}
    for match in COLLECTIVE.finditer(text):
        kind, result = match["kind"], match["result"]
        if match["start"] and kind != "all-reduce":
            result = _top_level(result)[1]  # the results, between the operands and the state
        size = sum(_size(*item) for item in ITEM.findall(result))
        group = _group_size(match["rest"], devices)
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
        len(re.findall(r" gather\(", text)),
        len(re.findall(r" scatter\(", text)),
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
