"""Runs of the real `train.py`, in one process or in two that communicate over loopback."""

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

# Optimization does not pay off, because tests run a program only a few times. Without LLVM's
# passes and with the older code generator, programs compile in a quarter of the time.
COMPILE_QUICKLY = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
}

# A model that trains in seconds.
SMALL = (
    "--config.model.depths=(2,2,2,2)",
    "--config.model.embed_dims=(8,8,16,16)",
    "--config.model.mlp_ratios=(2.0,2.0,2.0,2.0)",
    # 360 images, which are three steps an epoch.
    "--config.data.train_split=test",
    "--config.batch_size=120",
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
    """Start `train.py` on `devices` CPU devices; the words of `prefix` precede its command."""
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
    """Run `train.py` until it exits, with any status; takes the options of `start`."""
    process = start(*arguments, **options)
    ((output, errors),) = end([process], timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start_two(
    *arguments: str, second: Sequence[str] = (), **options: Any
) -> list[subprocess.Popen[str]]:
    """Start two processes of one run; the second also gets the arguments `second`."""
    address = free_address()
    return [
        start(
            *arguments,
            *(second if process_id else ()),
            *(f"--coordinator={address}", "--num_processes=2", f"--process_id={process_id}"),
            **options,
        )
        for process_id in (0, 1)
    ]


def end(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[str, str]]:
    """Wait for all to exit and return their stdout and stderr; on a timeout, kill all."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 400) -> list[str]:
    """Wait until all have exited with status 0, and return what each printed to stdout."""
    results = end(processes, timeout)
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in results]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_state(workdir: Path, step: int) -> Any:
    """Read a checkpoint as numpy arrays: weights, their average, optimizer state, step."""
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
