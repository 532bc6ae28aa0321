"""Hosts and devices: everything else sees global arrays.

A mesh has two axes. The rows of a batch are split over both, `data` and `fsdp`; parameters, their
average and the optimiser's state are split over `fsdp` and have a copy for each place on `data`.
A host is a process here, as JAX counts them: on a TPU one a machine, under SLURM one a task.
"""

import contextlib
import functools
import glob
import importlib.util
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from activemlp_jax.errors import Interrupted, UserError, one_line

ROWS = PartitionSpec(("data", "fsdp"))
SMALLEST_SPLIT = 4096  # elements; gathering a bias takes longer than keeping it

# Keys of the store that JAX's coordination service keeps for all hosts.
FACTS, FAILED, STOP = "activemlp/facts/", "activemlp/failed/", "activemlp/stop/"
END, END_TIMEOUT = "activemlp/end", 3600  # seconds


class Hosts(NamedTuple):
    """How to find the other processes; what is None or '' is left to SLURM, Open MPI or the TPU.

    `coordinator` is HOST:PORT of the first process; `timeout` is in seconds.
    """

    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300


def _launched(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Processes, this one's number, and that on its machine, if SLURM or Open MPI started many."""
    for names in (
        ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ):
        if all(name in environment for name in names):
            size, rank, local = (int(environment[name]) for name in names[:3])
            if size > 1:
                return size, rank, local
    return None


def _has_tpu() -> bool:
    asked_for = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in asked_for and bool(chips) and importlib.util.find_spec("libtpu") is not None


def _connect(hosts: Hosts) -> None:
    """`jax.distributed.initialize`, where there is anything to connect to; before any computing.

    Raises:
      UserError: options that do not name a process among many.
    """
    launched = _launched(os.environ)
    num_processes, process_id, local = hosts.num_processes, hosts.process_id, None
    if launched:
        num_processes = launched[0] if num_processes is None else num_processes
        process_id = launched[1] if process_id is None else process_id
        local = [launched[2]]  # each process has the accelerator of its number
    if (num_processes is None) != (process_id is None) or (
        hosts.coordinator and num_processes is None
    ):
        raise UserError("the coordinator, the number of processes and the process id go together")
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise UserError(f"process id is {process_id}, expected 0 to {num_processes - 1}")
    if hosts.coordinator and not hosts.coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"the coordinator is {hosts.coordinator}, expected HOST:PORT")
    on_pod = num_processes is None and _has_tpu()
    if not on_pod and num_processes in (None, 1):
        return

    def give_up() -> None:
        where = f" at {hosts.coordinator}" if hosts.coordinator else ""
        number = "this process" if process_id is None else f"process {process_id}"
        others = "the others" if num_processes is None else f"all {num_processes}"
        _leave(f"after {hosts.timeout} s {number} has not met {others}{where}; do they run?")

    # JAX's own timeout ends the process with a stack trace of C++, and so comes second.
    timer = threading.Timer(hosts.timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            hosts.coordinator or None,
            num_processes,
            process_id,
            local_device_ids=local,
            initialization_timeout=hosts.timeout + 60,
        )
    except ValueError as error:
        if not on_pod:  # else it is a TPU that is no part of a pod
            raise UserError(
                f"the first of {num_processes} processes is not known ({error}); give its "
                "HOST:PORT as the coordinator"
            ) from error
    except RuntimeError as error:
        raise UserError(f"the processes cannot connect: {error}") from error
    finally:
        timer.cancel()


def _leave(message: str, linger: float = 0, status: int = 2) -> None:
    """End in so many seconds, without the goodbye for which JAX would wait for the other hosts."""
    sys.stdout.flush()
    print(f"{os.path.basename(sys.argv[0])}: error: {one_line(message)}", file=sys.stderr)
    sys.stderr.flush()
    time.sleep(linger)
    os._exit(status)


def _watch(done: threading.Event, linger: float) -> None:
    """Until `done`, end this process soon after another one has failed."""
    client = ocp.multihost.get_jax_distributed_client()
    while not done.wait(1.0):
        for key, message in client.key_value_dir_get(FAILED):
            _leave(f"host {key.removeprefix(FAILED)} stopped: {message}", linger)


class _TerminatedError(BaseException):  # which nobody takes for an error of theirs
    """SIGTERM, at a moment at which there is nothing to save."""


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _TerminatedError("stopped by SIGTERM")


@contextlib.contextmanager
def connected(hosts: Hosts) -> Iterator[None]:
    """One of many processes inside, where options, launcher or TPU say so; else alone.

    A failure of one among many ends all of them with its message, within seconds: they would
    otherwise wait for it.

    Raises:
      UserError: options that do not fit together.
    """
    _connect(hosts)
    if jax.process_count() == 1:
        yield
        return
    # The store in which the others look for the reason goes with the first host.
    linger = 3.0 if is_first_host() else 0.0
    done = threading.Event()
    # JAX's own handler would take note of a SIGTERM, and let the start go on.
    signal.signal(signal.SIGTERM, _terminate)
    threading.Thread(target=_watch, args=(done, linger), daemon=True).start()
    client = ocp.multihost.get_jax_distributed_client()
    try:
        yield
        # The first host may have more to write, and may fail at it.
        client.wait_at_barrier(END, END_TIMEOUT * 1000)
    except Interrupted:
        raise
    except (Exception, KeyboardInterrupt, _TerminatedError) as error:
        done.set()
        message, status = one_line(error) or type(error).__name__, 2
        if isinstance(error, KeyboardInterrupt):
            message, status = "interrupted", 128 + signal.SIGINT
        elif isinstance(error, _TerminatedError):
            status = 128 + signal.SIGTERM
        elif not isinstance(error, UserError):
            traceback.print_exc()
        with contextlib.suppress(Exception):  # the coordinator may be what has failed
            client.key_value_set(f"{FAILED}{jax.process_index()}", message)
        _leave(message, linger, status)
    finally:
        done.set()


def check_same(what: str, facts: Mapping[str, Any], timeout: float) -> None:
    """See that all hosts know the same; they wait for each other here.

    Args:
      what: the facts are about; another each time.
      facts: by name, as JSON takes them.
      timeout: seconds to wait for the last host.

    Raises:
      UserError: a host differs from the first, or has not come; it is named.
    """
    if jax.process_count() == 1:
        return
    client = ocp.multihost.get_jax_distributed_client()
    folder = f"{FACTS}{what}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(facts))
    try:
        client.wait_at_barrier(folder, int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        come = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(folder)}
        missing = [str(host) for host in range(jax.process_count()) if host not in come]
        raise UserError(
            f"{what}: after {timeout:.0f} s these hosts are not ready: {', '.join(missing)}"
        ) from error
    told = {
        int(key.rpartition("/")[2]): json.loads(value)
        for key, value in client.key_value_dir_get(folder)
    }
    for host in sorted(told):
        for name, expected in told[0].items():
            found = told[host].get(name)
            if found != expected:
                raise UserError(
                    f"host {host} differs from host 0: {name} is {found!r} there and "
                    f"{expected!r} on host 0"
                )


def first_host_says(value: bool) -> bool:
    """Host 0's `value`, on every host; waits for the devices where there are many hosts."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def stop_is_agreed(wanted: bool, step: int) -> bool:
    """Whether all hosts stop after `step`, as at least one of them wanted to two steps before.

    Every host asks after every step, and has then waited for the one before. So none asks for
    `step + 2` before all have asked for `step`, and all find there what one wrote down here.
    """
    client = ocp.multihost.get_jax_distributed_client()
    if wanted:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was faster
            client.key_value_set(f"{STOP}at", str(step + 2))
    return any(step >= int(agreed) for _, agreed in client.key_value_dir_get(STOP))


def sum_over_hosts(value: int) -> int:
    """The sum of every host's `value`; waits for the devices where there are many hosts."""
    return int(multihost_utils.process_allgather(np.asarray(value)).sum())


def this_host() -> dict[str, int]:
    """This host's number, `process`, among the `processes` that take part."""
    return {"process": jax.process_index(), "processes": jax.process_count()}


def is_first_host() -> bool:
    """Whether this host is the one that writes and speaks for all."""
    return jax.process_index() == 0


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices of all hosts, the devices of each host side by side.

    So host p of P has the rows p * B / P to (p + 1) * B / P - 1 of a batch, on any machine. Left
    to itself, JAX orders the devices of a TPU slice by their place in it, which interleaves hosts.

    Args:
      data: devices along `data`; -1 for all that `fsdp` leaves.
      fsdp: devices along `fsdp`.
      devices: to use in place of those of this program.

    Raises:
      UserError: the devices do not fill such a mesh.
    """
    devices = jax.devices() if devices is None else devices
    total = len(devices)
    if total % fsdp or (data != -1 and data * fsdp != total):
        wanted = f"{'all' if data == -1 else data} x {fsdp}"
        raise UserError(
            f"config.mesh is {wanted} (data x fsdp), which the {total} devices do not fill"
        )
    by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(by_host).reshape(total // fsdp, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function`, to be compiled for `mesh`.

    The compiler divides all work among the devices by itself, but for kernels, which are told of
    the mesh so that each device takes its share of a batch.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return run


def describe(mesh: Mesh) -> str:
    """Hosts, devices and mesh in one line."""
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{jax.process_count()} host(s), {mesh.size} {device.platform} device(s) "
        f"({device.device_kind}), mesh {axes}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_fsdp(tree: Any, mesh: Mesh) -> Any:
    """For each array of a tree, where to keep it: split along its longest axis that can be.

    Arrays of less than `SMALLEST_SPLIT` elements, or without such an axis, are whole everywhere.
    """
    fsdp = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, side in enumerate(leaf.shape) if side % fsdp == 0]
        if fsdp == 1 or leaf.size < SMALLEST_SPLIT or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        spec = ["fsdp" if axis == longest else None for axis in range(leaf.ndim)]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, tree)


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """A whole copy on every device, of a tree of arrays that each host has whole and alike."""
    place = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(place, np.asarray(leaf)), tree
    )


def fetch(tree: Any, mesh: Mesh) -> Any:
    """Numpy arrays, whole on every host, of a tree that may be split over hosts."""
    return jax.device_get(jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Global arrays, split over the devices by rows, from this host's rows."""
    rows = NamedSharding(mesh, ROWS)
    return {
        key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()
    }


def prefetch(
    batches: Generator[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Generator[dict[str, Any]]:
    """`batches` as `put_batch` gives them, `ahead` of them on their way before they are asked for.

    Closing it closes `batches`.
    """
    with contextlib.closing(batches):
        placed = (put_batch(batch, mesh) for batch in batches)
        waiting = deque(itertools.islice(placed, ahead))
        while waiting:
            batch = waiting.popleft()
            waiting.extend(itertools.islice(placed, 1))
            yield batch


def place_rows(
    shapes: Mapping[str, tuple[tuple[int, ...], str]], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's arrays, given by shape and dtype, as `put_batch` places them."""
    rows = NamedSharding(mesh, ROWS)
    return {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }


def check_batch_size(key: str, batch_size: int, devices: int, parts: int = 1) -> None:
    """Raises UserError if the devices cannot share a batch, taken in `parts`, equally."""
    if batch_size % (devices * parts):
        taken = f", taken in {parts} parts" if parts > 1 else ""
        raise UserError(
            f"config.{key} is {batch_size}, expected a multiple of {devices * parts}: "
            f"there are {devices} devices{taken}"
        )
