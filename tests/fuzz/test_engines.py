"""Both engines do what plain Trio does: random programs of sockets, run on each, and compared.

A step starts one operation in a task, or does a few things at once that no task can see apart:
cancels, bytes and ends that come from outside, and closes. Then everything that can happen does,
and what the tasks came to is written down.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import hypothesis.strategies as st
import pytest
import trio
from accounting import ByteLedger
from hypothesis import HealthCheck, given, settings
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig
from trio_uring._kernel import why_no_native

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = tuple[Any, ...]

SOCKETS: Final = 3
SEND_BUFFER: Final = 4096
SIZES: Final = (1, 10, 1000, 20_000)

RECEIVES: Final = ("receive_some", "recv", "recv_into", "iterate")
SENDS: Final = ("send_all", "send")

index = st.integers(0, SOCKETS - 1)
size = st.sampled_from(SIZES)
at_once = st.one_of(
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("come"), index, size),
    st.tuples(st.just("go"), index, size),
    st.tuples(st.just("end"), index),
    st.tuples(st.just("close"), index),
)
steps = st.one_of(
    st.tuples(st.sampled_from(RECEIVES), index, size),
    st.tuples(st.sampled_from(SENDS), index, size),
    st.tuples(st.just("at once"), st.lists(at_once, min_size=1, max_size=3)),
)


@dataclass(eq=False)
class Socket:
    """A stream of the run's, and the other end, which is nobody's."""

    stream: trio.SocketStream
    outside: socket.socket
    incoming: ByteLedger = field(default_factory=ByteLedger)
    outgoing: int = 0


class Program:
    """Performs steps, and notes what they come to."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.scopes: list[trio.CancelScope] = []
        self.notes: list[object] = []
        self.trace: list[object] = []
        self.sockets: list[Socket] = []
        for _ in range(SOCKETS):
            inside, outside = socket.socketpair()
            inside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            outside.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(inside))
            self.sockets.append(Socket(stream, outside))

    def close_all(self) -> None:
        for which in range(SOCKETS):
            self.close(which)
            self.sockets[which].outside.close()

    # ---- Tasks -----------------------------------------------------------------------------

    def start(self, kind: str, which: int, count: int) -> None:
        each = self.sockets[which]
        scope = trio.CancelScope()
        self.scopes.append(scope)
        method: Callable[..., Any] = getattr(self, kind)
        self.nursery.start_soon(
            self.task, len(self.scopes), kind, scope, partial(method, each, count)
        )

    async def task(
        self, number: int, kind: str, scope: trio.CancelScope, operation: Callable[[], Any]
    ) -> None:
        outcome: object = "cancelled"
        with scope:
            try:
                outcome = await operation()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                outcome = (type(exc), type(exc.__cause__))
            except (OSError, trio.BusyResourceError) as exc:
                outcome = (type(exc), str(exc))
        self.notes.append((number, kind, outcome))

    @staticmethod
    async def receive_some(each: Socket, count: int) -> int:
        return note(each, await each.stream.receive_some(count))

    @staticmethod
    async def recv(each: Socket, count: int) -> int:
        return note(each, await each.stream.socket.recv(count))

    @staticmethod
    async def recv_into(each: Socket, count: int) -> int:
        buffer = bytearray(count)
        received = await each.stream.socket.recv_into(buffer)
        return note(each, bytes(buffer[:received]))

    @staticmethod
    async def iterate(each: Socket, count: int) -> int:
        async for data in each.stream:
            count += note(each, data)
        return count

    @staticmethod
    async def send_all(each: Socket, count: int) -> str:
        await each.stream.send_all(bytes(count))
        return "all"

    @staticmethod
    async def send(each: Socket, count: int) -> int:
        return await each.stream.socket.send(bytes(count))

    # ---- At once ---------------------------------------------------------------------------

    def cancel(self, number: int) -> None:
        if self.scopes:
            self.scopes[number % len(self.scopes)].cancel()

    def come(self, which: int, count: int) -> None:
        each = self.sockets[which]
        data = each.incoming.take(count)
        sent = 0
        with suppress(OSError):
            sent = each.outside.send(data)
        each.incoming.take_back(count - sent)

    def go(self, which: int, count: int) -> None:
        each = self.sockets[which]
        with suppress(OSError):
            each.outgoing += len(each.outside.recv(count))

    def end(self, which: int) -> None:
        with suppress(OSError):
            self.sockets[which].outside.shutdown(socket.SHUT_WR)

    def close(self, which: int) -> None:
        self.sockets[which].stream.socket.close()  # a task that closes has its turn by chance

    # ---- Steps -----------------------------------------------------------------------------

    async def step(self, step: Step) -> None:
        kind, *rest = step
        if kind == "at once":
            for name, *arguments in rest[0]:
                getattr(self, name)(*arguments)
        else:
            self.start(kind, *rest)
        await settle()
        waiting = statistics()
        ended = sorted(self.notes, key=str)
        self.notes.clear()
        self.trace.append((step, ended, waiting.tasks_waiting_read, waiting.tasks_waiting_write))


def note(each: Socket, data: bytes | bytearray) -> int:
    each.incoming.received(data)
    return len(data)


async def run_program(program_steps: list[Step]) -> list[object]:
    """Return what the steps came to, one after the other, and all of them at the end."""
    async with trio.open_nursery() as nursery:
        program = Program(nursery)
        try:
            for step in program_steps:
                await program.step(step)
            await program.step(("at once", [("cancel", n) for n in range(len(program.scopes))]))
            for which in range(SOCKETS):
                await program.step(("at once", [("go", which, 1_000_000)]))
                each = program.sockets[which]
                program.trace.append((each.incoming.missing, each.outgoing))
        finally:
            program.close_all()
    return [getattr(statistics(), "engine", "epoll"), *program.trace]


def statistics() -> Any:
    return trio.lowlevel.current_statistics().io_statistics


async def settle() -> None:
    """Let everything happen that can: the kernel answers within the turn, or by the next."""
    for _ in range(3):
        await wait_all_tasks_blocked()


# ---- Comparing ---------------------------------------------------------------------------------

# `nox -s fuzz` asks for more, and for others each time.
EXAMPLES: Final = int(os.environ.get("TRIO_URING_FUZZ_EXAMPLES", "0"))


def trace_of(engine: str, program: list[Step]) -> list[object]:
    """Return what *program* comes to on an engine, or without a ring."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIO_URING_ENGINE", engine.replace("epoll", ""))
        if engine == "epoll":
            used, *trace = trio.run(run_program, program)
        else:
            used, *trace = trio_uring.run(run_program, program, ring=RingConfig(require=True))
    assert used == engine
    return trace


@settings(
    max_examples=EXAMPLES or 200,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(program=st.lists(steps, max_size=25))
def both_engines_do_the_same(program: list[Step]) -> None:
    plain = trace_of("epoll", program)
    assert trace_of("python", program) == plain
    if not why_no_native:
        assert trace_of("native", program) == plain


async def test_both_engines_do_the_same() -> None:
    """In a thread: it has runs of its own. (And what is async is skipped where no ring is.)"""
    await trio.to_thread.run_sync(both_engines_do_the_same)
