"""Any operation on the native engine, where it could differ from the Python engine."""

from __future__ import annotations

import errno
import inspect
import os
import socket as stdlib_socket
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from races import current_manager, fail_once
from transfers import completed
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_uring._engine._in_flight import InFlightTable
from trio_uring._kernel import native, why_no_native
from trio_uring._kernel.uapi import Opcode
from trio_uring._streams import _native
from trio_uring._streams._native import use_native_engine
from trio_uring._trio_private import TrioSocket
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(bool(why_no_native), reason=why_no_native),
    pytest.mark.skipif(
        os.environ.get("TRIO_URING_ENGINE") == "python", reason="TRIO_URING_ENGINE is python"
    ),
]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def in_flight() -> int:
    """Return the number of native operations in flight."""
    loop = current_manager().native
    assert loop is not None
    return loop.in_flight


class Buffer(bytearray):
    """Bytes that support weak references."""


async def test_a_buffer_is_pinned_until_the_last_completion(pipe: tuple[int, int]) -> None:
    buffer = Buffer(4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.read(pipe[0], buffer, -1))
        await wait_all_tasks_blocked()
        assert in_flight() == 1
        with pytest.raises(BufferError):
            buffer.append(0)
        os.write(pipe[1], b"1234")
    assert buffer == b"1234"
    buffer.append(0)
    gone = weakref.ref(buffer)
    del buffer
    assert gone() is None


async def test_an_operation_with_a_buffer_is_performed_once(pipe: tuple[int, int]) -> None:
    operation = operations.read(pipe[0], bytearray(4), -1)
    os.write(pipe[1], b"12")
    assert await perform(operation) == 2
    with pytest.raises(RuntimeError, match="performed already"):
        await perform(operation)


async def test_an_operation_without_a_buffer_is_performed_often() -> None:
    operation = operations.nop()
    before = completed("NOP")
    for _ in range(3):
        with assert_checkpoints():
            await perform(operation)
    assert completed("NOP") - before == 3


async def test_cancelling(pipe: tuple[int, int]) -> None:
    buffer = bytearray(4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.read(pipe[0], buffer, -1))
        await wait_all_tasks_blocked()
        assert in_flight() == 1
        nursery.cancel_scope.cancel()
    buffer.append(0)
    assert in_flight() == 0


async def test_cancelling_loses_no_byte(pipe: tuple[int, int]) -> None:
    """The result comes first, or the bytes are still in the pipe."""
    buffer, counts = bytearray(4), []

    async def read() -> None:
        counts.append(await perform(operations.read(pipe[0], buffer, -1)))

    for late in (False, True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            os.write(pipe[1], b"12")
            if late:
                await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        if not counts:
            await read()
        assert counts.pop() == 2
        assert buffer == b"12\0\0"


async def test_a_cancelled_task_performs_nothing(pipe: tuple[int, int]) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await perform(operations.write(pipe[1], b"1234", -1))
    assert scope.cancelled_caught
    os.set_blocking(pipe[0], False)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)


async def test_closing_ends_the_wait(pipe: tuple[int, int]) -> None:
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await perform(operations.read(pipe[0], bytearray(4), -1))

        await wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(pipe[0])


async def test_one_task_at_a_time_on_an_fd(pipe: tuple[int, int]) -> None:
    async with trio.open_nursery() as nursery:
        exclusive = operations.read(pipe[0], bytearray(4), -1, cancellable=True)
        nursery.start_soon(perform, exclusive)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await perform(operations.read(pipe[0], bytearray(4), -1, cancellable=True))
        with pytest.raises(trio.BusyResourceError):
            await trio.lowlevel.wait_readable(pipe[0])
        nursery.cancel_scope.cancel()


async def test_a_failed_operation_releases_its_buffer() -> None:
    buffer = bytearray(4)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        await perform(operations.read(-1, buffer, 0, cancellable=False))
    assert caught.value.errno == errno.EBADF
    buffer.append(0)


@pytest.mark.ring(max_file_operations=1)
async def test_the_limit_of_file_operations(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "file")
    with open(path, "wb") as file:
        limiter = current_manager().file_limiter
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(perform, operations.write(file.fileno(), b"x", number))
        assert os.fstat(file.fileno()).st_size == 4
        assert limiter.available_tokens == 1


async def test_a_file_operation_waits_for_a_token(tmp_path: os.PathLike[str]) -> None:
    manager, path = current_manager(), os.path.join(tmp_path, "file")
    limiter = manager.file_limiter
    with open(path, "wb") as file:
        taken = 0
        while limiter.try_acquire():
            taken += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operations.write(file.fileno(), b"x", 0))
            await wait_all_tasks_blocked()
            assert manager.statistics().waiting_for_limit == 1
            assert os.fstat(file.fileno()).st_size == 0
            limiter.release_many(taken)
        assert os.fstat(file.fileno()).st_size == 1


async def test_a_multishot_operation_passes_on_each_completion() -> None:
    accepted: list[int] = []
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        async with trio.open_nursery() as nursery:
            accept = operations.accept_multishot(
                listener.fileno(), lambda fd, _flags: accepted.append(fd)
            )
            nursery.start_soon(perform, accept)
            for number in (1, 2):
                await wait_all_tasks_blocked()
                with stdlib_socket.create_connection(listener.getsockname()):
                    await wait_all_tasks_blocked()
                assert len(accepted) == number
            nursery.cancel_scope.cancel()
    for fd in accepted:
        os.close(fd)


async def test_a_shielded_operation_that_was_interrupted_is_repeated(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    buffer = bytearray(4)
    read = operations.read(pipe[0], buffer, -1)
    fail_once(monkeypatch, Opcode.READ, errno.EINTR)
    os.write(pipe[1], b"12")
    assert await current_manager().perform_shielded(read) == 2
    assert buffer == b"12\0\0"
    buffer.append(0)


async def test_a_shielded_operation_ignores_cancellation(pipe: tuple[int, int]) -> None:
    manager, buffer, counts = current_manager(), bytearray(4), []

    async def read() -> None:
        counts.append(await manager.perform_shielded(operations.read(pipe[0], buffer, -1)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert in_flight() == 1
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
        assert in_flight() == 1
        os.write(pipe[1], b"12")
    assert counts == [2]


async def test_zero_copy_ends_with_the_second_completion() -> None:
    left, right = stdlib_socket.socketpair()
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        client = stdlib_socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with left, right, client, server:
        buffer = bytearray(b"1234")
        assert await perform(operations.send_zc(client.fileno(), buffer)) == 4
        assert in_flight() == 0
        buffer.append(0)
        assert server.recv(10) == b"1234"


TWINS: Final = (_native._perform, _native._perform_again, _native._failed)


async def test_ordinary_operations_do_not_reach_the_twin(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    async def twin(*_args: object) -> object:
        raise AssertionError("delegated")

    native.set_twin("perform", twin, twin, _native._failed)
    try:
        await perform(operations.nop())
        assert await perform(operations.write(pipe[1], b"12", -1)) == 2
        assert await perform(operations.read(pipe[0], bytearray(4), -1)) == 2
    finally:
        native.set_twin("perform", *TWINS)


def test_the_methods_are_coroutine_functions() -> None:
    assert not use_native_engine()
    assert inspect.iscoroutinefunction(InFlightTable.perform)
    assert inspect.iscoroutinefunction(InFlightTable.perform_shielded)


async def test_receiving_into_memory() -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        buffer = bytearray(8)
        await left.send(b"12")
        assert await right.recv_into(buffer) == 2  # a stream's first receive is not native
        async with trio.open_nursery() as nursery:
            counts = []

            @nursery.start_soon
            async def receive() -> None:
                counts.append(await right.recv_into(memoryview(buffer)[2:], 3))

            await wait_all_tasks_blocked()
            assert in_flight() == 1
            with pytest.raises(BufferError):
                buffer.append(0)
            await left.send(b"34567")
        assert counts == [3]
        assert buffer == b"12345\0\0\0"
        assert await right.recv_into(buffer) == 2
        assert buffer == b"67345\0\0\0"
        with pytest.raises(ValueError, match=r"nbytes|buffer"):
            await right.recv_into(buffer, 9)
        with pytest.raises((TypeError, BufferError)):
            await right.recv_into(b"1234")  # type: ignore[arg-type]
        left.shutdown(trio.socket.SHUT_WR)
        assert await right.recv_into(buffer) == 0
        buffer.append(0)


async def test_a_connection_that_only_receives_into_memory() -> None:
    """It is known to be a stream, and nobody else has opened the buffers of the run."""
    with trio.socket.socket() as listener, trio.socket.socket() as client:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        await client.connect(listener.getsockname())
        server, _ = await listener.accept()
        with server:
            buffer = bytearray(1)
            await client.send(b"1")
            assert await server.recv_into(buffer) == 1
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.recv_into, buffer)
                await wait_all_tasks_blocked()
                assert in_flight() == 1
                await client.send(b"2")
            assert buffer == b"2"


async def test_cancelling_a_receive_into_memory_loses_nothing() -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        buffer = bytearray(1)
        await left.send(b"0")
        assert await right.recv_into(buffer) == 1
        for number in range(200):
            byte, counts = bytes([number]), []

            async def receive(counts: list[int] = counts) -> None:
                counts.append(await right.recv_into(buffer))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                if number % 2:
                    left._sock.send(byte)  # type: ignore[attr-defined]
                nursery.cancel_scope.cancel()
            buffer += b""  # not pinned any more
            if not number % 2:
                left._sock.send(byte)  # type: ignore[attr-defined]
            if not counts:
                await receive()
            assert counts == [1]
            assert buffer == byte


class Unserved:
    """A native receive that found no buffer."""

    res = -errno.ENOBUFS
    flags = 0


@pytest.mark.parametrize("how", ["recv", "recv_into", "receive_some"])
async def test_a_receive_that_found_no_buffer(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to its end without one, and the pool gets one more."""
    manager, failed, op, buffer = current_manager(), list[int](), Unserved(), bytearray(4)
    monkeypatch.setattr(manager.pools, "failed", lambda res, _flags: failed.append(res))
    left, right = trio.socket.socketpair()
    again: dict[str, Any] = {
        "recv": partial(_native._recv_again, manager, op, right, 4),
        "recv_into": partial(_native._recv_into_again, manager, op, right, (buffer, 0)),
        "receive_some": partial(
            _native._receive_some_again, manager, op, trio.SocketStream(right), None
        ),
    }
    with left, right:
        await left.send(b"data")
        received = await again[how]()
    assert (received, bytes(buffer)) in [(b"data", bytes(4)), (4, b"data")]
    assert failed == [-errno.ENOBUFS]


@pytest.mark.parametrize(("most", "received"), [(3, 3), (None, 65536)])
async def test_a_stream_that_found_no_buffer_receives_what_was_asked_for(
    most: int | None, received: int
) -> None:
    left, right = trio.socket.socketpair()
    op: Any = Unserved()
    with left, right:
        await left.send(bytes(100_000))
        stream = trio.SocketStream(right)
        data = await _native._receive_some_again(current_manager(), op, stream, most)
    assert len(data) == received


async def test_a_send_goes_on_with_a_socket_of_another_class() -> None:
    """Which a program may have put in the place of the stream's socket."""
    ours, theirs = stdlib_socket.socketpair()
    with theirs, TrioSocket(ours) as sock:
        await _native.send_rest(sock, b"hello", 1)
        assert theirs.recv(10) == b"ello"
