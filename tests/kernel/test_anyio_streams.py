"""Transfers over AnyIO's streams: on the ring if there is a socket, with AnyIO's errors."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import tempfile
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
import trustme
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSStream
from children import output_of, run_python
from races import current_manager
from transfers import completed
from trio.testing import wait_all_tasks_blocked

from trio_uring import ReceivedLeases, receive_file, receive_many, relay, send_file, send_zerocopy
from trio_uring._streams import _anyio_native
from trio_uring._transfers import _send_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from anyio.abc import ByteReceiveStream, ByteStream, SocketStream

DATA: Final = os.urandom((2 << 20) + 12345)
BACKENDS: Final = ["trio_uring", "trio"]
KINDS: Final = ["TCP", "UNIX"]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        opened.write(DATA)
        opened.flush()
        yield opened.fileno()


async def connected(kind: str, stack: AsyncExitStack) -> tuple[SocketStream, SocketStream]:
    ends: list[SocketStream] = []
    if kind == "UNIX":
        ends += [await anyio.abc.UNIXSocketStream.from_socket(end) for end in socket.socketpair()]
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ends.append(await anyio.connect_tcp(*listener.getsockname()))
            ends.append(await anyio.abc.SocketStream.from_socket(listener.accept()[0]))
    for end in ends:
        await stack.enter_async_context(end)
    return ends[0], ends[1]


async def tls(ours: ByteStream, theirs: ByteStream) -> tuple[TLSStream, TLSStream]:
    authority = trustme.CA()
    client = ssl.create_default_context()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(client)
    authority.issue_cert("here").configure_cert(server)
    server.num_tickets = 0  # a client that does not read them and closes resets the connection
    ends: list[TLSStream] = []

    async def wrap(stream: ByteStream, **options: Any) -> None:
        ends.append(await TLSStream.wrap(stream, standard_compatible=False, **options))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(wrap, ours, hostname="here", ssl_context=client))
        tasks.start_soon(partial(wrap, theirs, server_side=True, ssl_context=server))
    ends.sort(key=lambda end: end.extra(anyio.streams.tls.TLSAttribute.server_side))
    return ends[0], ends[1]


async def all_of(stream: ByteReceiveStream) -> bytes:
    parts = [part async for part in stream]
    return b"".join(parts)


async def then_close(stream: Any, call: Any) -> None:
    await call()
    await stream.aclose()


def splices(backend: str) -> int:
    return completed("SPLICE") if backend == "trio_uring" else 0


def the_kernel_did_it(backend: str, before: int) -> bool:
    return backend == "trio" or splices(backend) > before


@pytest.mark.usefixtures("fd_ledger")
@pytest.mark.parametrize("kind", KINDS)
def test_socket_streams(
    backend: str, kind: str, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_send_file, "is_cached", lambda *_args: False)  # then it is spliced

    async def main() -> None:
        before = splices(backend)
        async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
            ours, theirs = await connected(kind, stack)
            tasks.start_soon(then_close, ours, partial(send_file, ours, file, offset=5))
            assert await all_of(theirs) == DATA[5:]
        assert the_kernel_did_it(backend, before)
        before = splices(backend)
        with tempfile.TemporaryFile() as target:
            async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
                ours, theirs = await connected(kind, stack)
                through, out = await connected(kind, stack)
                tasks.start_soon(then_close, ours, partial(send_zerocopy, ours, DATA))
                tasks.start_soon(then_close, through, partial(relay, theirs, through))
                assert await receive_file(out, target) == len(DATA)
            assert os.pread(target.fileno(), len(DATA) + 1, 0) == DATA
        assert the_kernel_did_it(backend, before)

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_tls_and_other_streams(backend: str, kind: str, file: int) -> None:
    """Bytes pass through streams that wrap a socket, never around them."""

    async def main() -> None:
        before = splices(backend)
        async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
            sealed, opened = await tls(*await connected(kind, stack))
            ours, theirs = await connected(kind, stack)
            stapled = StapledByteStream(ours, ours)
            tasks.start_soon(then_close, sealed, partial(send_file, sealed, file))
            tasks.start_soon(then_close, stapled, partial(relay, opened, stapled))
            buffered = BufferedByteReceiveStream(theirs)
            assert await buffered.receive_exactly(3) == DATA[:3]
            with tempfile.TemporaryFile() as target:
                assert await receive_file(buffered, target) == len(DATA) - 3
                assert os.pread(target.fileno(), len(DATA), 0) == DATA[3:]
        assert splices(backend) == before

    anyio.run(main, backend=backend)


def test_what_a_wrapper_holds_is_not_skipped(backend: str) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            ours, theirs = await connected("TCP", stack)
            await ours.send(b"abcdef")
            buffered = BufferedByteReceiveStream(theirs)
            assert await buffered.receive_exactly(2) == b"ab"
            with tempfile.TemporaryFile() as target:
                assert await receive_file(buffered, target, count=4) == 4
                assert os.pread(target.fileno(), 10, 0) == b"cdef"

    anyio.run(main, backend=backend)


def test_errors_are_anyios(backend: str, file: int) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            ours, theirs = await connected("UNIX", stack)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(then_close, ours, partial(send_file, ours, file))
                await wait_all_tasks_blocked()
                with pytest.raises(anyio.BusyResourceError):
                    await ours.send(b"x")
                with pytest.raises(anyio.BusyResourceError):
                    await send_file(ours, file)
                assert await all_of(theirs) == DATA
            with pytest.raises(anyio.ClosedResourceError):
                await send_file(ours, file)
            with pytest.raises(anyio.ClosedResourceError):
                await send_zerocopy(ours, b"x")
        async with AsyncExitStack() as stack:
            ours, theirs = await connected("UNIX", stack)
            await theirs.aclose()
            for call in (
                partial(send_file, ours, file),
                partial(send_zerocopy, ours, b"x"),
            ):
                with pytest.raises(anyio.BrokenResourceError):
                    await call()

    anyio.run(main, backend=backend)


def test_errors_of_receivers_are_anyios(backend: str) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            ours, theirs = await connected("TCP", stack)

            async def receive() -> None:
                with tempfile.TemporaryFile() as target, pytest.raises(anyio.ClosedResourceError):
                    await receive_file(ours, target)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive)
                await wait_all_tasks_blocked()
                for call in (ours.receive, partial(relay, ours, theirs)):
                    with pytest.raises(anyio.BusyResourceError):
                        await call()
                await ours.aclose()
            await receive()
            with pytest.raises(anyio.ClosedResourceError):
                await relay(ours, theirs)

    anyio.run(main, backend=backend)


def test_other_objects_are_refused(backend: str, file: int) -> None:
    async def main() -> None:
        send, receive = anyio.create_memory_object_stream[bytes]()
        with send, receive:
            for call in (
                partial(send_file, send, file),  # type: ignore[arg-type]
                partial(receive_file, receive, file),  # type: ignore[arg-type]
            ):
                with pytest.raises(TypeError, match="must be a stream"):
                    await call()

    anyio.run(main, backend=backend)


def test_anyio_is_not_needed(backend: str) -> None:
    code = """
        import sys, tempfile, trio, trio_uring

        async def main():
            with tempfile.TemporaryFile() as file:
                try:
                    await trio_uring.send_file(object(), file)
                except TypeError as exc:
                    print(exc)

        getattr(sys.modules[sys.argv[1]], "run")(main)
        print("anyio" in sys.modules)
    """
    expected = [
        "stream must be a stream of Trio's or AnyIO's, or a trio socket, not object",
        "False",
    ]
    assert output_of(run_python(code, backend)) == expected


# --- receive_many ---------------------------------------------------------------------------


async def all_leases(leases: ReceivedLeases) -> bytes:
    received = b""
    async for lease in leases:
        with lease:
            received += lease.memory
    return received


@pytest.mark.usefixtures("fd_ledger")
@pytest.mark.parametrize("kind", [*KINDS, "TLS"])
def test_receive_many(backend: str, kind: str) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
            ours: ByteStream
            theirs: ByteStream
            ours, theirs = await connected("TCP" if kind == "TLS" else kind, stack)
            if kind == "TLS":
                ours, theirs = await tls(ours, theirs)
            async with receive_many(theirs) as leases:
                tasks.start_soon(then_close, ours, partial(ours.send, DATA))
                assert await all_leases(leases) == DATA

    anyio.run(main, backend=backend)


@pytest.mark.usefixtures("fd_ledger")
def test_receive_many_and_others(backend: str) -> None:
    """Errors are AnyIO's. The stream is released when the block ends."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            ours, theirs = await connected("UNIX", stack)
            async with receive_many(theirs) as leases:
                with pytest.raises(anyio.BusyResourceError):
                    await theirs.receive()
                with pytest.raises(anyio.BusyResourceError):
                    receive_many(theirs)
                await ours.send(b"ahead")
                with await leases.receive() as lease:
                    assert lease.memory == b"ahead"
            await ours.send(b"data")
            assert await theirs.receive() == b"data"
            async with receive_many(theirs) as leases, anyio.create_task_group() as tasks:
                tasks.start_soon(then_close, theirs, wait_all_tasks_blocked)
                for _ in range(2):
                    with pytest.raises(anyio.ClosedResourceError):
                        await leases.receive()

    anyio.run(main, backend=backend)


def test_a_receive_takes_64_kib_unless_it_is_told_otherwise(backend: str) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            ours, theirs = await connected("UNIX", stack)
            await ours.send(bytes(100_000))
            assert len(await theirs.receive()) == 65536

    anyio.run(main, backend=backend)


class Unserved:
    """A native receive that found no buffer."""

    res = -errno.ENOBUFS
    flags = 0


async def receive_again(stream: Any) -> bytes:
    """Receive as the native engine does after a receive that found no buffer."""
    op: Any = Unserved()
    stream._receive_guard.__enter__()
    received = await _anyio_native._receive_again(current_manager(), op, stream, 10)
    stream._receive_guard.__enter__()  # it was released
    stream._receive_guard.__exit__(None, None, None)
    return received


async def send_the_rest(stream: Any, item: bytes) -> None:
    """Go on as the native engine does after a send for which there was no room."""
    stream._send_guard.__enter__()
    await _anyio_native._send_the_rest(stream, item, 0)


def test_what_the_native_engine_leaves_over(backend: str) -> None:
    if backend == "trio":
        pytest.skip("there is no native engine")

    async def main() -> None:
        async with AsyncExitStack() as stack:
            ours, theirs = await connected("TCP", stack)
            await theirs.send(b"data")
            failed = list[int]()
            pools = current_manager().pools
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pools, "failed", lambda res, _flags: failed.append(res))
                assert await receive_again(ours) == b"data"
            assert failed == [-errno.ENOBUFS]  # the pool gets one more
            async with anyio.create_task_group() as group:
                group.start_soon(expect_closed, partial(send_the_rest, theirs, bytes(1 << 25)))
                group.start_soon(expect_closed, partial(receive_again, theirs))
                await wait_all_tasks_blocked()
                await theirs.aclose()
            ours, theirs = await connected("TCP", stack)
            await theirs.send_eof()
            with pytest.raises(anyio.EndOfStream):
                await receive_again(ours)

    anyio.run(main, backend=backend)


async def expect_closed(call: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(anyio.ClosedResourceError):
        await call()
