"""Hosts, devices and shardings; all other code sees global arrays.

A mesh has two axes. The rows of a batch are split over both, `data` and `fsdp`. Parameters, their
average and the optimizer state are split over `fsdp` and replicated over `data`. A host means a
process here, as in JAX: one per machine on TPUs, one per task under SLURM.
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
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from activemlp_jax.distributed.rendezvous import MOST_PROCESSES, Rendezvous, join
from activemlp_jax.utils.errors import Interrupted, UserError, command_name, one_line

ROWS = PartitionSpec(("data", "fsdp"))
SMALLEST_SPLIT = 4096  # elements; gathering a smaller array costs more than replicating it

# Keys in the key-value store that JAX's coordination service keeps for all hosts.
FACTS, STOP, PLACED = "activemlp/facts/", "activemlp/stop/", "activemlp/placed/"
END, LONGEST_WAIT = "activemlp/end", 3600  # seconds
LONGEST_TIMEOUT = 7 * 24 * 3600  # seconds
_placed = itertools.count()


class Hosts(NamedTuple):
    """How to find the other processes; SLURM, Open MPI or the TPU fill in what is None or ''.

    `coordinator` is HOST:PORT of the first process; `timeout` is in seconds.
    """

    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300


def _read_launcher(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Number of processes, rank and local rank, if SLURM or Open MPI started several processes."""
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


def _find_others(hosts: Hosts) -> tuple[str, int, int, list[int] | None] | None:
    """Find the coordinator, the process count, this process's id and devices; None if alone."""
    if not 1 <= hosts.timeout <= LONGEST_TIMEOUT:
        raise UserError(f"timeout is {hosts.timeout}, expected 1 to {LONGEST_TIMEOUT} seconds")
    launched = _read_launcher(os.environ)
    num_processes, process_id, local = hosts.num_processes, hosts.process_id, None
    if launched:
        num_processes = launched[0] if num_processes is None else num_processes
        process_id = launched[1] if process_id is None else process_id
        local = [launched[2]]  # each process uses the accelerator of its local rank
    if (num_processes is None) != (process_id is None) or (
        hosts.coordinator and num_processes is None
    ):
        raise UserError("the coordinator, the number of processes and the process id go together")
    if num_processes is not None and not 1 <= num_processes <= MOST_PROCESSES:
        raise UserError(
            f"the number of processes is {num_processes}, expected 1 to {MOST_PROCESSES:,}"
        )
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise UserError(f"process id is {process_id}, expected 0 to {num_processes - 1}")
    _check_address(hosts.coordinator)
    if num_processes == 1 or (num_processes is None and not _has_tpu()):
        return None
    coordinator = hosts.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    _check_address(coordinator)
    if num_processes is None or process_id is None or not coordinator:
        try:
            found, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator or None, num_processes, process_id, local, None, hosts.timeout
            )
        except RuntimeError as error:
            raise UserError(f"the processes cannot find each other: {error}") from error
        coordinator = found or ""
    if num_processes in (None, 1) or process_id is None:
        return None  # a TPU that is not part of a pod
    if not coordinator:
        raise UserError(
            f"the first of {num_processes} processes is not known; give its HOST:PORT as the "
            "coordinator"
        )
    return coordinator, num_processes, process_id, local


def _check_address(coordinator: str) -> None:
    """Raise UserError if an address is neither empty nor HOST:PORT."""
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdecimal() and 1 <= int(port) <= 65535):
        raise UserError(f"the coordinator is {coordinator}, expected HOST:PORT, PORT 1 to 65535")


def _connect(hosts: Hosts) -> Rendezvous | None:
    """Connect to the other processes, if any, and initialize JAX; call before any computation."""
    others = _find_others(hosts)
    if others is None:
        return None
    coordinator, num_processes, process_id, local = others
    group = join(coordinator, num_processes, process_id, hosts.timeout, _exit_at_once)
    # JAX's client connects only to this machine, but gRPC would use a proxy if one is configured.
    no_proxy = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))  # noqa: SIM112
    os.environ["no_grpc_proxy"] = ",".join(filter(None, (no_proxy, "127.0.0.1")))  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            group.jax_address,
            num_processes,
            process_id,
            local_device_ids=local,
            initialization_timeout=hosts.timeout + 60,
            coordinator_bind_address=group.jax_address,
        )
    except RuntimeError as error:
        message = f"JAX's processes cannot connect: {error}"
        group.report(message, certain=True)
        raise UserError(message) from error
    return group


_ending = threading.Lock()


def _exit_at_once(message: str, status: int = 2) -> None:
    """Print the message and exit without JAX's shutdown, which would wait for the other hosts."""
    _ending.acquire()  # never released, so that only the first message is printed
    try:
        sys.stdout.flush()
        print(f"{command_name()}: error: {one_line(message)}", file=sys.stderr)
        sys.stderr.flush()
    finally:  # printing fails if the output no longer has a reader
        os._exit(status)


class _TerminatedError(BaseException):  # not an Exception, so that nothing else catches it
    """SIGTERM arrived when there was nothing to save."""


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _TerminatedError("stopped by SIGTERM")


def _fail(group: Rendezvous, message: str, status: int) -> None:
    group.report(message, certain=True)
    _exit_at_once(message, status)


@contextlib.contextmanager
def connected(hosts: Hosts) -> Iterator[None]:
    """Connect to the run's other processes inside this context, if there are any.

    Options, launcher or TPU say whether there are. If a process fails, all others end with its
    message within seconds instead of waiting for it. If one is killed, their message names it.

    Args:
      hosts: how to find the other processes.

    Raises:
      UserError: the options do not fit together, or an address cannot be used.
    """
    group = _connect(hosts)
    if group is None:
        yield
        return
    # JAX's own handler would only record a SIGTERM and let the start continue.
    signal.signal(signal.SIGTERM, _terminate)
    client = ocp.multihost.get_jax_distributed_client()
    try:
        yield
        # The first host may still have files to write, and that may fail.
        client.wait_at_barrier(END, LONGEST_WAIT * 1000)
        group.leave()
    except Interrupted:  # raised on all hosts after the same step
        group.leave()
        raise
    except KeyboardInterrupt:
        _fail(group, "interrupted", 128 + signal.SIGINT)
    except _TerminatedError as error:
        _fail(group, str(error), 128 + signal.SIGTERM)
    except SystemExit as error:
        _fail(group, "stopped", error.code if isinstance(error.code, int) else 1)
    except Exception as error:
        message, is_known = one_line(error) or type(error).__name__, isinstance(error, UserError)
        group.report(message, certain=is_known)
        if not is_known:
            traceback.print_exc()
        _exit_at_once(message)


def check_same(what: str, facts: Mapping[str, Any], timeout: float) -> None:
    """Check that all hosts have the same facts; hosts wait for each other here.

    Args:
      what: name of what is checked, different for each call.
      facts: JSON values that must match on every host, keyed by display name.
      timeout: seconds to wait for the last host.

    Raises:
      UserError: a host differs from host 0 or has not arrived in time; the message names it.
    """
    if jax.process_count() == 1:
        return
    client = ocp.multihost.get_jax_distributed_client()
    prefix = f"{FACTS}{what}/"
    client.key_value_set(f"{prefix}{jax.process_index()}", json.dumps(facts))
    try:
        client.wait_at_barrier(prefix, int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        arrived = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(prefix)}
        missing = [str(host) for host in range(jax.process_count()) if host not in arrived]
        raise UserError(
            f"{what}: after {timeout:.0f} s these hosts are not ready: {', '.join(missing)}"
        ) from error
    facts_by_host = {
        int(key.rpartition("/")[2]): json.loads(value)
        for key, value in client.key_value_dir_get(prefix)
    }
    for host in sorted(facts_by_host):
        for name, expected in facts_by_host[0].items():
            value = facts_by_host[host].get(name)
            if value != expected:
                raise UserError(
                    f"host {host} differs from host 0: {name} is {value!r} there and "
                    f"{expected!r} on host 0"
                )


def first_host_says(value: bool) -> bool:
    """Return host 0's `value` on every host; with several hosts, this waits for the devices."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def stop_is_agreed(wanted: bool, step: int) -> bool:
    """Whether all hosts stop after `step`; a host that wants to stop schedules it two steps later.

    Every host calls this after every step, once it has waited for the previous step. So no host
    asks about `step + 2` before all have asked about `step`, and all see a stop scheduled then.

    Args:
      wanted: whether this host was asked to stop.
      step: number of the step that is done.
    """
    client = ocp.multihost.get_jax_distributed_client()
    if wanted:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host has scheduled it
            client.key_value_set(f"{STOP}at", str(step + 2))
    return any(step >= int(agreed) for _, agreed in client.key_value_dir_get(STOP))


def shared_store() -> Any:
    """Return the key-value store that all hosts share; None if there is only one host."""
    return ocp.multihost.get_jax_distributed_client() if jax.process_count() > 1 else None


def sum_over_hosts(value: int) -> int:
    """Sum `value` over all hosts; with several hosts, this waits for the devices."""
    return int(multihost_utils.process_allgather(np.asarray(value)).sum())


def this_host() -> dict[str, int]:
    """Number of this host, `process`, and number of hosts, `processes`."""
    return {"process": jax.process_index(), "processes": jax.process_count()}


def is_first_host() -> bool:
    """Whether this host is the one that writes files and prints for all."""
    return jax.process_index() == 0


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh of all devices of all hosts, with each host's devices next to each other.

    So host p of P has the rows p * B / P to (p + 1) * B / P - 1 of a batch on any machine. By
    default, JAX orders the devices of a TPU slice by their position in it, which interleaves hosts.

    Args:
      data: size of the axis `data`; -1 for the number of devices divided by `fsdp`.
      fsdp: size of the axis `fsdp`.
      devices: devices of the mesh; None for all devices of this program.

    Raises:
      UserError: the devices do not fill the mesh.
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
    """Wrap `function` so that it is compiled for `mesh`.

    XLA partitions everything except Pallas kernels by itself. The kernels read the mesh from the
    context, so that each device processes its share of the batch.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return run


def describe(mesh: Mesh) -> str:
    """Describe hosts, devices and mesh in one line."""
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{jax.process_count()} host(s), {mesh.size} {device.platform} device(s) "
        f"({device.device_kind}), mesh {axes}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_fsdp(tree: Any, mesh: Mesh) -> Any:
    """Make shardings for a tree that split each array along its longest axis divisible by `fsdp`.

    Arrays without such an axis, or with fewer than `SMALLEST_SPLIT` elements, are replicated.

    Args:
      tree: arrays, or anything with a shape and a size, such as `jax.ShapeDtypeStruct`.
      mesh: as `make_mesh` returns it.
    """
    fsdp = mesh.shape["fsdp"]

    def shard(leaf: Any) -> NamedSharding:
        axes = [axis for axis, side in enumerate(leaf.shape) if side % fsdp == 0]
        if fsdp == 1 or leaf.size < SMALLEST_SPLIT or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        spec = ["fsdp" if axis == longest else None for axis in range(leaf.ndim)]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(shard, tree)


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Replicate a tree of arrays, whole and equal on each host, to all devices.

    Hosts wait for each other here: one may have had to compile the initialization that another
    found in a cache, and the first collective operation on CPUs waits for only 30 seconds.
    """
    if jax.process_count() > 1:
        client = ocp.multihost.get_jax_distributed_client()
        client.wait_at_barrier(f"{PLACED}{next(_placed)}", LONGEST_WAIT * 1000)
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def fetch(tree: Any, mesh: Mesh) -> Any:
    """Copy a tree that may be split over hosts to numpy arrays, whole on every host."""
    return jax.device_get(jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Make global arrays, split by rows over all devices, from this host's rows."""
    rows = NamedSharding(mesh, ROWS)
    return {
        key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()
    }


def prefetch(
    batches: Generator[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Generator[dict[str, Any]]:
    """Yield `batches` as `put_batch` returns them, starting `ahead` transfers in advance.

    Closing the generator closes `batches`.
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
    """Shapes, dtypes and shardings of a batch that `put_batch` returns, from shapes and dtypes."""
    rows = NamedSharding(mesh, ROWS)
    return {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }


def check_batch_size(key: str, batch_size: int, devices: int, parts: int = 1) -> None:
    """Raise UserError if `devices` cannot equally share a batch that is processed in `parts`."""
    if batch_size % (devices * parts):
        taken = f", taken in {parts} parts" if parts > 1 else ""
        raise UserError(
            f"config.{key} is {batch_size}, expected a multiple of {devices * parts}: "
            f"there are {devices} devices{taken}"
        )
