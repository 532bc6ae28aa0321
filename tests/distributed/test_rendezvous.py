"""The first process of a run, and how it treats processes that join, fail or never come."""

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from processes import free_address

from activemlp_jax.distributed.rendezvous import Rendezvous, join
from activemlp_jax.utils.errors import UserError


class EndedError(Exception):
    """Raised where the real code would end the process."""


class First:
    """The first of three processes, run in threads; the other two are plain connections."""

    def __init__(self, timeout: float = 30):
        self.address = free_address()
        self.port = int(self.address.rpartition(":")[2])
        self.ends: queue.Queue[str] = queue.Queue()
        self.group: queue.Queue[Rendezvous] = queue.Queue()
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._join, args=(timeout,), daemon=True).start()

    def _join(self, timeout: float) -> None:
        with contextlib.suppress(EndedError):
            self.group.put(join(self.address, 3, 0, timeout, self._end))

    def _end(self, message: str) -> None:
        self.ends.put(message)
        raise EndedError(message)

    def connect(self) -> socket.socket:
        for _ in range(200):
            try:
                connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
            except ConnectionRefusedError:
                threading.Event().wait(0.02)
            else:
                self.connections.append(connection)
                return connection
        raise AssertionError("the first process does not listen")

    def come(self, process: int, processes: int = 3) -> socket.socket:
        connection = self.connect()
        hello = {"process": process, "processes": processes, "machine": f"node{process}"}
        key = f"key {len(self.connections)}"
        say(connection, hello | {"pid": 70 + len(self.connections), "key": key})
        return connection


def say(connection: socket.socket, message: Any) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def hear(connection: socket.socket) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        more = connection.recv(1)
        assert more, f"the connection ended after {line!r}"
        line += more
    return json.loads(line)


@pytest.fixture
def first() -> Iterator[First]:
    process = First()
    yield process
    for connection in process.connections:
        connection.close()


def all_met(first: First) -> tuple[socket.socket, socket.socket, Rendezvous]:
    one, two = first.come(1), first.come(2)
    group = first.group.get(timeout=20)
    for connection in (one, two):
        assert hear(connection)["process"] == 0
        assert "token" in hear(connection)
    return one, two, group


def failure(first: First, *connections: socket.socket) -> str:
    """Return the message that ends the first process and all that listen on `connections`."""
    for connection in connections:
        while "failed" not in hear(connection):
            pass
        connection.close()
    return first.ends.get(timeout=20)


def test_two_processes_with_one_number_are_both_named_and_end_all(first: First):
    one, other = first.come(1), first.come(1)
    expected = "two processes have process id 1: host 1 (node1, pid 71) and host 1 (node1, pid 72)"
    assert failure(first, one, other) == expected


def test_a_second_first_process_on_another_machine_ends_all(first: First):
    other = first.come(0)
    assert "two processes have process id 0: host 0 (" in failure(first, other)


def test_a_process_that_counts_differently_is_named(first: First):
    two, other = first.come(2), first.come(1, processes=2)
    message = failure(first, two, other)
    assert message.startswith(
        "host 1 (node1, pid 72) was started as one of 2 processes, and host 0"
    )
    assert message.endswith("as one of 3")


def test_a_process_that_is_killed_while_others_are_awaited_is_named(first: First):
    one, two = first.come(1), first.come(2, processes=3)
    hear(one), hear(two)
    one.close()
    assert failure(first, two).startswith("host 1 (node1, pid 71) is gone")


def test_those_who_have_not_come_in_time_are_named():
    first = First(timeout=1)
    two = first.come(2)
    message = failure(first, two)
    assert (
        message == f"after 1 s 1 of 3 hosts have not reached {first.address}: 1; are they running?"
    )


@pytest.mark.parametrize(
    "words",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"process": 1e9}\n', b""],
    ids=["HTTP", "not UTF-8", "deeply nested", "no member", "nothing"],
)
def test_a_stranger_that_connects_does_not_disturb(words: bytes, first: First):
    stranger = first.connect()
    stranger.sendall(words)
    stranger.close()
    all_met(first)
    assert first.ends.empty()


def test_a_process_that_comes_too_late_is_refused_and_the_run_goes_on(first: First):
    one, _two, _ = all_met(first)
    late = first.come(2)
    assert "two processes have process id 2" in hear(late)["failed"]
    one.settimeout(0.3)
    with pytest.raises(TimeoutError):
        one.recv(1)
    assert first.ends.empty()


def test_an_error_that_a_lost_host_caused_elsewhere_is_not_taken_for_the_cause(first: First):
    """When a host is lost, collective operations of the others fail at about the same time."""
    one, two, _ = all_met(first)
    say(one, {"failed": "Gloo AllGather failed", "certain": False})
    two.close()
    assert failure(first, one).startswith("host 2 (node2, pid 72) is gone")


def test_an_error_without_another_cause_ends_the_others_with_its_message(first: First):
    one, two, _ = all_met(first)
    say(one, {"failed": "division by zero", "certain": False})
    assert failure(first, one, two) == "host 1 (node1, pid 71) stopped: division by zero"


def test_a_process_that_is_done_may_leave(first: First):
    one, two, group = all_met(first)
    say(one, {"done": True})
    one.close()
    two.settimeout(0.3)
    with pytest.raises(TimeoutError):
        two.recv(1)
    two.settimeout(20)
    group.leave()
    assert hear(two) == {"done": True}
    assert first.ends.empty()


def test_a_port_in_use_by_another_program_is_named():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of this machine is in use by another"):
            join(f"127.0.0.1:{port}", 2, 0, 5, print)
