"""What a compiled program needs of each device, by the compiler's own count."""

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

    How many, the bytes of what they give a device, and the bytes it sends for that in rings over
    the devices that take part.
    """

    number: int
    size: int
    sent: float


class Needs(NamedTuple):
    """Of one device, for one call.

    `arguments`, `results` that are in none of the arguments' buffers, `temporary` and `program`
    are bytes that are held at the same time; `accessed` bytes that are read and written, `flops`
    operations. Of a loop, all but memory count once, however often it runs; of a kernel, what it is
    given and what it gives. `gathers` and `scatters` read and write by index.
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
        """Bytes, all together."""
        return self.arguments + self.results + self.temporary + self.program


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(int(side) for side in shape.split(",") if side) * bits // 8


def _top_level(result: str) -> list[str]:
    """The elements of a tuple in HLO's text form, or the one that is no tuple."""
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
    """How many devices take part together, by the attributes of a collective operation."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sides = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(sides[axis]) for axis in re.findall(r"'\w+'", found[2]))
    return devices


def count_collectives(text: str, devices: int) -> dict[str, Traffic]:
    """Collective operations of a program, by kind.

    Args:
      text: of the program, in HLO's text form.
      devices: that run it.
    """
    found: dict[str, Traffic] = {}
    for match in COLLECTIVE.finditer(text):
        kind, result = match["kind"], match["result"]
        if match["start"] and kind != "all-reduce":
            result = _top_level(result)[1]  # after the operands, before what keeps the state
        size = sum(_size(*item) for item in ITEM.findall(result))
        group = _group_size(match["rest"], devices)
        share = {
            "all-reduce": 2 * (group - 1) / group,
            "all-gather": (group - 1) / group,
            "reduce-scatter": group - 1,
            "all-to-all": (group - 1) / group,
            "collective-permute": 1,
        }[kind]
        before = found.get(kind, Traffic(0, 0, 0.0))
        found[kind] = Traffic(before.number + 1, before.size + size, before.sent + share * size)
    return found


def count_needs(compiled: Any, devices: int) -> Needs:
    """The needs of a `jax.stages.Compiled` for so many devices."""
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    return Needs(
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
    """Seconds that a step needs at least, by the data sheet of its chip."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """All three at the same time."""
        return max(self)


def count_bounds(needs: Needs, flops: float, chip: Chip) -> Bounds:
    """What a step takes at least.

    Args:
      needs: of a device.
      flops: of a step on a device, by the model's multiply-adds.
      chip: the device.
    """
    sent = sum(found.sent for found in needs.collectives.values())
    return Bounds(flops / chip.flops, needs.accessed / chip.bandwidth, sent / chip.interconnect)
