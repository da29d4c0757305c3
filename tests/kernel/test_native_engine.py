"""The native engine, in cases where it could differ from the Python engine."""

from __future__ import annotations

import contextvars
import ctypes
import errno
import gc
import inspect
import linecache
import os
import random
import signal
import socket
import sys
import types
import weakref
from contextlib import AsyncExitStack, aclosing, suppress
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
from accounting import steps_beside
from children import output_of, run_python
from transfers import receive_exactly, warm_streams
from trio._util import ConflictDetector
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig, _trio_step
from trio_uring._engine import _in_flight
from trio_uring._engine._buffer_pool import BufferPools
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._ring import Ring, engine_api_address
from trio_uring._kernel import native, why_no_native
from trio_uring._streams import _native
from trio_uring._streams._native import use_native_engine
from trio_uring._trio_private import current_io_manager
from trio_uring.lowlevel import RingStatistics, operations, perform

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

pytestmark = [
    pytest.mark.skipif(bool(why_no_native), reason=why_no_native),
    pytest.mark.skipif(
        os.environ.get("TRIO_URING_ENGINE") == "python", reason="TRIO_URING_ENGINE is python"
    ),
]


SEND_TWINS = (_native._send_twin, _native._send_when_writable, _native._failed)


def statistics() -> RingStatistics:
    found: object = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(found, RingStatistics)
    return found


def manager() -> UringIOManager:
    found = current_io_manager()
    assert isinstance(found, UringIOManager)
    return found


def in_flight() -> int:
    """Return the number of native operations in flight."""
    loop = manager().native
    assert loop is not None
    return loop.in_flight


# --- Which engine ---------------------------------------------------------------------------


async def test_the_statistics_say_which() -> None:
    assert (statistics().engine, statistics().engine_reason) == ("native", "")


WHICH = """
import trio, trio_uring

async def main():
    found = trio.lowlevel.current_statistics().io_statistics
    print(found.engine, found.engine_reason, sep=": ")

trio_uring.run(main)
"""


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "native: "),
        ({"TRIO_URING_ENGINE": " Native "}, "native: "),
        ({"TRIO_URING_ENGINE": "python"}, "python: TRIO_URING_ENGINE is python"),
        ({"TRIO_URING_DISABLE": "sockets"}, "python: TRIO_URING_DISABLE names sockets"),
    ],
)
def test_the_environment_chooses(environment: dict[str, str], line: str) -> None:
    environment = {"TRIO_URING_ENGINE": "", **environment}
    assert output_of(run_python(WHICH, environment=environment)) == [line]


SERVED = """
import sys, trio, trio_uring
from functools import partial
from races import current_manager
from trio.testing import wait_all_tasks_blocked
from trio_uring.lowlevel import operations, perform

async def natively(call):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        waiting = current_manager().native.in_flight
        nursery.cancel_scope.cancel()
    return waiting

async def main():
    a, b = trio.socket.socketpair()
    stream = trio.SocketStream(a)
    await trio.SocketStream(b).send_all(b"xx")
    assert await stream.receive_some(1) == await a.recv(1) == b"x"  # opens the buffers
    print(await natively(partial(a.recv, 1)), await natively(partial(a.recv_into, bytearray(1))))
    print(await natively(stream.receive_some))
    print(await natively(partial(perform, operations.recv(a.fileno(), bytearray(1)))))
    from anyio._backends._trio import SocketStream
    print(*(hasattr(method, "__wrapped__") for method in (SocketStream.receive, SocketStream.send)))
    a.close()
    b.close()

async def without_ring():
    a, b = trio.socket.socketpair()
    with a, b:
        assert await a.send(b"xyz") == 3
        assert (await b.recv(1), await b.recv_into(bytearray(1))) == (b"x", 1)
        assert (await b.recvfrom(1))[0] == b"z"

if sys.argv[1] == "before":
    import trio_uring.anyio_backend
trio_uring.run(trio.sleep, 0)
if sys.argv[1] == "after":
    import trio_uring.anyio_backend
trio_uring.run(main)
trio.run(without_ring)
"""


@pytest.mark.parametrize("anyio", ["before", "after"])
def test_it_serves_what_a_program_uses(anyio: str) -> None:
    """Also AnyIO's streams, whether the AnyIO backend is imported before the first run or after."""
    engine = {"TRIO_URING_ENGINE": "native"}
    served = output_of(run_python(SERVED, anyio, environment=engine))
    assert served == ["1 1", "1", "1", "True True"]


def test_an_unknown_engine_is_an_error() -> None:
    result = run_python(WHICH, environment={"TRIO_URING_ENGINE": "fast"})
    assert "TRIO_URING_ENGINE is 'fast': it takes native or python" in result.stderr


@pytest.fixture
def trios_loop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Restore Trio's own loop for a test."""
    monkeypatch.setattr(trio._core._run, "unrolled_run", _trio_step._LOOP)
    return _trio_step._LOOP


def test_a_trio_that_was_not_read_keeps_its_loop(
    monkeypatch: pytest.MonkeyPatch, trios_loop: Callable[..., object]
) -> None:
    monkeypatch.setattr(_trio_step, "_source_of", lambda _: "def unrolled_run(): ...")
    assert "is not one that was read" in _trio_step.set_step(native.step)
    monkeypatch.undo()
    monkeypatch.setattr(trio._core._run, "unrolled_run", trios_loop)
    monkeypatch.setattr(linecache, "getlines", lambda *_: list[str]())
    assert _trio_step.set_step(native.step) == "Trio's loop has no source"
    assert trio._core._run.unrolled_run is trios_loop


def test_the_sources_are_those_of_inspect() -> None:
    for function in _trio_step._READ:
        assert _trio_step._source_of(function) == inspect.getsource(function)


@pytest.mark.usefixtures("trios_loop")
def test_a_loop_that_is_not_its_source_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trio_step, "_differ_by_step", lambda *_: False)
    assert _trio_step.set_step(native.step) == "Trio's loop is not what its source says"
    monkeypatch.setattr(trio._core._run, "unrolled_run", lambda: None)
    assert _trio_step.set_step(native.step) == "something else has replaced Trio's loop"


def test_setup_looks_at_what_it_is_given() -> None:
    assert use_native_engine() == ""
    names = {**_trio_step.trio_names(), **_native.own_names()}
    api = engine_api_address()
    for name in ("coro", "task_type", "did_shutdown"):
        with pytest.raises(TypeError, match=name):
            native.setup(api, {**names, name: object()})
    with pytest.raises(ValueError, match="there is no recvmsg"):
        native.set_twin("recvmsg", len, len, len)
    with pytest.raises(ValueError, match="there is no recvmsg"):
        native.set_stream("recvmsg", test_setup_looks_at_what_it_is_given, "", "", "", object)
    with pytest.raises(TypeError):
        native.set_stream("send_all", len, "socket", "guard", "held", object)


# --- Traps of tasks -------------------------------------------------------------------------


class Counts(trio.abc.Instrument):
    def __init__(self) -> None:
        self.calls = list[str]()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.calls.append("before")

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.calls.append("after")

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.calls.append("scheduled")


async def test_an_instrument_that_comes_in_the_middle() -> None:
    """Operations that the engine began continue in Trio's own code, and the reverse."""
    async with warm_streams() as (a, b):
        counts = Counts()
        async with trio.open_nursery() as nursery:

            async def echo() -> None:
                async for data in b:
                    await b.send_all(data)

            nursery.start_soon(echo)
            for number in range(30):
                await a.send_all(b"%d" % number)
                if number == 10:
                    trio.lowlevel.add_instrument(counts)
                    assert counts.calls == []
                    await trio.lowlevel.checkpoint()
                    # What Trio tells it of the step in which it was added.
                    assert counts.calls[:2] == ["scheduled", "after"]
                if number == 20:
                    trio.lowlevel.remove_instrument(counts)
                    calls = len(counts.calls)
                assert await a.receive_some() == b"%d" % number
            await a.send_eof()
        assert len(counts.calls) == calls
        # Trio begins with the "after" of one step, and ends with the "before" of another.
        assert counts.calls.count("before") == counts.calls.count("after")
        assert counts.calls.count("scheduled") > 20


async def test_a_thread_that_comes_back_in_the_middle_of_a_step() -> None:
    """Trio swaps the task's context for it."""
    variable = contextvars.ContextVar[int]("variable", default=0)

    def thread() -> int:
        for number in range(100):
            variable.set(number)
            trio.from_thread.run(trio.lowlevel.checkpoint)
        return variable.get()

    for _ in range(3):
        assert await trio.to_thread.run_sync(thread) == 99
        gc.collect()
    assert variable.get() == 0


def test_a_context_that_cannot_be_entered_is_the_tasks_failure() -> None:
    context = contextvars.copy_context()

    async def main() -> None:
        with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="cannot enter context")):
            async with trio.open_nursery() as nursery:
                event = trio.Event()
                nursery.start_soon(event.wait)
                await wait_all_tasks_blocked()
                [child] = nursery.child_tasks
                child.context = context
                event.set()

    context.run(trio_uring.run, main, ring=RingConfig(require=True))


@types.coroutine
def foreign() -> Generator[str, object, object]:
    return (yield "not for Trio")


async def test_what_is_yielded_by_another_library() -> None:
    with pytest.raises(TypeError, match="unrecognized yield message 'not for Trio'"):
        await foreign()
    await trio.lowlevel.checkpoint()


async def test_a_coroutine_that_is_detached() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.permanently_detach_coroutine_object, outcome.Value(None))


async def test_a_task_that_fails_shows_its_own_lines() -> None:
    async def failing() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failing)
    [error] = caught.value.exceptions
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_frame.f_code is failing.__code__


# --- Traps of operations --------------------------------------------------------------------


async def test_the_methods_stay_coroutine_functions() -> None:
    async with warm_streams() as (a, b):
        methods = (a.receive_some, a.send_all, a.socket.recv, a.socket.send)
        for method in methods:
            assert inspect.iscoroutinefunction(method)
        assert [method.__name__ for method in methods] == [
            "receive_some",
            "send_all",
            "recv",
            "send",
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.receive_some)
            await wait_all_tasks_blocked()
            assert in_flight() == 1
            await b.send_all(b"x")


async def test_an_operation_that_nobody_awaits() -> None:
    async with warm_streams() as (a, _):
        with pytest.warns(RuntimeWarning, match="'recv' was never awaited"):
            native.recv(a.socket, 1)


async def test_an_operation_is_used_like_a_coroutine() -> None:
    async with warm_streams() as (a, b):
        await b.send_all(b"x")
        operation = native.recv(a.socket, 1)
        assert await operation == b"x"
        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            await operation
        assert repr(operation) == "<recv, ended>"
        operation = native.recv(a.socket, 1)
        with pytest.raises(TypeError, match="can't send non-None value"):
            operation.send(1)
        operation.close()
        with pytest.raises(RuntimeError, match="cannot reuse"):
            operation.send(None)
        for arguments, expected in [
            ((ValueError("v"),), ValueError),
            ((KeyError, "k"), KeyError),
            ((KeyError, KeyError("k"), None), KeyError),
            ((3,), TypeError),
        ]:
            operation = native.recv(a.socket, 1)
            with pytest.raises(expected):
                operation.throw(*arguments)
            assert repr(operation) == "<recv, ended>"


@pytest.mark.parametrize("result", [(), (1, 2), ValueError("a result"), None, 5])
async def test_results_that_an_exception_would_take_apart(result: object) -> None:
    async def twin(_sock: object, _data: object) -> object:
        return result

    native.set_twin("send", twin, twin, _native._failed)
    try:
        assert await native.send(object(), b"") is result
    finally:
        native.set_twin("send", *SEND_TWINS)


@pytest.mark.parametrize("second", ["recv", "recv_into", "receive_some", "wait_readable"])
@pytest.mark.parametrize("first", ["recv", "receive_some", "wait_readable"])
async def test_two_tasks_that_read(first: str, second: str) -> None:
    async with warm_streams() as (a, _):
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "recv": lambda: a.socket.recv(1),
            "recv_into": lambda: a.socket.recv_into(bytearray(1)),
            "receive_some": a.receive_some,
            "wait_readable": lambda: trio.lowlevel.wait_readable(a.socket),
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls[first])
            await wait_all_tasks_blocked()
            assert in_flight() == (first != "wait_readable")
            with pytest.raises(trio.BusyResourceError):
                await calls[second]()
            nursery.cancel_scope.cancel()


async def test_reading_and_writing_at_once() -> None:
    async with warm_streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.receive_some)
        await wait_all_tasks_blocked()
        await a.send_all(b"x")
        await trio.lowlevel.wait_writable(a.socket)
        await b.send_all(b"y")


async def test_two_tasks_that_send() -> None:
    async with warm_streams() as (a, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send_all, bytes(1 << 22))
            await wait_all_tasks_blocked()
            for call in (a.send_all, lambda _: a.wait_send_all_might_not_block()):
                with pytest.raises(trio.BusyResourceError):
                    await call(b"x")
            nursery.cancel_scope.cancel()
        with trio.move_on_after(0):
            await a.send_all(b"x")  # no longer busy


@pytest.mark.usefixtures("no_deterministic_scheduling")
@pytest.mark.ring(turn_budget=0)
async def test_the_error_survives_the_release_of_the_guard() -> None:
    """Up to Python 3.12, a lookup in a type that has changed drops the error that is set."""
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def change_the_type() -> None:
            guard: Any = ConflictDetector
            while True:
                guard.marker = object()
                del guard.marker
                await trio.lowlevel.checkpoint()

        for _ in range(20):  # the tasks run in a random order
            async with warm_streams() as (a, b):
                await b.aclose()
                with pytest.raises(trio.BrokenResourceError):
                    await a.send_all(b"x")
        nursery.cancel_scope.cancel()


async def test_data_without_a_length() -> None:
    """It is refused as by Trio, which could not take a part of it."""
    async with warm_streams() as (a, b):
        with pytest.raises(TypeError, match="0-dim memory"):
            await a.send_all(memoryview(ctypes.c_int(1)))
        await a.send_all(b"x")
        assert await b.receive_some() == b"x"


async def test_a_send_between_two_parts_of_another() -> None:
    """It is refused although there is room for it, because the first one has not gone on yet."""
    async with warm_streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.send_all, bytes(1 << 22))
        await wait_all_tasks_blocked()
        while len(b.socket._sock.recv(1 << 20)) == 1 << 20:  # type: ignore[attr-defined]
            pass
        with pytest.raises(trio.BusyResourceError):
            await a.send_all(b"x")
        nursery.cancel_scope.cancel()


async def test_no_send_waits_in_the_kernel() -> None:
    """There it could not be cancelled."""
    async with warm_streams() as (a, _b), warm_streams() as (c, _d):
        for stream in (a, c):
            with suppress(BlockingIOError):
                while True:
                    stream.socket._sock.send(bytes(1 << 16))  # type: ignore[attr-defined]
        async with trio.open_nursery() as nursery:
            # Two in one turn, since one alone does without the ring.
            nursery.start_soon(a.send_all, b"x")
            nursery.start_soon(c.send_all, b"x")
            await wait_all_tasks_blocked()
            assert in_flight() == 0
            nursery.cancel_scope.cancel()


BROKEN = """
    import signal, sys, trio, trio_uring
    from transfers import warm_streams

    async def send(stream):
        try:
            await stream.send_all(b"x")
        except trio.BrokenResourceError:
            print("broken")

    async def main():
        async with warm_streams() as (a, b), warm_streams() as (c, d):
            b.socket.close()
            d.socket.close()
            async with trio.open_nursery() as nursery:
                for stream in (a, c)[:int(sys.argv[1])]:
                    nursery.start_soon(send, stream)

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    trio_uring.run(main)
"""


@pytest.mark.parametrize("at_once", [1, 2])  # one alone does without the ring
def test_a_broken_connection_raises_no_signal(at_once: int) -> None:
    assert output_of(run_python(BROKEN, at_once)) == ["broken"] * at_once


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_sending_more_than_fits(kind: Callable[[bytes], bytes]) -> None:
    async with warm_streams() as (a, b):
        data = bytes(range(256)) * (1 << 14)
        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send_all, kind(data))
            while len(received) < len(data):
                received += await b.receive_some()
        assert received == data


@pytest.mark.parametrize("of", ["stream", "socket"])
async def test_closed_while_it_waits(of: str) -> None:
    async with warm_streams() as (a, b):
        call = a.receive_some if of == "stream" else lambda: a.socket.recv(1)

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError, match="another task closed this fd"):
                await call()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            assert in_flight() == 1
            a.socket.close()
            assert await b.receive_some() == b""
        with pytest.raises(trio.ClosedResourceError):
            await a.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await a.send_all(b"x")


async def test_a_task_that_takes_over_from_a_cancelled_one() -> None:
    async with warm_streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.receive_some)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await b.socket.send(b"x")
            assert await a.receive_some() == b"x"


async def test_taking_over_in_the_same_turn() -> None:
    async with warm_streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.receive_some)
        await wait_all_tasks_blocked()
        assert in_flight() == 1
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            os.write(b.socket.fileno(), b"x")
            assert await a.receive_some() == b"x"


async def test_cancelled_before_it_was_closed() -> None:
    async with warm_streams() as (a, _), trio.open_nursery() as nursery:
        nursery.start_soon(a.receive_some)
        await wait_all_tasks_blocked()
        assert in_flight() == 1
        nursery.cancel_scope.cancel()
        a.socket.close()
    assert nursery.cancel_scope.cancelled_caught


async def test_a_cancelled_task_performs_nothing() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await perform(operations.nop())
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "receive",
    [
        lambda stream: stream.receive_some(),
        lambda stream: stream.socket.recv(1),
        lambda stream: stream.socket.recv_into(bytearray(1)),
    ],
    ids=["receive_some", "recv", "recv_into"],
)
async def test_a_cancelled_task_receives_nothing(
    receive: Callable[[trio.SocketStream], Awaitable[object]],
) -> None:
    async with warm_streams() as (a, b):
        await b.send_all(b"x")
        with trio.CancelScope() as scope:
            scope.cancel()
            await receive(a)
        assert scope.cancelled_caught
        assert await a.receive_some() == b"x"


async def test_a_task_that_is_woken_while_its_operation_is_in_flight() -> None:
    """It gets an error, and nothing that the kernel has not written yet."""
    async with warm_streams() as (a, b):

        @types.coroutine
        def driving() -> Generator[object, object, None]:
            receive = a.receive_some()
            receive.send(None)
            with pytest.raises(RuntimeError, match="while its operation is in flight"):
                receive.send(None)
            assert in_flight() == 1
            return
            yield

        await driving()
        await b.send_all(b"lost")
        while in_flight():
            await trio.lowlevel.checkpoint()
        await b.send_all(b"kept")
        assert await a.receive_some() == b"kept"


async def test_an_operation_with_many_completions() -> None:
    async with warm_streams() as (a, b):
        pool, received = manager().buffers, list[bytes]()
        assert pool is not None

        def take(res: int, flags: int) -> None:
            assert pool is not None
            received.append(pool.take(res, flags))

        async def receive() -> None:
            received.append(await perform(operations.recv_multishot(a.socket.fileno(), pool, take)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for data in (b"1", b"2", b"3"):
                await wait_all_tasks_blocked()
                await b.send_all(data)
            await wait_all_tasks_blocked()
            b.socket.close()
        assert received == [b"1", b"2", b"3", b""]


async def test_a_coroutine_closed_in_flight() -> None:
    """Its operation stays in flight until it ends, and its result is discarded."""
    async with warm_streams() as (a, b):
        seen = list[object]()

        @types.coroutine
        def driving() -> Generator[object, object, None]:
            receive = a.receive_some()
            seen.append(receive.send(None))
            receive.close()
            return
            yield

        before = statistics().completed["RECV"]
        await driving()
        assert in_flight() == 1
        await b.send_all(b"lost")
        while in_flight():
            await trio.lowlevel.checkpoint()
        assert statistics().completed["RECV"] == before + 1
        [operation] = seen
        assert repr(operation) == "<receive_some, ended>"
        await b.send_all(b"kept")
        assert await a.receive_some() == b"kept"


async def test_memory_stays_pinned_when_its_coroutine_is_closed_in_flight() -> None:
    async with warm_streams() as (a, b):
        buffer = bytearray(4)

        @types.coroutine
        def driving() -> Generator[object, object, None]:
            receive = a.socket.recv_into(buffer)
            receive.send(None)
            receive.close()
            return
            yield

        await driving()
        assert in_flight() == 1
        with pytest.raises(BufferError):
            buffer.append(0)
        await b.send_all(b"lost")
        while in_flight():
            await trio.lowlevel.checkpoint()
        buffer.append(0)


def test_no_buffers_are_freed_while_an_operation_is_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are leaked if it does not end with the run."""
    freed_with = list[int]()
    close_all = BufferPools.close_all
    read_end, write_end = os.pipe()

    def closing(pools: BufferPools) -> None:
        assert loop is not None
        freed_with.append(loop.in_flight)
        close_all(pools)

    @types.coroutine
    def driving(read: Any) -> Generator[object, object, None]:
        read.send(None)
        read.close()
        return
        yield

    async def main() -> None:
        nonlocal loop
        loop = manager().native
        await driving(perform(operations.read(read_end, bytearray(1), -1, cancellable=False)))
        assert in_flight() == 1
        monkeypatch.setattr(BufferPools, "close_all", closing)
        monkeypatch.setattr(_in_flight, "_DRAIN_SECONDS", 0.01)

    loop = None
    trio_uring.run(main)
    assert freed_with == []
    for fd in (read_end, write_end):
        os.close(fd)


async def test_an_operation_that_is_done_cannot_be_aborted() -> None:
    async with warm_streams() as (a, b):
        task = trio.lowlevel.current_task()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.receive_some)
            await wait_all_tasks_blocked()
            [receiver] = nursery.child_tasks
            operation = receiver._abort_func
            assert operation is not None
            await b.send_all(b"x")
        assert task._abort_func is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.receive_some)
            await wait_all_tasks_blocked()
            operation(lambda: None)
            operation.fd_closing()
            operation.finish_cancelled()
            await trio.lowlevel.checkpoint()
            assert in_flight() == 1
            await b.send_all(b"x")


async def test_the_next_operation_has_another_user_data() -> None:
    """Otherwise a cancellation that is submitted late would end it."""
    async with warm_streams() as (a, b):
        seen = set[int]()
        for number in range(1, 11):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.receive_some)
                await wait_all_tasks_blocked()
                [receiver] = nursery.child_tasks
                operation = receiver._abort_func
                assert operation is not None
                seen.add(operation.user_data)
                await b.send_all(b"x")
            assert len(seen) == number
        assert len({user_data & 0xFFFFFFFF for user_data in seen}) == 1  # they share a slot


async def test_a_patched_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def patched(self: trio.SocketStream, max_bytes: int | None = None) -> bytes:
        return b"patched"

    async with warm_streams() as (a, _):
        monkeypatch.setattr(trio.SocketStream, "receive_some", patched)
        assert await anext(aiter(a)) == b"patched"


async def test_the_frames_of_a_task_that_waits() -> None:
    datagrams, end = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with datagrams, end:
        async with warm_streams() as (a, _), trio.open_nursery() as nursery:
            nursery.start_soon(a.receive_some)
            nursery.start_soon(datagrams.recv, 1)  # which its twin does
            await wait_all_tasks_blocked()
            frames = {
                tuple(frame.f_code.co_name for frame, _ in task.iter_await_frames())
                for task in nursery.child_tasks
            }
            nursery.cancel_scope.cancel()
    assert ("receive_some",) in frames
    [other] = frames - {("receive_some",)}
    assert other[:2] == ("recv", "_recv_twin")
    assert len(other) > 3


SIZES = [(0, ValueError), (-1, ValueError), ("1", TypeError), (2**63, OverflowError)]


async def test_arguments_that_are_not_plain() -> None:
    async with warm_streams() as (a, b):
        await b.send_all(b"abcdef")
        for size, error in [
            (0, ValueError),
            (-1, ValueError),
            ("1", TypeError),
            (2**63, OverflowError),
        ]:
            with pytest.raises(error):
                await a.receive_some(size)  # type: ignore[arg-type]
        assert await a.receive_some(2) == b"ab"
        assert await a.receive_some(max_bytes=1) == b"c"
        assert await a.socket.recv(1, socket.MSG_PEEK) == b"d"
        assert await a.socket.recv(True) == b"d"
        for data in ("text", 3, None):
            with pytest.raises(TypeError):
                await a.send_all(data)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                await a.socket.send(data)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            native.recv(a.socket)
        view = memoryview(b"0123456789")[::2]
        with pytest.raises(BufferError):
            await a.socket.send(view)
        await a.send_all(b"")
        assert await b.socket.send(b"") == 0
        with pytest.raises(AttributeError):
            await native.receive_some(object(), 1)
        with pytest.raises(AttributeError):
            await native.send_all(object(), b"")


async def test_memory_is_pinned_while_it_is_sent() -> None:
    async with warm_streams() as (a, b):
        data = bytearray(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send_all, data)
            await trio.lowlevel.cancel_shielded_checkpoint()
            await wait_all_tasks_blocked()
        data.append(1)
        assert await b.receive_some() == bytes(10)


@pytest.mark.ring(receive_buffers=1)
async def test_one_buffer_for_many() -> None:

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def client(stream: trio.SocketStream) -> None:
        for number in range(50):
            await stream.send_all(b"%d" % number)
            assert await stream.receive_some() == b"%d" % number
        await stream.send_eof()

    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for _ in range(20):
            a, b = await stack.enter_async_context(warm_streams())
            nursery.start_soon(echo, a)
            nursery.start_soon(client, b)
    assert in_flight() == 0


async def receive_all(
    stream: trio.SocketStream, total: int, sizes: random.Random, bytes_: bytearray
) -> None:
    """Receive *total* bytes in random sizes. Every third wait is cancelled at random."""
    while len(bytes_) < total:
        with trio.CancelScope() as scope:
            if sizes.random() < 0.3:
                scope.deadline = trio.current_time()  # while it is in flight
            bytes_ += await stream.receive_some(sizes.choice((1, 7, 100, 5000, 65536)))


@pytest.mark.parametrize(
    "_buffers",
    [
        pytest.param(count, marks=pytest.mark.ring(receive_buffers=count), id=f"{count} buffers")
        for count in (1, 2, 64)
    ],
)
async def test_many_streams_that_share_buffers_keep_their_bytes(_buffers: int) -> None:
    """Messages of all sizes begin anywhere in a buffer, and some fill it to its end."""
    count, total = 20, 300_000
    sent = [random.Random(number).randbytes(total) for number in range(count)]
    received = [bytearray() for _ in range(count)]

    async def send(stream: trio.SocketStream, data: bytes, sizes: random.Random) -> None:
        start = 0
        while start < total:
            end = start + sizes.choice((1, 64, 4096, 20_000, 100_000))
            await stream.send_all(data[start:end])
            start = end

    async with warm_streams(), AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for number in range(count):
            pair = [trio.SocketStream(sock) for sock in trio.socket.socketpair()]
            writer, reader = [await stack.enter_async_context(stream) for stream in pair]
            nursery.start_soon(send, writer, sent[number], random.Random(number))
            nursery.start_soon(receive_all, reader, total, random.Random(-number), received[number])
    assert [bytes(data) for data in received] == sent


async def test_an_end_and_an_error_take_no_buffer() -> None:
    """A thousand of each, with a single buffer, which the first would take for good."""
    async with warm_streams():
        for number in range(1000):
            left, right = trio.socket.socketpair()
            reader = trio.SocketStream(left)
            if number % 2:
                await left.send(b"unread")  # so the close is a reset
            right.close()
            with suppress(trio.BrokenResourceError):
                assert await reader.receive_some() == b""
            await reader.aclose()
        async with warm_streams() as (a, b):
            await a.send_all(b"still")
            assert await b.receive_some() == b"still"
    assert statistics().completed["RECV"] >= 1000


async def test_a_kernel_without_incremental_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    open_buffer_ring = Ring.open_buffer_ring

    def refusing(ring: Ring, *args: Any, incremental: bool) -> object:
        if incremental:
            raise OSError(errno.EINVAL, "Invalid argument")  # as before Linux 6.12
        return open_buffer_ring(ring, *args, incremental=False)

    monkeypatch.setattr(Ring, "open_buffer_ring", refusing)
    async with warm_streams() as (a, b):
        before = statistics().completed["RECV"]
        for size in (1, 5000, 65536):
            await a.send_all(bytes(size))
            assert await receive_exactly(b, size) == bytes(size)
        assert statistics().completed["RECV"] > before
    assert any("incremental" in entry for entry in statistics().refused)


async def test_completions_are_counted() -> None:
    async with warm_streams() as (a, b):
        before = statistics().completed
        for _ in range(5):
            await a.send_all(b"x")
            await b.receive_some()
        after = statistics().completed
        assert (after["SEND"] - before["SEND"], after["RECV"] - before["RECV"]) == (5, 5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.receive_some)
            await wait_all_tasks_blocked()
            assert (statistics().in_flight, in_flight()) == (1, 1)
            waiting = statistics().tasks_waiting_read
            nursery.cancel_scope.cancel()
        assert statistics().tasks_waiting_read == waiting - 1
        assert statistics().in_flight == 0


# --- Traps of runs --------------------------------------------------------------------------


def test_a_run_that_is_over_is_let_go() -> None:
    runs = list[weakref.ref[object]]()

    async def main() -> None:
        async with warm_streams() as (a, _):
            loop = manager().native
            runs.append(weakref.ref(manager()))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.receive_some)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert loop is not None

    for _ in range(30):
        trio_uring.run(main, ring=RingConfig(require=True))
    gc.collect()
    assert [run() for run in runs] == [None] * 30


def test_a_run_without_a_ring_after_one_with() -> None:
    async def main() -> None:
        async with warm_streams() as (a, _):
            with trio.move_on_after(0):
                await a.receive_some()

    trio_uring.run(main, ring=RingConfig(require=True))
    trio.run(main)


async def test_threads_with_runs_of_their_own() -> None:
    async def main() -> None:
        async with warm_streams() as (a, b):
            for _ in range(200):
                await a.send_all(b"x")
                assert await b.receive_some() == b"x"

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(trio.to_thread.run_sync, trio_uring.run, main)
        await main()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="warns of the threads of the test run")
async def test_a_forked_child_uses_no_ring() -> None:
    async with warm_streams() as (a, b):
        if (child := os.fork()) == 0:
            try:
                with pytest.raises(trio_uring.ForkedRingError):
                    await b.receive_some()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        await a.send_all(b"x")
        assert await b.receive_some() == b"x"


async def test_an_asynchronous_generator_between() -> None:
    async def generate(stream: trio.SocketStream) -> AsyncGenerator[bytes, None]:
        while True:
            yield await stream.receive_some()

    async with warm_streams() as (a, b), aclosing(generate(a)) as received:
        for number in range(3):
            await b.send_all(b"%d" % number)
            assert await anext(received) == b"%d" % number


# --- The turn budget ------------------------------------------------------------------------


class Spent:
    """A native loop whose turn budget is spent."""

    def within_budget(self) -> bool:
        return False


@pytest.mark.usefixtures("no_deterministic_scheduling")
@pytest.mark.ring(turn_budget=1.0)
async def test_the_engine_and_python_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, loop = manager().turn_budget, manager().native
    assert loop is not None
    assert budget.native is loop
    assert loop.within_budget()
    assert budget.skip_schedule_point()
    monkeypatch.setattr(budget, "native", Spent())
    assert not budget.skip_schedule_point()


@pytest.mark.ring(turn_budget=1e-9)
@pytest.mark.usefixtures("no_deterministic_scheduling")
async def test_a_budget_that_is_spent_lets_others_run() -> None:
    with trio.socket.socket(type=socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        turns = await steps_beside(lambda: sock.sendto(b"x", sock.getsockname()), 40)
    assert turns >= 10


# --- Sending without the ring ---------------------------------------------------------------


async def send_each(streams: list[trio.SocketStream]) -> int:
    """Send on all of *streams* in one turn; return how many did without the ring."""
    loop = manager().native
    assert loop is not None
    before = loop.sent_now
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.send_all, b"x")
    return loop.sent_now - before


async def test_only_a_task_alone_sends_without_the_ring() -> None:
    async with warm_streams() as (a, _b), warm_streams() as (c, _d):
        assert await send_each([a]) == 1
        assert await send_each([a, c]) == 0


async def test_no_send_overtakes_another() -> None:
    """The second one is alone, and could do without the ring on which the first one is."""
    async with warm_streams() as (a, b):
        order = bytearray()

        async def send(data: bytes) -> None:
            order.extend(data)
            await a.socket.send(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, b"1")
            nursery.start_soon(send, b"2")
        assert await receive_exactly(b, 2) == order


# --- Tasks and their turns ------------------------------------------------------------------


async def test_an_operation_where_no_task_runs() -> None:
    async with warm_streams() as (a, _):
        context: Any = trio._core._run.GLOBAL_RUN_CONTEXT
        task = context.task
        receive = a.receive_some()
        del context.task
        try:
            with pytest.raises(RuntimeError, match="async context"):
                receive.send(None)
        finally:
            context.task = task


def test_ctrl_c_comes_before_a_send() -> None:
    @trio.lowlevel.enable_ki_protection
    async def main() -> None:
        async with warm_streams() as (a, b):
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                await a.send_all(b"x")
            await a.send_all(b"y")
            assert await b.receive_some() == b"y"

    trio_uring.run(main)


WOKEN_TWICE = """
    import trio, trio_uring
    from transfers import warm_streams
    from trio.testing import wait_all_tasks_blocked

    async def receive(stream):
        await stream.receive_some()
        print("received")

    async def main():
        async with warm_streams() as (a, b), trio.open_nursery() as nursery:
            nursery.start_soon(receive, a)
            await wait_all_tasks_blocked()
            b.socket._sock.send(b"x")
            [receiver] = nursery.child_tasks
            trio.lowlevel.reschedule(receiver)

    trio_uring.run(main)
"""


def test_a_task_that_is_woken_twice_ends_the_run() -> None:
    result = run_python(WOKEN_TWICE)
    assert "TrioInternalError" in result.stderr
    assert result.stdout == ""
