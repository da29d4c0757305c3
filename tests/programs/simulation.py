"""Random programs of sockets, pipes, listeners and files, on the simulated kernel.

    simulation.py SEED STEPS

It makes runs until STEPS steps were made, and prints how often each thing happened. A run that
fails prints its own seed, which repeats it with 1 step. The environment must have
PYTHONHASHSEED=0, PYTHONPATH=tests, and in LD_PRELOAD the library that is built from
simulated_kernel.c (tests/fuzz/test_simulated_kernel.py).

A step begins an operation in a task of its own, cancels one, or changes what the other side does.
What must be true:

- Each byte that was sent arrives once, in order, cancelled receives or not.
- A buffer belongs to the kernel, and cannot be resized, until the operation has ended.
- Each task ends, and is woken once for each time that it waits.
- In the end nothing is in flight, no token of the limiter is missing, and no fd is open.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import trio
import trio._core._run as trio_run
from accounting import ByteLedger, open_fds
from simulated_kernel import SimulatedKernel

import trio_uring
from trio_uring import RingConfig, accept_many, linked, perform_many, receive_many
from trio_uring._engine import _buffer_pool
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._trio_private import current_io_manager
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

STEPS_MAX: Final = 150  # in a run
SIZES: Final = (1, 7, 100, 3000, 70_000)
STREAMS: Final = 4
FILE_SIZE: Final = 10_000

# What an operation may fail with: by the simulated kernel, or since a task has closed the fd.
FAILURES: Final = {errno.EIO, errno.ENOBUFS, errno.EAGAIN, errno.EBADF}


class WokenOnce(trio.abc.Instrument):
    """Fails if a task that was woken is woken again before it runs."""

    def __init__(self) -> None:
        self.woken: set[trio.lowlevel.Task] = set()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        assert task not in self.woken, task
        self.woken.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.woken.remove(task)


class Stream:
    """A stream of the run's, and its other side, which is outside."""

    def __init__(self, random: Random, pinned: dict[int, bytearray]) -> None:
        self.pinned = pinned
        inside, self.outside = socket.socketpair()
        inside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.outside.setblocking(False)
        self.rest = inside.dup()  # to see what nobody received
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(inside))
        self.incoming, self.outgoing = ByteLedger(), ByteLedger()
        self.receives = self.sends = self.closed = self.ended = False
        self.unknown = 0  # how many bytes of a send_all that was cancelled may have been sent
        self.random = random

    # ---- The other side --------------------------------------------------------------------

    def send(self) -> None:
        if self.ended:
            return
        size = self.random.choice(SIZES)
        sent = 0
        with suppress(BlockingIOError):
            sent = self.outside.send(self.incoming.take(size))
        self.incoming.take_back(size - sent)

    def receive(self) -> None:
        with suppress(BlockingIOError, ConnectionError):
            while data := self.outside.recv(65536):
                self.outgoing.received(data)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self.outside.shutdown(socket.SHUT_WR)

    # ---- This side -------------------------------------------------------------------------

    async def aclose(self) -> None:
        self.closed = True
        await self.stream.aclose()

    def got(self, data: bytes | bytearray | memoryview) -> None:
        self.incoming.received(data)
        if not data:
            assert self.ended or self.closed, "the end of a stream that goes on"
            assert not self.incoming.missing, "the end came before the data"

    async def receive_some(self) -> None:
        self.got(await self.stream.receive_some(self.random.choice((*SIZES, None))))

    async def recv(self) -> None:
        self.got(await self.stream.socket.recv(self.random.choice(SIZES)))

    async def recv_into(self) -> None:
        buffer = bytearray(self.random.choice(SIZES))
        self.got(buffer[: await self.stream.socket.recv_into(buffer)])

    async def perform_recv(self) -> None:
        buffer = bytearray(self.random.choice(SIZES))
        operation = operations.recv(self.stream.socket.fileno(), buffer)
        self.pinned[id(buffer)] = buffer
        size = 0
        try:
            with suppress(OSError):
                size = await perform(operation)
        finally:
            del self.pinned[id(buffer)]
            buffer.append(0)  # it is ours again
            if size:
                self.got(buffer[:size])

    async def receive_many(self) -> None:
        wanted = self.random.randint(1, 4)
        leases = receive_many(self.stream, max_buffers=4, buffer_size=4096)
        async with leases:
            try:
                async for lease in leases:
                    with lease:
                        self.got(lease.memory)
                    wanted -= 1
                    if not wanted:
                        break
            finally:
                with trio.CancelScope(shield=True):
                    await leases.aclose()
                self.incoming.received(leases.unread)

    async def send_all(self) -> None:
        data = self.outgoing.take(size := self.random.choice(SIZES))
        self.unknown = size
        await self.stream.send_all(data)
        self.unknown = 0

    async def send_once(self) -> None:
        await self._send(self.stream.socket.send)

    async def send_zc(self) -> None:
        async def send(data: bytes) -> int:
            with overwritten_after(data) as buffer:
                return await perform(operations.send_zc(self.fd, buffer))

        await self._send(send)

    async def send_zc_batch(self) -> None:
        """One that does not wait is in a batch of the C core, which has two CQEs for it."""

        async def send(data: bytes) -> int:
            with overwritten_after(data) as buffer:
                operation = operations.send_zc(self.fd, buffer, socket.MSG_DONTWAIT)
                outcomes = await perform_many([operations.nop(), operation])
            return getattr(outcomes[1], "value", 0)

        await self._send(send)

    async def send_batch(self) -> None:
        async def send(data: bytes) -> int:
            sends = [
                operations.send(self.fd, data[:1]),
                operations.send(self.fd, data[1:]),
            ]
            outcomes = await perform_many([linked(sends)])
            return sum(getattr(outcome, "value", 0) for outcome in outcomes)

        await self._send(send)

    async def _send(self, send: Callable[[bytes], Awaitable[int]]) -> None:
        size, sent = self.random.choice(SIZES[1:]), 0
        data = self.outgoing.take(size)
        try:
            sent = await send(data)
        finally:
            self.outgoing.take_back(size - sent)

    @property
    def fd(self) -> int:
        return self.stream.socket.fileno()

    def check(self) -> None:
        """Look at what nobody received: now nothing may be missing."""
        self.receive()
        self.rest.setblocking(False)
        with suppress(BlockingIOError):
            while data := self.rest.recv(65536):
                self.incoming.received(data)
        assert not self.incoming.missing, f"{self.incoming.missing} bytes are lost"
        assert 0 <= self.outgoing.missing <= self.unknown, f"{self.outgoing.missing} bytes unsent"
        self.outside.close()
        self.rest.close()


@contextmanager
def overwritten_after(data: bytes) -> Iterator[bytearray]:
    """A buffer with *data* that is used for something else in the end."""
    buffer = bytearray(data)
    yield buffer
    buffer[:] = bytes(len(buffer))


class Pipe:
    """A pipe of which the run has both ends."""

    def __init__(self, random: Random) -> None:
        ends = os.pipe()
        self.reader, self.writer = map(trio.lowlevel.FdStream, ends)
        self.ledger = ByteLedger()
        self.random = random
        self.unknown = False

    async def read(self) -> None:
        self.ledger.received(await self.reader.receive_some(self.random.choice(SIZES)))

    async def write(self) -> None:
        if self.unknown:
            return
        data = self.ledger.take(self.random.choice(SIZES))
        self.unknown = True
        await self.writer.send_all(data)
        self.unknown = False


class Program:
    """One run."""

    def __init__(self, seed: int, counts: Counter[str]) -> None:
        self.random = Random(seed)
        self.counts = counts
        self.fds = open_fds().keys()
        faults = self.random.choice((0.0, 0.02, 0.1))
        self.kernel = SimulatedKernel(self.random, name=f"seed {seed}", faults=faults)
        self.steps = 0
        self.begun = self.over = 0
        self.scopes: dict[int, trio.CancelScope] = {}
        self.instruments = [WokenOnce()] if self.random.random() < 0.3 else []

    def run(self) -> None:
        random = self.random
        entries = random.choice((2, 4, 8, 64))
        config = RingConfig(
            entries=entries,
            completion_entries=entries * random.choice((1, 2, 64)),
            receive_buffers=random.choice((1, 2, 64)),
            max_file_operations=random.choice((1, 3, 64)),
            turn_budget=random.choice((0.0, 1.0)),
            require=True,
        )
        _buffer_pool._recv_once_works = self.kernel.limits_receives and random.random() < 0.9
        trio_run._r.seed(random.randrange(2**32))
        with tempfile.TemporaryDirectory() as directory:
            self.directory = Path(directory)
            self.kernel.install()
            trio_uring.run(self.main, ring=config, instruments=self.instruments)
            self.kernel.remove()
            gc.collect()
            assert open_fds().keys() == self.fds, (self.fds, open_fds())
        self.counts.update(self.kernel.counts)

    async def main(self) -> None:
        manager = current_io_manager()
        assert isinstance(manager, UringIOManager)
        random = self.random
        self.pinned: dict[int, bytearray] = {}  # by id: what the kernel may write to
        self.streams = [Stream(random, self.pinned) for _ in range(STREAMS)]
        self.pipe = Pipe(random)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("")  # the kernel chooses an abstract name
        self.listener.listen()
        path = self.directory / "file"
        path.write_bytes(bytes(FILE_SIZE))
        (self.directory / "numbers").write_bytes(b"".join(bytes([n] * 100) for n in range(6)))
        self.content = bytearray(FILE_SIZE)
        self.file_in_use = False
        actions = self.actions()
        async with trio.open_nursery() as self.nursery:
            for _ in range(random.randint(1, STEPS_MAX)):
                self.steps += 1
                random.choice(actions)()
                self.check_pins()
                if random.random() < 0.4:
                    await trio.lowlevel.checkpoint()
            for scope in self.scopes.values():
                scope.cancel()
        assert self.begun == self.over
        await self.close_all()
        self.check(manager)

    def actions(self) -> list[Callable[[], object]]:
        many = [
            *(self.receive, self.send, self.come, self.go) * 4,
            *(self.cancel, self.turn_file, self.move_pipe) * 2,
        ]
        return [*many, self.end, self.close, self.accept, self.batch, self.many_nops]

    # ---- Steps -----------------------------------------------------------------------------

    def start(self, name: str, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self.begun += 1
        self.scopes[self.begun] = scope = trio.CancelScope()
        self.nursery.start_soon(self.task, name, self.begun, scope, call)

    async def task(
        self,
        name: str,
        number: int,
        scope: trio.CancelScope,
        call: Callable[[], Coroutine[Any, Any, object]],
    ) -> None:
        ending = "completed"
        try:
            with scope:
                await call()
        except trio.ClosedResourceError:
            ending = "closed"
        except trio.BusyResourceError:
            if not name.startswith("pipe"):  # of all else, only one begins at a time
                raise
            ending = "busy"
        except trio.BrokenResourceError as exc:
            ending = f"broken by {name_of_failure(exc.__cause__)}"
        except OSError as exc:
            ending = name_of_failure(exc)
        if scope.cancelled_caught:
            ending = "cancelled"
        self.counts[f"{name}: {ending}"] += 1
        del self.scopes[number]
        self.over += 1

    def receive(self) -> None:
        each = self.random.choice(self.streams)
        if each.closed or each.receives:
            return
        each.receives = True
        name = self.random.choice(
            ("receive_some", "recv", "recv_into", "perform_recv", "receive_many")
        )
        self.start(name, partial(self.one, each, "receives", getattr(each, name)))

    def send(self) -> None:
        each = self.random.choice(self.streams)
        if each.closed or each.sends or each.unknown:
            return
        each.sends = True
        name = self.random.choice(
            ("send_all", "send_once", "send_zc", "send_zc_batch", "send_batch")
        )
        self.start(name, partial(self.one, each, "sends", getattr(each, name)))

    async def one(self, each: Stream, what: str, call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        finally:
            setattr(each, what, False)

    def come(self) -> None:
        self.random.choice(self.streams).send()

    def go(self) -> None:
        self.random.choice(self.streams).receive()

    def end(self) -> None:
        self.random.choice(self.streams).end()

    def close(self) -> None:
        each = self.random.choice(self.streams)
        if not each.closed:
            self.start("aclose", each.aclose)

    def cancel(self) -> None:
        if self.scopes:
            self.scopes[self.random.choice(list(self.scopes))].cancel()

    def move_pipe(self) -> None:
        name = self.random.choice(("read", "write"))
        self.start(f"pipe {name}", getattr(self.pipe, name))

    def turn_file(self) -> None:
        if not self.file_in_use:
            self.file_in_use = True
            self.start("file", self.use_file)

    async def use_file(self) -> None:
        """Write to a file and read it, at random places; it must have what was written."""
        random = self.random
        path = self.directory / "file"
        try:
            async with await trio.open_file(path, "r+b", buffering=0) as file:
                for _ in range(random.randint(1, 4)):
                    start = random.randrange(FILE_SIZE)
                    await file.seek(start)
                    if random.random() < 0.5:
                        data = random.randbytes(random.randint(1, 500))
                        written = await file.write(data)
                        assert written is not None
                        self.content[start : start + written] = data[:written]
                    else:
                        found = await file.read(random.randint(1, 500))
                        assert found == self.content[start : start + len(found)]
                        assert found
        finally:
            self.file_in_use = False

    def accept(self) -> None:
        self.start("accept_many", self.accept_some)

    async def accept_some(self) -> None:
        """Accept connections; each is either accepted, or still to be accepted in the end."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.listener.dup()))
        clients = [trio.socket.socket(socket.AF_UNIX) for _ in range(self.random.randint(1, 3))]
        try:
            async with listener, accept_many(listener) as connections:
                for client in clients:
                    await client.connect(self.listener.getsockname())
                async for stream in connections:
                    await stream.aclose()
                    break
        finally:
            for client in clients:
                client.close()

    def batch(self) -> None:
        async def reads() -> None:
            fd = os.open(self.directory / "numbers", os.O_RDONLY)
            buffers = [bytearray(100) for _ in range(self.random.randint(1, 6))]
            reads = [operations.read(fd, b, 100 * n) for n, b in enumerate(buffers)]
            outcomes = []
            try:
                outcomes = await perform_many(reads)
            finally:
                for buffer in buffers:
                    buffer.append(0)
                os.close(fd)
            for number, outcome in enumerate(outcomes):
                if res := getattr(outcome, "value", 0):
                    assert buffers[number][:res] == bytes([number] * res)

        self.start("batch", reads)

    def many_nops(self) -> None:
        """More than one enter has room or time for."""
        for _ in range(self.random.randint(1, 60)):
            self.start("nop", lambda: perform(operations.nop()))
        self.start("timeout", lambda: perform(operations.timeout(10**18)))

    # ---- The end ---------------------------------------------------------------------------

    async def close_all(self) -> None:
        for each in self.streams:
            if not each.closed:
                await each.aclose()
            each.check()
        await self.pipe.reader.aclose()
        await self.pipe.writer.aclose()
        self.listener.close()

    def check_pins(self) -> None:
        for buffer in self.pinned.values():
            try:
                buffer.append(0)
            except BufferError:
                continue
            raise AssertionError("a buffer in flight could be moved")

    def check(self, manager: UringIOManager) -> None:
        statistics = manager.statistics()
        assert statistics.in_flight == 0, statistics
        if not self.kernel.limits_receives:  # which is found out once, and told
            tried = self.kernel.counts["RECV with a limit"]
            told = sum(step.startswith("RECV with a limit: ") for step in statistics.refused)
            assert (tried, told) in ((0, 0), (1, 1))
        waiting = [entry for entries in manager.fd_waiters.values() for entry in entries]
        assert waiting in ([], [manager._watch_entry]), waiting
        limiter = manager.file_limiter
        assert limiter.available_tokens == manager.config.max_file_operations


def name_of_failure(exc: BaseException | None) -> str:
    assert isinstance(exc, OSError), exc
    if exc.errno not in FAILURES:
        raise exc
    return errno.errorcode[exc.errno]


def main() -> None:
    seed, steps = map(int, sys.argv[1:])
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # so that a seed replays
    counts: Counter[str] = Counter()
    # What a process learns in its first runs, such as which mounts need no server.
    for warmup in range(3):
        Program(warmup, Counter()).run()
    made = 0
    while made < steps:
        program = Program(seed, counts)
        try:
            program.run()
        except BaseException:
            print(f"failed with seed {seed}", file=sys.stderr, flush=True)
            raise
        made += program.steps
        counts["steps"] += program.steps
        counts["runs"] += 1
        seed += 1
    print(json.dumps(counts, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
