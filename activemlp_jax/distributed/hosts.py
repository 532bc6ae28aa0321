"""Functions with which the processes of a run start together, agree, and end together.

A host means a process here, as in JAX: one per machine on TPUs, one per task under SLURM.
"""

import contextlib
import glob
import importlib.util
import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from activemlp_jax.distributed.rendezvous import MOST_PROCESSES, Rendezvous, join
from activemlp_jax.utils.errors import Interrupted, UserError, command_name, one_line

# Keys in the key-value store that JAX's coordination service keeps for all hosts.
FACTS, STOP, END = "activemlp/facts/", "activemlp/stop/", "activemlp/end"
LONGEST_WAIT = 3600  # seconds to wait for work that only some of the hosts have to do
LONGEST_TIMEOUT = 7 * 24 * 3600  # seconds
STOPPED_BY_SIGTERM = 128 + signal.SIGTERM  # exit status

_timeout = 300  # seconds that hosts wait for each other; `connected` sets it
_checks = itertools.count()
_ending = threading.Lock()


class Hosts(NamedTuple):
    """Options to find the other processes; the launcher or TPU supplies those left None or ''."""

    coordinator: str = ""  # HOST:PORT of the first process
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300  # seconds


def _read_launcher(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Return processes, rank and local rank if SLURM or Open MPI started several, else None."""
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


def _find_place(hosts: Hosts) -> tuple[str, int, int, list[int] | None] | None:
    """Return coordinator, process count, process id and local devices; None for one process."""
    if not 1 <= hosts.timeout <= LONGEST_TIMEOUT:
        raise UserError(f"timeout is {hosts.timeout}, expected 1 to {LONGEST_TIMEOUT} seconds")
    number, process, local = hosts.num_processes, hosts.process_id, None
    if launched := _read_launcher(os.environ):
        number = launched[0] if number is None else number
        process = launched[1] if process is None else process
        local = [launched[2]]  # each process uses the accelerator of its local rank
    if (number is None) != (process is None) or (hosts.coordinator and number is None):
        raise UserError("the coordinator, the number of processes and the process id go together")
    if number is not None and not 1 <= number <= MOST_PROCESSES:
        raise UserError(f"the number of processes is {number}, expected 1 to {MOST_PROCESSES:,}")
    if number is not None and not 0 <= (process or 0) < number:
        raise UserError(f"process id is {process}, expected 0 to {number - 1}")
    coordinator = hosts.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdecimal() and 1 <= int(port) <= 65535):
        raise UserError(f"the coordinator is {coordinator}, expected HOST:PORT, PORT 1 to 65535")
    if number == 1 or (number is None and not _has_tpu()):
        return None
    if number is None or process is None or not coordinator:
        try:
            found, number, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator or None, number, process, local, None, hosts.timeout
            )
        except RuntimeError as error:
            raise UserError(f"the processes cannot find each other: {error}") from error
        coordinator = found or ""
    if number in (None, 1) or process is None:
        return None  # a TPU that is not part of a pod
    if not coordinator:
        raise UserError(
            f"the first of {number} processes is not known; give its HOST:PORT as the coordinator"
        )
    return coordinator, number, process, local


def _connect(
    coordinator: str, processes: int, process: int, devices: list[int] | None, timeout: int
) -> Rendezvous:
    """Connect to the other processes and initialize JAX; call this before any JAX computation."""
    group = join(coordinator, processes, process, timeout, _exit_at_once)
    # JAX's client connects only to this machine, but gRPC would use a proxy if one is configured.
    no_proxy = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))  # noqa: SIM112
    os.environ["no_grpc_proxy"] = ",".join(filter(None, (no_proxy, "127.0.0.1")))  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            group.jax_address,
            processes,
            process,
            devices,
            initialization_timeout=timeout + 60,
            coordinator_bind_address=group.jax_address,
        )
    except RuntimeError as error:
        message = f"JAX's processes cannot connect: {error}"
        group.report(message, certain=True)
        raise UserError(message) from error
    return group


def _exit_at_once(message: str, status: int = 2) -> None:
    """Print the message and exit without JAX's shutdown, which would wait for the other hosts."""
    _ending.acquire()  # never released, so that only the first message is printed
    try:
        sys.stdout.flush()
        print(f"{command_name()}: error: {one_line(message)}", file=sys.stderr)
        sys.stderr.flush()
    finally:  # printing fails if the output no longer has a reader
        os._exit(status)


@contextlib.contextmanager
def connected(hosts: Hosts) -> Iterator[None]:
    """Connect to the run's other processes inside this context, if there are any.

    The fields of `hosts`, the launcher or the TPU tell whether there are any. If a process fails,
    all others end with its message within seconds instead of waiting for it. If one is killed, the
    message of the others names it. Raises UserError if the fields do not fit together or an address
    cannot be used.
    """
    global _timeout
    place = _find_place(hosts)
    if place is None:
        yield
        return
    _timeout = hosts.timeout
    group = _connect(*place, hosts.timeout)
    # JAX's own handler would only record a SIGTERM and let the startup continue.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED_BY_SIGTERM))
    failure: Exception | None = None
    try:
        yield
        # The first host may still have files to write, and that may fail.
        _store().wait_at_barrier(END, LONGEST_WAIT * 1000)
        group.leave()
        return
    except Interrupted:  # raised on all hosts after the same step
        group.leave()
        raise
    except KeyboardInterrupt:
        message, status = "interrupted", 128 + signal.SIGINT
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        message = "stopped by SIGTERM" if status == STOPPED_BY_SIGTERM else "stopped"
    except Exception as error:
        message, status, failure = one_line(error) or type(error).__name__, 2, error
    is_known = failure is None or isinstance(failure, UserError)
    group.report(message, certain=is_known)
    if not is_known:
        traceback.print_exception(failure)
    _exit_at_once(message, status)


def _store() -> Any:
    return ocp.multihost.get_jax_distributed_client()


def shared_store() -> Any:
    """Return the key-value store that all hosts share; None if there is only one host."""
    return _store() if jax.process_count() > 1 else None


def is_first() -> bool:
    """Return whether this host is the one that writes files and prints for all."""
    return jax.process_index() == 0


def check_same(what: str, facts: Mapping[str, Any], timeout: float | None = None) -> None:
    """Check that all hosts have the same facts.

    Every host must call this, and all hosts must make their checks in the same order. The hosts
    wait for each other here for `timeout` seconds, by default the timeout given to `connected`.
    `facts` are JSON values, keyed by the names that the message gives them.

    Raises:
      UserError: a host differs from host 0 or has not arrived in time; the message names it.
    """
    if jax.process_count() == 1:
        return
    timeout = _timeout if timeout is None else timeout
    prefix = f"{FACTS}{next(_checks)}/"
    _store().key_value_set(f"{prefix}{jax.process_index()}", json.dumps(facts))
    late = None
    try:
        _store().wait_at_barrier(prefix, int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        late = error
    entries = _store().key_value_dir_get(prefix)
    by_host = {int(key.rpartition("/")[2]): json.loads(value) for key, value in entries}
    if late:
        missing = [str(host) for host in range(jax.process_count()) if host not in by_host]
        raise UserError(
            f"{what}: after {timeout:.0f} s these hosts are not ready: {', '.join(missing)}"
        ) from late
    for host in sorted(by_host):
        for name, expected in by_host[0].items():
            value = by_host[host].get(name)
            if value != expected:
                raise UserError(
                    f"host {host} differs from host 0: {name} is {value!r} there and "
                    f"{expected!r} on host 0"
                )


def wait_for_all(what: str) -> None:
    """Wait for the slowest host; a collective operation after this would wait only 30 seconds."""
    check_same(what, {}, LONGEST_WAIT)


def first_host_says(value: bool) -> bool:
    """Return host 0's `value` on every host; if there are several, wait until devices are free."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def sum_over_hosts(value: int) -> int:
    """Sum `value` over all hosts; if there are several, wait until the devices are free."""
    return int(multihost_utils.process_allgather(np.asarray(value)).sum())


def stop_is_agreed(wanted: bool, step: int) -> bool:
    """Return whether all hosts stop after `step`; if `wanted`, schedule that for `step + 2`.

    Every host calls this after every step, once it has waited for the previous step. So no host
    asks about `step + 2` before all have asked about `step`, and all see in time a stop that was
    scheduled at `step`.
    """
    if wanted:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host has scheduled it
            _store().key_value_set(f"{STOP}at", str(step + 2))
    return any(step >= int(agreed) for _, agreed in _store().key_value_dir_get(STOP))
