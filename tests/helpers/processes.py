"""The real `train.py` as one process or as several that share a run over loopback."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]

# Tests run what they compile a few times only, and LLVM's optimization takes a third of the time to
# compile. XLA's own passes are those of any run.
COMPILE_QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

# A model that trains in seconds; the path through the program is that of any run.
SMALL = (
    "--config.model.depths=(2,2,2,2)",
    "--config.model.embed_dims=(8,8,16,16)",
    "--config.model.mlp_ratios=(2.0,2.0,2.0,2.0)",
    "--config.batch_size=479",
    "--config.epochs=4",
    "--config.checkpoint.every_epochs=1",
    "--config.log_every_steps=1",
)


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(
    *arguments: str, devices: int = 1, x64: bool = False, prefix: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """`train.py` on so many CPU devices, by way of the command `prefix`."""
    variables = {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": str(int(x64)),
    }
    return subprocess.Popen(
        [*prefix, sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, **COMPILE_QUICKLY, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`train.py` to its end, however that is; the options of `start`."""
    process = start(*arguments, **options)
    ((output, errors),) = end([process], timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start_two(
    *arguments: str, second: Sequence[str] = (), **options: Any
) -> list[subprocess.Popen[str]]:
    """Two processes that share a run; the second has more arguments."""
    address = free_address()
    return [
        start(
            *arguments,
            *(second if number else ()),
            *(f"--coordinator={address}", "--num_processes=2", f"--process_id={number}"),
            **options,
        )
        for number in (0, 1)
    ]


def end(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[str, str]]:
    """What each printed and said of errors, once all have ended; none is left if one has not."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 400) -> list[str]:
    """What each printed, once all have ended well."""
    results = end(processes, timeout)
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in results]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_state(workdir: Path, step: int) -> Any:
    """All arrays of a checkpoint, as numpy arrays: weights, their average, optimiser, step."""
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
