"""Connections between the processes of a run, through which all learn when one of them fails.

JAX's coordination service identifies processes only by number. If two processes have the same
number, or the first one dies, the service ends others with a C++ stack trace. So the first process
listens at the run's address itself, and JAX's service listens behind it on the loopback interface.
Every other process identifies itself on a connection to the first process and keeps it open; when
that connection ends, the process is gone. Further connections carry the traffic between the
process's JAX client and the service.
"""

import asyncio
import contextlib
import errno
import json
import os
import resource
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from activemlp_jax.utils.errors import UserError, describe_os_error, one_line
from activemlp_jax.utils.json_files import expect, parse_json

MOST_PROCESSES = 1_000_000
RETRY = 0.2  # seconds between two attempts to reach the first process
GRACE = 1.0  # seconds to wait for a failure that explains an error of unknown cause
PATIENCE = 5.0  # seconds to wait for other processes to end

Message = dict[str, Any]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]  # of one connection


class Member(NamedTuple):
    """A process of a run: its number, the number of processes, its machine, pid and random key."""

    process: int
    processes: int
    machine: str
    pid: int
    key: str

    def __str__(self) -> str:
        return f"host {self.process} ({one_line(self.machine)}, pid {self.pid})"

    def gone(self) -> str:
        """Return the message that the process is gone."""
        return (
            f"{self} is gone: it was killed, or its machine or network failed; start all hosts "
            "again with the same command"
        )


class Rendezvous:
    """Base class for the two kinds of processes, the first and the others; `join` makes one.

    Its connections belong to an event loop in a separate thread, so that a failure is noticed while
    the main thread waits for devices.
    """

    def __init__(self, address: str, me: Member, timeout: float, end: Callable[[str], None]):
        self.me = me
        self._address, self._timeout, self._end = address, timeout, end
        host, _, port = address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._writers: dict[int, asyncio.StreamWriter] = {}  # by process
        self._is_ending = False  # True once failures of other processes no longer matter
        self._all_met = asyncio.Event()
        self._own_failure_known = asyncio.Event()  # set once all know that this process has failed
        self._token = ""  # identifies connections to forward to JAX's service
        self.jax_address = ""  # address of the service for this process's JAX client
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_ignore_destroyed_tasks)
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def report(self, message: str, certain: bool) -> None:
        """Tell all other processes that this one fails and why; return when this one may end.

        If not `certain`, the cause may be in another process, as when a collective operation fails.
        If another process then turns out to have failed, this one ends with that one's message.
        """
        self._run(self._report(message[:4000], certain))  # a line has at most 64 KiB

    def leave(self) -> None:
        """Tell the other processes that this one ends normally."""
        self._is_ending = True
        self._run(self._send_all({"done": True}))

    async def _meet(self) -> None:
        raise NotImplementedError

    async def _report(self, message: str, certain: bool) -> None:
        raise NotImplementedError

    async def _send_all(self, message: Message) -> None:
        await asyncio.gather(*(_send(writer, message) for writer in self._writers.values()))

    async def _reach_first(self) -> Streams:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        connection = writer.get_extra_info("socket")
        if connection.getsockname() == connection.getpeername():
            # Nobody listens yet, and the system gave the same port to this end of the connection.
            writer.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return reader, writer

    async def _say_hello(self) -> tuple[Message, asyncio.StreamReader, asyncio.StreamWriter]:
        """Introduce this process at the address; return the answer ({} if none) and the streams."""
        reader, writer = await self._reach_first()
        try:
            await _send(writer, self.me._asdict())
            return await _receive(reader), reader, writer
        except asyncio.CancelledError:
            writer.close()
            raise


class _FirstProcess(Rendezvous):
    """The process that the others connect to; it decides which failure came first."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._members = {0: self.me}
        self._failures: list[asyncio.Task[None]] = []  # else they might be garbage collected
        self._token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._service_port = free.getsockname()[1]
        self.jax_address = f"127.0.0.1:{self._service_port}"
        # Every other process takes three file descriptors here, and the limit may be 1,024.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def _meet(self) -> None:
        try:
            await asyncio.start_server(self._accept, None, self._port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"cannot listen on port {self._port}: {os.strerror(error.errno or 0)}"
                ) from error
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._find_another_first(), 2.0)
            raise UserError(
                f"port {self._port} of this machine is in use by another program; choose another "
                "one in the coordinator's HOST:PORT, on all hosts"
            ) from error
        search = asyncio.create_task(self._find_another_first())
        try:
            await asyncio.wait_for(self._all_met.wait(), self._timeout)
        except TimeoutError:
            missing = [number for number in range(self.me.processes) if number not in self._members]
            names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            await self._fail(
                f"after {self._timeout:.0f} s {len(missing)} of {self.me.processes} hosts have not "
                f"reached {self._address}: {names}; are they running?"
            )
        finally:
            search.cancel()

    async def _find_another_first(self) -> None:
        """Fail if another process that calls itself the first listens and answers `failed`."""
        while True:
            with contextlib.suppress(OSError):
                answer, _, writer = await self._say_hello()
                writer.close()
                if "failed" in answer:
                    await self._fail(str(answer["failed"]))
                if "yourself" in answer:
                    return
            await asyncio.sleep(RETRY)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await _receive(reader)
        if hello.get("token") == self._token:
            await self._forward(reader, writer)
        elif member := _as_member(hello):
            await self._admit(member, reader, writer)
        writer.close()

    async def _admit(
        self, member: Member, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if member.key == self.me.key:
            await _send(writer, {"yourself": True})
            return
        number, error = member.process, ""
        if member.processes != self.me.processes:
            error = (
                f"{member} was started as one of {member.processes} processes, and {self.me} as "
                f"one of {self.me.processes}"
            )
        elif number in self._members:
            error = f"two processes have process id {number}: {self._members[number]} and {member}"
        if error:
            await _send(writer, {"failed": error})
            if not self._all_met.is_set():
                await self._fail(error)
            return
        if self._is_ending:
            return
        self._members[number], self._writers[number] = member, writer
        _notice_lost_machines(writer)
        await _send(writer, self.me._asdict())
        if len(self._members) == self.me.processes:
            self._all_met.set()
            await self._send_all({"token": self._token})
        while message := await _receive(reader):
            if "done" in message:
                del self._writers[number]
                return
            if "failed" in message:
                failure = self._fail(str(message["failed"]), number, bool(message.get("certain")))
                self._failures.append(asyncio.create_task(failure))
        del self._writers[number]
        await self._fail(member.gone())

    async def _fail(self, message: str, source: int | None = None, certain: bool = True) -> None:
        """End all processes, this one last; `source` is the number of the failed process."""
        if not certain:
            await asyncio.sleep(GRACE)
        if self._is_ending:
            return
        self._is_ending = True
        reported = message if source is None else f"{self._members[source]} stopped: {message}"
        await self._send_all({"failed": reported, "source": source})
        deadline = self._loop.time() + PATIENCE
        while self._writers and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        if source == 0:
            self._own_failure_known.set()
        else:
            self._end(reported)

    async def _report(self, message: str, certain: bool) -> None:
        await self._fail(message, 0, certain)
        await self._own_failure_known.wait()  # if another failure was first, the process ends here

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward a connection to JAX's service, which may not have started yet."""
        while True:
            with contextlib.suppress(OSError):
                service = await asyncio.open_connection("127.0.0.1", self._service_port)
                break
            await asyncio.sleep(0.05)
        await _connect((reader, writer), service)


class _OtherProcess(Rendezvous):
    """A process other than the first; it connects to the first."""

    _first: Member
    _reason = ""  # why the first process is not found

    async def _meet(self) -> None:
        try:
            reader = await asyncio.wait_for(self._find_first(), self._timeout)
            listening = asyncio.create_task(self._listen(reader))
            listening.add_done_callback(lambda _: self._all_met.set())
            await asyncio.wait_for(self._all_met.wait(), self._timeout)
        except TimeoutError:
            reason = f" ({self._reason})" if self._reason else ""
            self._end(
                f"after {self._timeout:.0f} s host {self.me.process} has not met all "
                f"{self.me.processes} hosts at {self._address}{reason}; are they running?"
            )
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.jax_address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _find_first(self) -> asyncio.StreamReader:
        while True:
            try:
                answer, reader, writer = await self._say_hello()
            except OSError as error:
                self._reason = describe_os_error(error)
            else:
                if "failed" in answer:
                    self._end(str(answer["failed"]))
                if first := _as_member(answer):
                    self._first, self._writers[0] = first, writer
                    _notice_lost_machines(writer)
                    return reader
                self._reason = "what listens there is not the first process of a run"
                writer.close()
            await asyncio.sleep(RETRY)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while message := await _receive(reader):
            if "token" in message:
                self._token = message["token"]
                self._all_met.set()
            elif "done" in message:
                self._is_ending = True
            elif message.get("source") == self.me.process:
                self._own_failure_known.set()
            elif "failed" in message and not self._is_ending:
                self._end(str(message["failed"]))
        if not self._is_ending:
            self._end(self._first.gone())

    async def _report(self, message: str, certain: bool) -> None:
        self._is_ending = certain
        await self._send_all({"failed": message, "certain": certain})
        if not certain:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._own_failure_known.wait(), PATIENCE)
            self._is_ending = True

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward the connection of this process's JAX client to the first process."""
        with contextlib.suppress(OSError):
            first = await self._reach_first()
            await _send(first[1], {"token": self._token})
            if not await _connect((reader, writer), first):
                return
        # JAX ends this process when the connection closes; `_listen` has to say why before that.
        await asyncio.sleep(PATIENCE)
        writer.close()


def join(
    address: str, processes: int, process: int, timeout: float, end: Callable[[str], None]
) -> Rendezvous:
    """Meet the other processes of a run; raise UserError if the first cannot listen at `address`.

    JAX then finds its service at `jax_address`. When another process fails, `end` is called with a
    message in another thread; it must end this process.
    """
    me = Member(process, processes, socket.gethostname(), os.getpid(), secrets.token_hex(16))
    kind = _OtherProcess if process else _FirstProcess
    group = kind(address, me, timeout, end)
    group._run(group._meet())
    return group


def _as_member(message: Message) -> Member | None:
    try:
        processes = expect(message["processes"], "processes", int, 2, MOST_PROCESSES)
        process = expect(message["process"], "process", int, 0, processes - 1)
        pid = expect(message["pid"], "pid", int, 1, 2**32)
        return Member(process, processes, str(message["machine"]), pid, str(message["key"]))
    except (KeyError, ValueError):
        return None


async def _send(writer: asyncio.StreamWriter, message: Message) -> None:
    with contextlib.suppress(OSError):  # the reading side notices that the connection has ended
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> Message:
    """Read the next message; {} if the connection ends or the data is not a message."""
    try:
        message = parse_json(await reader.readline(), "a message")
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()


async def _connect(near: Streams, far: Streams) -> bool:
    """Copy both ways until one side ends, then close `far`; return whether `far` ended first."""
    answers = asyncio.create_task(_copy(far[0], near[1]))
    requests = asyncio.create_task(_copy(near[0], far[1]))
    await asyncio.wait([requests, answers], return_when=asyncio.FIRST_COMPLETED)
    far[1].close()
    return answers.done()


def _notice_lost_machines(writer: asyncio.StreamWriter) -> None:
    """Make a connection end half a minute after the other machine stops answering."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not on all systems
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _ignore_destroyed_tasks(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if "was destroyed" not in context["message"]:  # as all pending tasks are when the process ends
        loop.default_exception_handler(context)
