"""Compile a config's train step for devices that this machine lacks; check that it fits in memory.

Examples:
  python -m activemlp_jax.compile_check --config configs/active_tiny.py --topology v5e:4x4
  python -m activemlp_jax.compile_check --config configs/digits.py --topology cpu:8

The compiler for TPU slices such as v5e:4x4 comes with the optional dependencies [tpu]; it needs no
TPU. The last line of the output is the record as JSON. The exit status is 0 if the step compiles
and fits, 1 if it does not fit, and 2 for an error.
"""

import argparse
import importlib.util
import math
import os
import re
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from activemlp_jax.benchmark.hlo_cost import Bounds, Resources, count_bounds, count_resources
from activemlp_jax.benchmark.timing import say
from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.distributed import sharding
from activemlp_jax.tasks.registry import TASKS, open_data
from activemlp_jax.training.cli_flags import parse_arguments
from activemlp_jax.training.config import check_config
from activemlp_jax.training.init_from import adopt_architecture
from activemlp_jax.training.trainer import build_trainer
from activemlp_jax.utils.errors import UserError, errors_in_one_line, install_command, one_line
from activemlp_jax.utils.hardware import CHIPS, GIB, Chip
from activemlp_jax.utils.json_files import json_line
from activemlp_jax.utils.runtime import collect_garbage_rarely

LESS_MEMORY = (
    "Ways to need less: more devices, a smaller config.batch_size, config.accumulation=2, "
    "config.model.remat_stages=(0,1), config.mesh.fsdp"
)


def open_topology(name: str) -> list[Any]:
    """List the devices of a topology such as v5e:4x4 or cpu:8; this machine may lack them."""
    # Do not use a TPU of this machine, as other processes may need it.
    jax.config.update("jax_platforms", "cpu")
    kind, _, size = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,4}", size):
        jax.config.update("jax_num_cpu_devices", int(size))
        return jax.devices()
    if not re.fullmatch(r"v\d+[a-z]*:[1-9]\d*(x[1-9]\d*){1,2}", name):
        raise UserError(f"--topology is {name!r}, expected a TPU slice as v5e:4x4, or cpu:8")
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            f"the compiler for TPUs is not installed; `{install_command('tpu')}` brings it (Linux "
            "on x86)"
        )
    from jax.experimental import topologies

    # Without these, libtpu looks for the slice of this machine, complains if there is none, and
    # keeps other processes from using libtpu.
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    os.environ.update(settings | os.environ)
    sides = [int(side) for side in size.split("x")]
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology is {name}, which the compiler refuses: {error}") from error


def data_size(config: ConfigDict, images: int | None, classes: int | None) -> tuple[int, int, str]:
    """Return the numbers of images and classes (default: the training set's) and their origin."""
    if images and classes:
        return images, classes, "as given"
    try:
        source = open_data(config, config.data.train_split)
        num_images, num_classes = len(source), len(source.class_names)
        origin = f"of {config.data.name}"
    except UserError:
        num_images, num_classes, name = TASKS[config.task].dataset
        origin = f"as {name} has; {config.data.name} is not here"
    if images or classes:
        origin = "in part as given"
    return images or num_images, classes or num_classes, origin


def rounded(value: float) -> str:
    """Format `value` with three significant digits, or as a whole number if it is at least 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def report_resources(resources: Resources, flops: float, chip: Chip | None) -> None:
    """Print the resources of a step on a device; `flops` counts the model's multiply-adds."""
    sizes = {
        "state and batch": resources.arguments,
        "results": resources.results,
        "temporary": resources.temporary,
        "program": resources.program,
    }
    parts = " + ".join(
        f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size / GIB >= 0.005
    )
    limit = "" if chip is None else f" of {chip.memory / GIB:.0f}"
    say(f"memory       {resources.memory / GIB:.2f} GiB{limit} a device: {parts}")
    say(
        f"work         {rounded(flops / 1e9)} GFLOP a device by the model's multiply-adds, "
        f"{rounded(resources.flops / 1e9)} by the compiler; "
        f"{rounded(resources.accessed / 1e9)} GB accessed"
    )
    say(f"by index     {resources.gathers} gathers, {resources.scatters} scatters")
    collectives = [
        f"{traffic.number} {kind}, {traffic.size / 1e6:,.1f} MB"
        for kind, traffic in sorted(resources.collectives.items())
    ]
    say(f"collectives  {'; '.join(collectives) or 'none'}")


def report_bounds(bounds: Bounds, batch_size: int, steps: int, hosts: int) -> None:
    """Print bounds from the data sheet: time of a step, images per second, hours of the run."""
    seconds = bounds._asdict()
    times = ", ".join(f"{name} {rounded(1e3 * value)} ms" for name, value in seconds.items())
    rate = batch_size / bounds.step
    say(f"least a step {times} (data sheet)")
    say(
        f"at most      {rate:,.0f} images/s, {rate / hosts:,.0f} from each host; "
        f"at least {steps * bounds.step / 3600:,.1f} h for the run"
    )


def check(
    path: str, config: ConfigDict, topology: str, images: int | None, classes: int | None
) -> bool:
    """Compile the step and print a report; return False only if the step is known not to fit."""
    config = adopt_architecture(config)
    devices = open_topology(topology)
    check_config(config)
    images, classes, origin = data_size(config, images, classes)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    trainer = build_trainer(config, classes, images, mesh)
    kind, hosts = devices[0].device_kind, len({device.process_index for device in devices})
    chip = CHIPS.get(kind)
    axes = ", ".join(f"{name} {number}" for name, number in mesh.shape.items())
    say(f"{path} on {topology}: {len(devices)} {kind} of {hosts} host(s), mesh {axes}")
    say(
        f"{config.batch_size:,} images a step, {config.batch_size / len(devices):g} a device; "
        f"{images:,} images in {classes:,} classes, {origin}"
    )
    record: dict[str, Any] = {
        "config": path,
        "topology": topology,
        "devices": len(devices),
        "hosts": hosts,
        "batch_size": config.batch_size,
    }

    def finish(fits: bool | None) -> bool:
        say(json_line({**record, "fits": fits}, "the record"))
        return fits is not False

    say("compiling the train step; that takes a minute or two for a recipe's model")
    began = time.perf_counter()
    try:
        step = trainer.train_step.lower(trainer.state, trainer.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"the step of {path} does not compile: {error}") from error
        say(f"does not fit: {one_line(error)[:600]}")
        say(LESS_MEMORY)
        return finish(False)
    seconds = time.perf_counter() - began
    resources = count_resources(step, len(devices))
    say(f"compiled in {seconds:.0f} s")
    flops = trainer.step_flops / len(devices)
    report_resources(resources, flops, chip)
    record |= {
        "compile_seconds": round(seconds, 1),
        **resources._asdict(),
        "collectives": {name: traffic._asdict() for name, traffic in resources.collectives.items()},
        "memory": resources.memory,
        "model_flops": flops,
    }
    if chip is None:
        return finish(None)
    if config.accumulation == 1:
        bounds = count_bounds(resources, flops, chip)
        report_bounds(bounds, config.batch_size, trainer.steps, hosts)
        record["least_seconds"] = bounds._asdict()
    else:
        say(f"no bounds: the compiler counts one of the {config.accumulation} parts of a batch")
    fits = resources.memory <= chip.memory
    say("fits" if fits else f"does not fit. {LESS_MEMORY}")
    return finish(fits)


def main() -> None:
    """Parse the command line and run the command."""
    parser = Parser(
        prog="python -m activemlp_jax.compile_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("--topology", help="a TPU slice, chips by chips, such as v5e:4x4; or cpu:8")
    for name in ("images", "classes"):
        parser.add_argument(
            f"--{name}",
            type=int,
            help=f"number of {name} of the training set (the config's dataset's, or ImageNet's or "
            "ADE20K's if that is not on this machine)",
        )
    collect_garbage_rarely()
    with errors_in_one_line():
        arguments, config = parse_arguments(parser)
        check_numbers(vars(arguments))
        if not arguments.topology:
            raise UserError("--topology is missing, expected a TPU slice as v5e:4x4, or cpu:8")
        fits = check(
            arguments.config, config, arguments.topology, arguments.images, arguments.classes
        )
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
