"""What a newcomer gets wrong: each error is one sentence that names the argument and the remedy.

And it comes before anything was awaited or done. What Python itself says of a wrong number or name
of arguments is not here.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import pathlib
import socket
from contextlib import asynccontextmanager, closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio

import trio_uring
from trio_uring import anyio_backend, lowlevel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

CHARS_MAX = 200
ONE_BYTE = bytearray(1)

# The call; what it raises; and words of the message: the argument, and the remedy.
MISTAKES: list[tuple[str, type[Exception], str, str]] = [
    # Low-level operations
    ("perform('x')", TypeError, "operation must be an Operation", "a function of operations"),
    ("perform(None)", TypeError, "operation must be an Operation", "a function of operations"),
    ("perform(op.nop)", TypeError, "operation", "call the function, as in nop(...)"),
    ("perform(linked([op.nop()]))", TypeError, "operation", "use perform_many"),
    ("perform([op.nop()])", TypeError, "operation", "use perform_many"),
    ("perform(op.read_many(fd, it.buffer, [0], 1))", TypeError, "operation", "use perform_many"),
    ("op.read(it.file, it.buffer, 0)", TypeError, "fd must be", "as fileno() returns"),
    ("op.read('path', it.buffer, 0)", TypeError, "fd must be", "as fileno() returns"),
    ("op.read(fd, b'1234', 0)", BufferError, "buffer must be", "such as a bytearray"),
    ("op.read(fd, 1234, 0)", TypeError, "buffer", "pass bytearray(1234)"),
    ("op.read(fd, it.buffer, '0')", TypeError, "offset must be", "an int"),
    ("op.read(fd, it.buffer, 1.5)", TypeError, "offset must be", "an int"),
    ("op.readv(fd, it.buffer, 0)", TypeError, "buffers must be", "a list of buffers"),
    ("op.readv(fd, 10, 0)", TypeError, "buffers must be", "a list of buffers"),
    ("op.read_many(fd, it.buffer, 0, 1)", TypeError, "offsets must be", "a list of ints"),
    ("op.write(fd, 'text', 0)", TypeError, "data must be bytes", "encode the text"),
    ("op.writev(fd, b'data', 0)", TypeError, "buffers must be", "a list of buffers"),
    ("op.writev(fd, ['text'], 0)", TypeError, "each of buffers", "encode the text"),
    ("op.fsync(it.file)", TypeError, "fd must be", "as fileno() returns"),
    ("op.close(it.file)", TypeError, "fd must be", "as fileno() returns"),
    ("op.fallocate(fd, '0', 1)", TypeError, "offset must be", "an int"),
    ("op.fallocate(fd, 0, '1')", TypeError, "size must be", "an int"),
    ("op.ftruncate(fd, '1')", TypeError, "size must be", "an int"),
    ("op.fadvise(fd, 0, 'all', 3)", TypeError, "size must be", "an int"),
    ("op.splice(it.file, fd, 10)", TypeError, "fd_in must be", "as fileno() returns"),
    ("op.tee(fd, it.file, 10)", TypeError, "fd_out must be", "as fileno() returns"),
    ("op.recv(it.sock, it.buffer)", TypeError, "fd must be", "as fileno() returns"),
    ("op.recv(it.sock.fileno(), 1024)", TypeError, "buffer", "pass bytearray(1024)"),
    ("op.send(it.sock, b'data')", TypeError, "fd must be", "as fileno() returns"),
    ("op.send(it.sock.fileno(), 'text')", TypeError, "data must be bytes", "encode the text"),
    ("op.sendmsg(fd, b'data')", TypeError, "buffers must be", "a list of buffers"),
    ("op.recvmsg(fd, it.buffer)", TypeError, "buffers must be", "a list of buffers"),
    ("op.connect(fd, ('::1', 80))", TypeError, "address must be", "encode_sockaddr"),
    ("op.bind(fd, ('::1', 80))", TypeError, "address must be", "encode_sockaddr"),
    ("op.socket('tcp', 1)", TypeError, "family must be", "an int"),
    ("op.poll_add(it.sock, 1)", TypeError, "fd must be", "as fileno() returns"),
    ("op.poll_add(fd, 'in')", TypeError, "events must be", "an int"),
    ("op.timeout(1.5)", TypeError, "timeout_ns must be", "an int"),
    ("op.openat(None, os.O_RDONLY)", TypeError, "path must be", "a str, bytes or pathlib.Path"),
    ("op.openat(it.path, 'r')", TypeError, "flags must be", "os.O_RDONLY"),
    ("op.openat2(it.path, 'r')", TypeError, "flags must be", "os.O_RDONLY"),
    ("op.renameat(it.path, 5)", TypeError, "target must be", "a str, bytes or pathlib.Path"),
    ("op.unlinkat(3)", TypeError, "path must be", "a str, bytes or pathlib.Path"),
    ("op.statx(None)", TypeError, "path must be", "a str, bytes or pathlib.Path"),
    ("op.setxattr(it.path, 'user.x', 'text')", TypeError, "value must be", "encode the text"),
    # Batches and chains
    ("perform_many(op.nop())", TypeError, "operations must be", "a list of operations"),
    ("perform_many(None)", TypeError, "operations must be", "a list of operations"),
    ("perform_many(['x'])", TypeError, "each of operations", "an operation"),
    ("perform_many([op.nop])", TypeError, "each of operations", "an operation"),
    ("perform_many([[op.nop()]])", TypeError, "each of operations", "a chain by linked()"),
    ("linked(op.nop())", TypeError, "operations must be", "a list of operations"),
    ("linked([])", ValueError, "operations must have", "at least one"),
    ("linked(['x'])", TypeError, "each of operations", "an operation, such as nop()"),
    ("linked([linked([op.nop()])])", TypeError, "each of operations", "such as nop()"),
    # Settings
    ("RingConfig(entries='64')", TypeError, "entries must be", "an int"),
    ("RingConfig(entries=64.0)", TypeError, "entries must be", "an int"),
    ("RingConfig(entries=True)", TypeError, "entries must be", "an int"),
    ("RingConfig(entries=0)", ValueError, "entries must be", "between 1 and 32768"),
    ("RingConfig(entries=100_000)", ValueError, "entries must be", "between 1 and 32768"),
    ("RingConfig(completion_entries=16)", ValueError, "completion_entries", "at least entries"),
    ("RingConfig(receive_buffers=100)", ValueError, "receive_buffers", "such as 128"),
    ("RingConfig(bounded_workers=0)", ValueError, "bounded_workers", "between 1 and 4096"),
    ("RingConfig(max_file_operations=None)", TypeError, "max_file_operations", "an int"),
    ("RingConfig(turn_budget=-1)", ValueError, "turn_budget", "between 0 and 1 second"),
    ("RingConfig(turn_budget='fast')", TypeError, "turn_budget", "a number of seconds"),
    ("RingConfig(sqpoll=True)", TypeError, "sqpoll must be", "such as SQPoll()"),
    ("RingConfig(sqpoll=SQPoll)", TypeError, "sqpoll must be", "such as SQPoll()"),
    ("RingConfig(allowed_operations='RECV')", TypeError, "allowed_operations", "frozenset({"),
    ("RingConfig(allowed_operations={'RECV'})", TypeError, "allowed_operations", "frozenset({"),
    ("RingConfig(allowed_operations=frozenset({'recv'}))", ValueError, "allowed_", "write 'RECV'"),
    ("RingConfig(allowed_operations=frozenset({'X'}))", ValueError, "allowed_", "IORING_OP_"),
    ("RingConfig(allowed_operations=frozenset({1}))", ValueError, "allowed_", "IORING_OP_"),
    ("RingConfig(require='yes')", TypeError, "require must be", "True or False"),
    ("SQPoll(idle=0)", ValueError, "idle must be", "between 0.001 and 3600 seconds"),
    ("SQPoll(idle='1')", TypeError, "idle must be", "a number of seconds"),
    ("SQPoll(cpu=-1)", ValueError, "cpu must be", "between 0 and 65535"),
    ("install({'entries': 64})", TypeError, "ring must be", "such as RingConfig(entries=64)"),
    ("install(RingConfig)", TypeError, "ring must be", "such as RingConfig(entries=64)"),
    ("install('require')", TypeError, "ring must be", "such as RingConfig(entries=64)"),
    ("run(trio.sleep, 0, ring={})", TypeError, "ring must be", "such as RingConfig(entries=64)"),
    # Files
    ("open_positional(it.path, os.O_RDWR)", TypeError, "mode must be", "os.open as flags="),
    ("open_positional(it.path, 'rw')", ValueError, "mode must be", "one of 'r', 'r+'"),
    ("open_positional(None)", TypeError, "file must be", "a str, bytes or pathlib.Path"),
    ("open_direct(it.path, os.O_RDWR)", TypeError, "mode must be", "os.open as flags="),
    ("open_direct(it.path, block_size='512')", TypeError, "block_size must be", "an int"),
    ("open_direct(it.path, block_size=100)", ValueError, "block_size must be", "a power of two"),
    ("open_direct(None)", TypeError, "file must be", "a str, bytes or pathlib.Path"),
    ("write_file(it.path, b'data', 0o600)", TypeError, "mode must be", "such as 'r'"),
    ("it.at.copy_range(0, it.file, 0, 1)", TypeError, "target must be", "open_positional"),
    ("it.at.append('text')", TypeError, "data must be bytes", "encode the text"),
    ("it.at.read_at('4', 0)", TypeError, "size must be", "an int"),
    ("it.at.read_at(4.0, 0)", TypeError, "size must be", "an int"),
    ("it.at.read_at(-1, 0)", ValueError, "size must be", "0 or more"),
    ("it.at.read_at(4, -1)", ValueError, "offset must be", "0 or more"),
    ("it.at.read_at(4, '0')", TypeError, "offset must be", "an int"),
    ("it.at.read_into_at(4, 0)", TypeError, "buffer", "pass bytearray(4)"),
    ("it.at.read_into_at(b'1234', 0)", TypeError, "buffer must be", "such as a bytearray"),
    ("it.at.readv_at(it.buffer, 0)", TypeError, "buffers must be", "a list of buffers"),
    ("it.at.readv_at([b'1'], 0)", TypeError, "each of buffers", "such as a bytearray"),
    ("it.at.write_at('text', 0)", TypeError, "data must be bytes", "encode the text"),
    ("it.at.write_at(b'data', '0')", TypeError, "offset must be", "an int"),
    ("it.at.writev_at(b'data', 0)", TypeError, "buffers must be", "a list of buffers"),
    ("it.at.writev_at(['text'], 0)", TypeError, "each of buffers", "encode the text"),
    ("it.at.truncate('0')", TypeError, "size must be", "an int"),
    ("it.at.truncate(-1)", ValueError, "size must be", "0 or more"),
    ("it.at.fallocate(0, '1')", TypeError, "size must be", "an int"),
    ("it.at.advise(0, 0, 'random')", TypeError, "advice must be", "an int"),
    ("write_file(it.path, 'text')", TypeError, "data must be bytes", "encode the text"),
    ("write_file(it.path, None)", TypeError, "data must be", "bytes or another buffer"),
    ("write_file(5, b'data')", TypeError, "path must be", "a str, bytes or pathlib.Path"),
    ("fsync('path')", TypeError, "file must be", "trio.open_file"),
    ("fsync(it.file)", TypeError, "file must be", "trio.open_file"),
    ("fdatasync(5)", TypeError, "file must be", "trio.open_file"),
    ("RegisteredBuffers('4', 4096)", TypeError, "count must be", "an int"),
    ("RegisteredBuffers(0, 4096)", ValueError, "count must be", "between 1 and"),
    ("RegisteredBuffers(4, 1.5)", TypeError, "size must be", "an int"),
    ("RegisteredBuffers(4, 1 << 30)", ValueError, "count times size", "at most 1 GiB"),
    # Transfers
    ("send_file(it.file, it.stream)", TypeError, "file must be", "an open file"),
    ("send_file('host', it.file)", TypeError, "stream must be", "a stream of Trio's or AnyIO's"),
    ("send_file(it.stdlib, it.file)", TypeError, "stream must be", "from_stdlib_socket"),
    ("send_file(it.udp, it.file)", ValueError, "stream must be", "such as a TCP socket"),
    ("send_file(it.stream, it.path)", TypeError, "file must be", "open it first"),
    ("send_file(it.stream, pathlib.Path('x'))", TypeError, "file must be", "open it first"),
    ("send_file(it.stream, io.BytesIO())", TypeError, "file must be", "with an fd"),
    ("send_file(it.stream, it.closed)", ValueError, "file must be", "this one is closed"),
    ("send_file(it.stream, it.file, offset='0')", TypeError, "offset must be", "an int"),
    ("send_file(it.stream, it.file, offset=-1)", ValueError, "offset must be", "0 or more"),
    ("send_file(it.stream, it.file, count=1.5)", TypeError, "count must be", "an int"),
    ("send_file(it.stream, it.file, progress={})", TypeError, "progress", "a SendProgress()"),
    ("receive_file(it.stream, it.path)", TypeError, "file must be", "open it first"),
    ("receive_file(it.stream, it.file)", OSError, "file must be", "open for writing"),
    ("receive_file(it.stdlib, it.at)", TypeError, "stream must be", "from_stdlib_socket"),
    ("receive_file(it.stream, it.at, count='5')", TypeError, "count must be", "an int"),
    ("receive_file(it.stream, it.at, progress=1)", TypeError, "progress", "a ReceiveProgress()"),
    ("relay(it.stream, 'x')", TypeError, "destination must be", "a stream of Trio's or AnyIO's"),
    ("relay(it.stdlib, it.stream)", TypeError, "source must be", "from_stdlib_socket"),
    ("relay(it.stream, it.stream, count=-1)", ValueError, "count must be", "0 or more"),
    ("relay(it.stream, it.stream, progress=1)", TypeError, "progress", "a RelayProgress()"),
    ("send_zerocopy(it.stream, 'text')", TypeError, "each of data", "encode the text"),
    ("send_zerocopy(it.stream, [b'1'])", TypeError, "each of data", "bytes or another buffer"),
    ("send_zerocopy(it.stream, progress=1)", TypeError, "progress", "a ZeroCopyProgress()"),
    # Multishot, channels, threads
    ("accept_many(it.sock)", TypeError, "listener must be", "open_tcp_listeners"),
    ("accept_many([it.listener])", TypeError, "listener must be", "one of those"),
    ("accept_many(it.listener, max_waiting='1')", TypeError, "max_waiting must be", "an int"),
    ("accept_many(it.listener, max_waiting=0)", ValueError, "max_waiting", "between 1 and"),
    ("receive_many(it.listener)", TypeError, "stream must be", "a stream of Trio's or AnyIO's"),
    ("receive_many(it.stream, max_buffers='1')", TypeError, "max_buffers must be", "an int"),
    ("receive_many(it.stream, buffer_size=0)", ValueError, "buffer_size", "between 1 and"),
    ("open_ring_channel('5')", TypeError, "max_buffer_size must be", "an int or math.inf"),
    ("open_ring_channel(-1)", ValueError, "max_buffer_size must be", "0 or more"),
    ("serve_threads('x', [it.listener], threads=2)", TypeError, "handler", "an async function"),
    ("serve_threads(it.serve, it.listener, threads=2)", TypeError, "listeners", "a list of"),
    ("serve_threads(it.serve, [it.sock], threads=2)", TypeError, "each of listeners", "Listener"),
    ("serve_threads(it.serve, [it.listener], threads='2')", TypeError, "threads", "an int"),
    ("serve_threads(it.serve, [it.listener], threads=0)", ValueError, "threads", "between 1 and"),
    ("serve_threads(it.serve, [it.listener], threads=2, ring=1)", TypeError, "ring", "RingConfig"),
    # Names
    ("trio_uring.open_file", AttributeError, "open_file", "use trio.open_file"),
    ("trio_uring.perform", AttributeError, "perform", "trio_uring.lowlevel.perform"),
    ("trio_uring.on_ring", AttributeError, "on_ring", "trio_uring.lowlevel.on_ring"),
]


@asynccontextmanager
async def names(directory: pathlib.Path) -> AsyncGenerator[dict[str, Any]]:
    """Yield the names that the calls above use."""
    path = directory / "file"
    path.write_bytes(bytes(1000))
    closed = path.open("rb")
    closed.close()
    one, other = socket.socketpair()
    async with (
        await trio_uring.open_positional(path, "r+") as at,
        trio.SocketStream(trio.socket.from_stdlib_socket(one)) as stream,
    ):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        with (
            path.open("rb") as file,
            closing(other),
            closing(listener.socket),
            trio.socket.socket() as sock,
            trio.socket.socket(type=socket.SOCK_DGRAM) as udp,
        ):
            things = {"sock": sock, "udp": udp, "stream": stream, "listener": listener}
            things |= {"at": at, "file": file, "closed": closed, "path": f"{path}"}
            things |= {"buffer": ONE_BYTE, "stdlib": other, "serve": stream.send_all}
            known = {name: getattr(trio_uring, name) for name in trio_uring.__all__}
            known |= {"op": lowlevel.operations, "perform": lowlevel.perform}
            known |= {"io": io, "os": os, "pathlib": pathlib, "trio": trio}
            known |= {"trio_uring": trio_uring, "it": SimpleNamespace(**things), "fd": at.fileno()}
            yield known


def message_of(call: str, error: type[Exception], names: dict[str, Any]) -> str:
    """Return what *call* says as it raises *error*, before anything is awaited."""
    try:
        result = eval(call, names)
        if inspect.iscoroutine(result):
            trap = result.send(None)
            result.close()
            return f"it awaited {trap}"
    except error as exc:
        return f"{exc}"
    return f"it returned {result!r}"


def check(call: str, error: type[Exception], argument: str, remedy: str, message: str) -> None:
    assert argument in message, (call, error)
    assert remedy in message, (call, error)
    assert len(message) <= CHARS_MAX, call
    assert "\n" not in message, call
    assert ". " not in message, call


@pytest.mark.parametrize(
    ("call", "error", "argument", "remedy"), MISTAKES, ids=[call for call, *_ in MISTAKES]
)
async def test_mistake(
    call: str, error: type[Exception], argument: str, remedy: str, tmp_path: pathlib.Path
) -> None:
    async with names(tmp_path) as known:
        check(call, error, argument, remedy, message_of(call, error, known))


def test_the_same_without_a_ring(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        async with names(tmp_path) as known:
            for call, error, argument, remedy in MISTAKES:
                if call.startswith(("perform(", "perform_many([")):  # it says that there is no ring
                    continue
                check(call, error, argument, remedy, message_of(call, error, known))

    trio.run(main)


ANYIO = [
    ({"entries": 64}, "backend_options has 'entries'", "{'ring': RingConfig(entries=...)}"),
    ({"use_uvloop": True}, "backend_options has 'use_uvloop'", "no others than clock"),
    ({"ring": {}}, "ring must be a RingConfig", "such as RingConfig(entries=64)"),
]


@pytest.mark.parametrize(("options", "argument", "remedy"), ANYIO)
def test_anyio_options(options: dict[str, Any], argument: str, remedy: str) -> None:
    with pytest.raises(TypeError) as caught:
        anyio.run(anyio.sleep, 0, backend="trio_uring", backend_options=options)
    check("anyio.run", TypeError, argument, remedy, f"{caught.value}")
    with pytest.raises(TypeError) as caught:
        anyio_backend.backend_class.create_test_runner(options)
    check("the runner", TypeError, argument, remedy, f"{caught.value}")


OUTSIDE = [
    lowlevel.on_ring,
    trio_uring.statistics,
    lambda: trio_uring.RegisteredBuffers(1, 1),
    lambda: asyncio.run(lowlevel.perform(lowlevel.operations.nop())),
    lambda: asyncio.run(trio_uring.perform_many([])),
    lambda: asyncio.run(trio_uring.open_positional(__file__)),
]


@pytest.mark.parametrize("call", OUTSIDE, ids=range(len(OUTSIDE)))
def test_outside_a_run(call: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no Trio run.* trio_uring.run"):
        call()


def test_a_ring_is_needed() -> None:
    with pytest.raises(RuntimeError, match=r"not on io_uring: start it with trio_uring.run"):
        trio.run(lowlevel.perform, lowlevel.operations.nop())


async def test_what_a_long_chain_says() -> None:
    operations = [lowlevel.operations.fsync(0) for _ in range(65)]
    with pytest.raises(ValueError, match=r"operations has .*raise RingConfig.max_file_operations"):
        await trio_uring.perform_many([trio_uring.linked(operations)])


def test_numbers_like_ints_are_ints(tmp_path: pathlib.Path) -> None:
    class Number:
        def __index__(self) -> int:
            return 2

    path = tmp_path / "file"
    path.write_bytes(b"01234567")

    async def main() -> None:
        async with await trio_uring.open_positional(path) as file:
            assert await file.read_at(4, Number()) == b"2345"  # type: ignore[arg-type]

    trio_uring.run(main)
