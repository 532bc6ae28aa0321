"""What a compiled program needs of each device, by the compiler's own count."""

import math
import re
from typing import Any, NamedTuple

from activemlp_jax.training.hardware import Chip

ITEM = re.compile(r"\b(pred|[a-z]+\d+)(?:e\w+)?\[([\d,]*)\]")  # such as bf16[64,56,56,64]
COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?P<start>-start)?\("
)


class Traffic(NamedTuple):
    """Collective operations of one kind: how many, and the bytes of what they give a device."""

    number: int
    size: int


class Needs(NamedTuple):
    """Of one device, for one call.

    `arguments`, `results` that are in none of the arguments' buffers, `temporary` and `program`
    are bytes that are held at the same time; `accessed` bytes that are read and written, `flops`
    operations. What is in a loop counts once where the compiler does not know how often it runs.
    """

    arguments: int
    results: int
    temporary: int
    program: int
    flops: float
    accessed: float
    collectives: dict[str, Traffic]

    @property
    def memory(self) -> int:
        """Bytes, all together."""
        return self.arguments + self.results + self.temporary + self.program


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(int(side) for side in shape.split(",") if side) * bits // 8


def count_collectives(text: str) -> dict[str, Traffic]:
    """Collective operations of a program in HLO's text form, by kind."""
    found: dict[str, Traffic] = {}
    for match in COLLECTIVE.finditer(text):
        sizes = [_size(*item) for item in ITEM.findall(match["result"])]
        if match["start"] and match["kind"] != "all-reduce":
            # One that is only begun gives operands, results, and at times tokens.
            sizes = [max(sizes)]
        number, size = found.get(match["kind"], Traffic(0, 0))
        found[match["kind"]] = Traffic(number + 1, size + sum(sizes))
    return found


def count_needs(compiled: Any) -> Needs:
    """The needs of a `jax.stages.Compiled`."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Needs(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        count_collectives(compiled.as_text()),
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


def count_bounds(needs: Needs, flops: float, chip: Chip, devices: int) -> Bounds:
    """What a step takes at least.

    Args:
      needs: of a device.
      flops: of a step on a device, by the model's multiply-adds.
      chip: the device.
      devices: that work together.
    """
    others = (devices - 1) / devices
    # What a device sends in rings over all others, in parts of what the operation gives it.
    sent = {
        "all-reduce": 2 * others,
        "all-gather": others,
        "reduce-scatter": devices - 1,
        "all-to-all": others,
        "collective-permute": 1.0,
    }
    traffic = sum(sent[kind] * found.size for kind, found in needs.collectives.items())
    return Bounds(flops / chip.flops, needs.accessed / chip.bandwidth, traffic / chip.interconnect)
