"""The I/O manager on a simulated kernel that does all a kernel may do, in any order."""

from __future__ import annotations

import errno
import os
import warnings
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final

import hypothesis.strategies as st
import trio
import trio._core._run as trio_run
from accounting import ByteLedger
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulated_ring import File, SimulatedKernel, SimulatedRing

from trio_uring import RingConfig
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._kernel.uapi import Opcode
from trio_uring.lowlevel import Operation, operations

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

FILES: Final = 3
FILE_OPERATIONS_MAX: Final = 2
TURNS_TO_END: Final = 10_000
MSG_DONTWAIT: Final = 0x40

sizes = st.integers(1, 20)
files = st.integers(0, FILES - 1)


@dataclass(eq=False)
class Stream:
    """A file, and the data that must be received from it."""

    file: File
    incoming: ByteLedger = field(default_factory=ByteLedger)


@dataclass(eq=False)
class Client:
    """A task that performs one operation."""

    operation: Operation[Any]
    stream: Stream
    buffer: bytearray | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    closed: bool = False
    result: Any = None
    error: Exception | None = None
    done: bool = False
    more: int = 0


class Machine(RuleBasedStateMachine):
    """Tasks begin and end, data arrives, files are closed, and the loop runs, in any order."""

    @initialize(
        seed=st.integers(0, 2**32),
        entries=st.sampled_from([1, 2, 4, 64]),
        completion_entries=st.sampled_from([1, 2, 4, 64]),
        reap_max=st.sampled_from([1, 3, 64]),
    )
    def start(self, seed: int, entries: int, completion_entries: int, reap_max: int) -> None:
        self.kernel = SimulatedKernel(
            Random(seed), entries=entries, completion_entries=completion_entries, reap_max=reap_max
        )
        self.clients: list[Client] = []
        self.failures: list[Exception] = []
        self.streams = [Stream(self.kernel.open(self.kernel.new_fd())) for _ in range(FILES)]
        self.streams_ever = list(self.streams)
        self.manager = UringIOManager(
            SimulatedRing(self.kernel, self.before_sleep),  # type: ignore[arg-type]
            RingConfig(max_file_operations=FILE_OPERATIONS_MAX),
        )
        self.stack = ExitStack()
        self.patch(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        self.patch(trio_run, "TheIOManager", lambda: self.manager)
        trio_run._r.seed(0)
        # This is trio.run, but that the test turns the loop.
        self.loop = trio_run.unrolled_run(
            trio_run.setup_runner(None, [], False, True), self.main, ()
        )
        self.stack.callback(self.abandon)
        self.timeout = next(self.loop)
        while not hasattr(self, "nursery"):
            self.submit_and_wait()

    def patch(self, module: object, name: str, value: object) -> None:
        self.stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)

    def abandon(self) -> None:
        """Clean up after an assertion failed, so that the next example starts anew."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(AssertionError):
                self.loop.close()

    async def main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            await trio.sleep_forever()

    def before_sleep(self) -> None:
        """Fail if the manager sleeps before it has done all its work."""
        assert not self.manager._cancels
        assert not self.manager._backlog
        assert self.manager._watch_entry is not None

    # ---- What tasks do ---------------------------------------------------------------------

    def perform(
        self, operation: Operation[Any], stream: Stream, buffer: bytearray | None = None
    ) -> None:
        if buffer is not None:
            self.kernel.pinned[id(operation)] = buffer
        client = Client(operation, stream, buffer)
        operation.on_cqe_more = operation.on_cqe_more and partial(
            self.take_more, client, operation.on_cqe_more
        )
        self.clients.append(client)
        self.nursery.start_soon(self.task, client)

    def take_more(
        self, client: Client, on_cqe_more: Callable[[int, int], None], res: int, flags: int
    ) -> None:
        assert not client.done
        client.more += 1
        on_cqe_more(res, flags)

    async def task(self, client: Client) -> None:
        try:
            if client.stream not in self.streams:  # a socket would see that it is closed
                client.operation.release()
                return
            with client.scope:
                client.result = await self.manager.perform(client.operation)
        except (OSError, trio.BusyResourceError, trio.ClosedResourceError) as exc:
            client.error = exc
        except Exception as exc:  # noqa: BLE001 (the invariant raises it)
            self.failures.append(exc)
        finally:
            client.done = True
            if client.buffer is not None:
                received = client.result or 0
                client.stream.incoming.received(client.buffer[:received])
                client.buffer.append(0)  # it is ours again
        if isinstance(client.result, bytes):
            client.stream.incoming.received(client.result)
        elif client.operation.opcode == Opcode.ACCEPT and client.result is not None:
            fd, _ = client.result
            self.kernel.fds.remove(fd)

    @rule(file=files, size=sizes, select=st.booleans())
    def receive(self, file: int, size: int, select: bool) -> None:
        stream = self.streams[file]
        fd = stream.file.fd
        if select:
            self.perform(operations.recv_select(fd, self.kernel.buffers, size), stream)
        else:
            buffer = bytearray(size)
            self.perform(operations.recv(fd, buffer), stream, buffer)

    @rule(file=files, size=sizes, kind=st.sampled_from(["waits", "does not wait", "zero copy"]))
    def send(self, file: int, size: int, kind: str) -> None:
        stream = self.streams[file]
        fd = stream.file.fd
        if kind == "zero copy":
            operation = operations.send_zc(fd, bytes(size))
        else:
            operation = operations.send(fd, bytes(size), 0 if kind == "waits" else MSG_DONTWAIT)
        self.perform(operation, stream)

    @rule(file=files)
    def accept(self, file: int) -> None:
        stream = self.streams[file]
        operation = operations.accept(stream.file.fd)
        operation.discard = self.kernel.fds.remove
        self.perform(operation, stream)

    @rule(file=files)
    def receive_many(self, file: int) -> None:
        stream, buffers = self.streams[file], self.kernel.buffers

        def received(res: int, flags: int) -> None:
            stream.incoming.received(buffers.take(res, flags))

        self.perform(operations.recv_multishot(stream.file.fd, buffers, received), stream)

    @rule(file=files)
    def accept_many(self, file: int) -> None:
        stream, fds = self.streams[file], self.kernel.fds
        operation = operations.accept_multishot(stream.file.fd, lambda fd, _flags: fds.remove(fd))
        operation.decode = lambda fd, _flags: (fd, b"")  # as for those that accept once
        operation.discard = fds.remove
        self.perform(operation, stream)

    @rule(file=files)
    def flush_to_disk(self, file: int) -> None:
        self.perform(operations.fsync(self.streams[file].file.fd), self.streams[file])

    @rule(file=files)
    def multishot(self, file: int) -> None:
        operation = operations.nop()
        operation.on_cqe_more = lambda _res, _flags: None
        self.perform(operation, self.streams[file])

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.clients)).scope.cancel()

    @rule(file=files)
    def close(self, file: int) -> None:
        """Close a file. The next file gets its fd."""
        old = self.streams[file]
        for client in self.clients:
            client.closed |= client.stream is old
        trio.lowlevel.notify_closing(old.file.fd)
        self.kernel.close(old.file.fd)
        self.streams[file] = Stream(self.kernel.open(old.file.fd))
        self.streams_ever.append(self.streams[file])

    # ---- What happens elsewhere ------------------------------------------------------------

    @rule()
    def submit_and_wait(self) -> None:
        """Run one iteration of Trio's loop."""
        events: Any = self.manager.get_events(self.timeout)
        self.timeout = self.loop.send(events)

    @rule()
    def complete_some(self) -> None:
        self.kernel.complete_some()

    @rule(file=files, size=sizes)
    def deliver(self, file: int, size: int) -> None:
        stream = self.streams[file]
        stream.file.incoming += stream.incoming.take(size)

    @rule(file=files, size=sizes)
    def make_room(self, file: int, size: int) -> None:
        self.streams[file].file.room += size

    @rule(file=files)
    def connect(self, file: int) -> None:
        self.streams[file].file.connections += 1

    @rule()
    def wake_up(self) -> None:
        """Another thread, or a signal handler, wakes the loop."""
        self.manager.force_wakeup()

    # ---- What must be true -----------------------------------------------------------------

    @invariant()
    def memory_is_pinned(self) -> None:
        self.kernel.check_pins()

    @invariant()
    def no_task_failed(self) -> None:
        for failure in self.failures:
            raise failure

    @invariant()
    def limits_are_kept(self) -> None:
        in_flight = self.manager._entries.values()
        limited = [entry for entry in in_flight if entry.operation.limited]
        assert len(limited) <= FILE_OPERATIONS_MAX
        assert self.manager.file_limiter.available_tokens == FILE_OPERATIONS_MAX - len(limited)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            with self.stack:
                self.end()

    def end(self) -> None:
        """Cancel everything. All tasks must end, and no data may be missing."""
        self.nursery.cancel_scope.cancel()
        for _ in range(TURNS_TO_END):
            self.kernel.complete_all()
            try:
                self.submit_and_wait()
            except StopIteration:
                break
        for client in self.clients:
            check_ending(client)
        for stream in self.streams_ever:
            # What was not received is still there.
            stream.incoming.received(stream.file.incoming)
            assert not stream.incoming.missing
        sent = [c.result for c in self.clients if c.operation.fd >= 0 and not c.buffer]
        assert sum(each for each in sent if isinstance(each, int)) == sum(
            len(stream.file.outgoing) for stream in self.streams_ever
        )
        assert not self.kernel.fds, "an fd was delivered to nobody"
        assert len(self.kernel.buffers.free) == self.kernel.buffers.count
        assert not self.manager._entries
        assert not self.manager.fd_waiters
        assert self.manager.file_limiter.available_tokens == FILE_OPERATIONS_MAX


def check_ending(client: Client) -> None:
    """Fail if a client ended in an unexpected way."""
    assert client.done
    if isinstance(client.error, trio.ClosedResourceError):
        assert client.closed
    if isinstance(client.error, OSError):
        # Among them is none that says "cancelled".
        allowed = {errno.EIO, errno.ENOBUFS, errno.EAGAIN}
        if client.closed:
            allowed.add(errno.EBADF)
        assert client.error.errno in allowed


# `nox -s fuzz` asks for more, and for others each time.
EXAMPLES: Final = int(os.environ.get("TRIO_URING_FUZZ_EXAMPLES", "0"))


def test_manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # Hypothesis leaves a directory behind
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES or 200,
            derandomize=not EXAMPLES,
            stateful_step_count=60,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
