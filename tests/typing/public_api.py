"""Every public name, as its users' type checkers see it. Never run; mypy and pyright accept it."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from typing_extensions import assert_type

import trio_uring
from trio_uring import (
    ForkedRingError,
    IncompatibleTrioError,
    MultishotListener,
    PositionalFile,
    ReceivedLease,
    ReceivedLeases,
    RingConfig,
    RingUnavailableError,
    SQPoll,
    UnsupportedOpcodeError,
    opentelemetry,
    prometheus,
)
from trio_uring.lowlevel import (
    FallbackStatistics,
    Operation,
    OperationTimes,
    RingStatistics,
    on_ring,
    operations,
    perform,
)

if TYPE_CHECKING:
    import io
    from collections.abc import Callable

    import anyio.abc
    import trio
    from anyio.streams.tls import TLSStream
    from opentelemetry.metrics import Meter
    from outcome import Outcome
    from prometheus_client import CollectorRegistry
    from trio.abc import Clock, Instrument

# --- Runs -----------------------------------------------------------------------------------


async def plain() -> str:
    return ""


async def with_arguments(number: int, text: str) -> list[int]:
    return [number, len(text)]


def runs(clock: Clock, instrument: Instrument) -> None:
    assert_type(trio_uring.run(plain), str)
    assert_type(trio_uring.run(with_arguments, 1, "a"), "list[int]")
    trio_uring.run(with_arguments, 1)  # type: ignore[arg-type]
    trio_uring.run(
        plain,
        clock=clock,
        instruments=[instrument],
        restrict_keyboard_interrupt_to_checkpoints=True,
        strict_exception_groups=True,
        ring=RingConfig(require=True),
    )


def metrics(registry: CollectorRegistry, meter: Meter) -> None:
    with prometheus.export_statistics(), prometheus.export_statistics("run", registry=registry):
        assert_type(prometheus.operation_times(registry=registry), OperationTimes)
    with opentelemetry.export_statistics(), opentelemetry.export_statistics("run", meter=meter):
        times: Instrument = opentelemetry.operation_times(meter=meter)
    trio_uring.run(plain, instruments=[times])
    own = OperationTimes(lambda opcode, seconds: print(f"{opcode:10} {seconds:.3f}"))
    assert_type(own.counts["RECV"], int)
    assert_type(own.seconds["RECV"], float)
    OperationTimes(print, 1)  # type: ignore[call-arg]


def guest_runs(soon: Callable[[Callable[[], object]], object], clock: Clock) -> None:
    def done(outcome: Outcome[str]) -> None:
        assert_type(outcome.unwrap(), str)

    trio_uring.start_guest_run(
        plain,
        run_sync_soon_threadsafe=soon,
        run_sync_soon_not_threadsafe=soon,
        done_callback=done,
        host_uses_signal_set_wakeup_fd=True,
        clock=clock,
        ring=None,
    )


def installing() -> None:
    trio_uring.install()
    trio_uring.install(RingConfig())
    trio_uring.install(ring=None)
    trio_uring.uninstall()


# --- Settings -------------------------------------------------------------------------------


def settings() -> None:
    config = RingConfig(
        entries=256,
        completion_entries=4096,
        bounded_workers=8,
        unbounded_workers=32,
        max_file_operations=64,
        receive_buffers=128,
        sqpoll=SQPoll(idle=0.05, cpu=1),
        require=False,
    )
    assert_type(config.entries, int)
    assert_type(config.completion_entries, int)
    assert_type(config.bounded_workers, int)
    assert_type(config.unbounded_workers, int)
    assert_type(config.max_file_operations, int)
    assert_type(config.receive_buffers, int)
    assert_type(config.sqpoll, "SQPoll | None")
    assert_type(config.require, bool)
    assert_type(SQPoll().idle, float)
    assert_type(SQPoll().cpu, "int | None")
    RingConfig(256)  # type: ignore[call-arg]
    config.entries = 1  # type: ignore[misc]


# --- Errors ---------------------------------------------------------------------------------


def errors(
    unavailable: RingUnavailableError,
    incompatible: IncompatibleTrioError,
    unsupported: UnsupportedOpcodeError,
    forked: ForkedRingError,
) -> None:
    assert_type(unavailable.reason, str)
    assert_type(unavailable.errno, int)
    runtime_errors: list[RuntimeError] = [unavailable, incompatible, forked]
    required: RingUnavailableError = incompatible
    os_error: OSError = unsupported
    _ = runtime_errors, required, os_error


# --- Sockets --------------------------------------------------------------------------------


async def ahead(listener: trio.SocketListener, stream: trio.SSLStream[trio.SocketStream]) -> None:
    async with trio_uring.accept_many(listener, max_waiting=10) as connections:
        assert_type(connections, MultishotListener)
        assert_type(await connections.accept(), "trio.SocketStream")
        assert_type(connections.waiting, int)
        assert_type(connections.socket, "trio.socket.SocketType")
        async for connection in connections:
            assert_type(connection, "trio.SocketStream")
        assert_type(await connections.stop(), "list[trio.SocketStream]")
        as_listener: trio.abc.Listener[trio.SocketStream] = connections
    async with trio_uring.receive_many(stream, max_buffers=4, buffer_size=100) as leases:
        assert_type(leases, ReceivedLeases)
        async for lease in leases:
            assert_type(lease, ReceivedLease)
            with lease as entered:
                assert_type(entered, ReceivedLease)
                assert_type(entered.memory, memoryview)
            lease.release()
        assert_type(await leases.receive(), ReceivedLease)
        assert_type(leases.receive_nowait(), ReceivedLease)
        assert_type(leases.unread, bytes)
        assert_type(leases.leased, int)
        as_channel: trio.abc.ReceiveChannel[ReceivedLease] = leases
    trio_uring.accept_many(stream)  # type: ignore[arg-type]
    trio_uring.receive_many(listener)  # type: ignore[arg-type]
    trio_uring.receive_many(listener.socket)
    _ = as_listener, as_channel


# --- Files ----------------------------------------------------------------------------------


async def files(path: Path) -> None:
    async with await trio_uring.open_positional(path, "r+", permissions=0o600) as file:
        assert_type(file, PositionalFile)
        assert_type(file.fileno(), int)
        assert_type(file.closed, bool)
        assert_type(await file.read_at(10, 0), bytes)
        assert_type(await file.read_into_at(bytearray(10), 0), int)
        assert_type(await file.readv_at([bytearray(10)], 0), int)
        assert_type(await file.write_at(b"", 0), int)
        assert_type(await file.writev_at([b"", memoryview(b"")], 0), int)
        await file.fsync()
        await file.fdatasync()
        await file.fallocate(0, 10)
        await file.fallocate(0, 10, mode=trio_uring.FallocateMode.PUNCH_HOLE)
        await file.sync_file_range(0, 10, wait=False)
        assert_type(await file.read_exactly_at(10, 0), bytes)
        assert_type(await file.read_many_at([(10, 0), (10, 10)]), "list[bytes]")
        assert_type(await file.append(b"", dsync=True), int)
        assert_type(await file.size(), int)
        assert_type(await file.stat(), os.stat_result)
        assert_type(await file.seek_data(0), "int | None")
        assert_type(await file.seek_hole(0), "int | None")
        assert_type(await file.copy_range(0, file, 100, 10), int)
        assert_type(await file.try_lock(0, 10, shared=True), bool)
        await file.write_all_at(b"", 0, dsync=True)
        await file.lock()
        await file.unlock()
        async with file.locked(10):
            pass
        assert_type(file.dup(), PositionalFile)
    async with await trio_uring.open_direct(path, "r+", flags=os.O_DSYNC) as direct:
        assert_type(direct.dup(), trio_uring.DirectFile)
        assert_type(await direct.read_at(4096, 0), bytes)
        await file.truncate(0)
        await file.advise(0, 0, 4)
    as_resource: trio.abc.AsyncResource = await trio_uring.open_positional(b"name")
    assert_type(
        await trio_uring.write_file(path, bytearray(10), "x", permissions=0o600, sync=True), int
    )
    assert_type(await trio_uring.write_file(b"name", b"data"), int)
    await as_resource.aclose()


# --- Several loops --------------------------------------------------------------------------


async def channels() -> None:
    send_channel, receive_channel = trio_uring.open_ring_channel[int](1)
    assert_type(send_channel, trio_uring.RingSendChannel[int])
    assert_type(receive_channel, trio_uring.RingReceiveChannel[int])
    assert_type(send_channel.clone(), trio_uring.RingSendChannel[int])
    assert_type(receive_channel.clone(), trio_uring.RingReceiveChannel[int])
    send_channel.send_nowait(1)
    send_channel.send_nowait("")  # type: ignore[arg-type]
    await send_channel.send(1)
    assert_type(receive_channel.receive_nowait(), int)
    assert_type(await receive_channel.receive(), int)
    assert_type(send_channel.statistics().tasks_waiting_send, int)
    to: trio.abc.SendChannel[int] = send_channel
    frm: trio.abc.ReceiveChannel[int] = receive_channel
    async with to, frm:
        async for number in frm:
            assert_type(number, int)
    with send_channel, receive_channel:
        receive_channel.close()


async def durability(
    text: trio._file_io.AsyncIOWrapper[io.TextIOWrapper],
    anyio_file: anyio.AsyncFile[bytes],
    path: trio.Path,
    positional: PositionalFile,
) -> None:
    await trio_uring.fsync(text)
    await trio_uring.fdatasync(anyio_file)
    async with await path.open("ab", buffering=0) as raw:
        await trio_uring.fdatasync(raw)
    await trio_uring.fsync(path)  # type: ignore[arg-type]
    assert_type(await positional.write_at(b"", 0, dsync=True), int)
    assert_type(await positional.writev_at([b""], 0, dsync=True), int)


# --- Transfers ------------------------------------------------------------------------------


async def transfers(
    stream: trio.SocketStream,
    tls: trio.SSLStream[trio.SocketStream],
    sock: trio.socket.SocketType,
    anyio_stream: anyio.abc.SocketStream,
    anyio_tls: TLSStream,
    file: PositionalFile,
) -> None:
    sent = trio_uring.SendProgress()
    assert_type(sent.bytes_sent, int)
    assert_type(await trio_uring.send_file(stream, file, offset=1, progress=sent), int)
    await trio_uring.send_file(tls, 3, count=10)
    await trio_uring.send_file(sock, file)
    await trio_uring.send_file(anyio_stream, file)
    await trio_uring.send_file(anyio_tls, file)
    await trio_uring.send_file(file, file)  # type: ignore[arg-type]
    received = trio_uring.ReceiveProgress()
    assert_type(received.bytes_received, int)
    assert_type(received.left, bytes)
    assert_type(await trio_uring.receive_file(stream, file, offset=1, progress=received), int)
    await trio_uring.receive_file(tls, 3, count=10)
    await trio_uring.receive_file(sock, file)
    await trio_uring.receive_file(anyio_stream, file)
    await trio_uring.receive_file(anyio_tls, file)
    relayed = trio_uring.RelayProgress()
    assert_type(relayed.left, bytes)
    assert_type(await trio_uring.relay(stream, tls, count=1, progress=relayed), int)
    await trio_uring.relay(sock, anyio_stream)
    await trio_uring.relay(anyio_tls, sock)
    await trio_uring.relay(3, sock)  # type: ignore[arg-type]
    copied = trio_uring.ZeroCopyProgress()
    assert_type(copied.bytes_copied, int)
    assert_type(await trio_uring.send_zerocopy(stream, b"", progress=copied), None)
    await trio_uring.send_zerocopy(anyio_stream, b"", bytearray(), memoryview(b""))
    await trio_uring.send_zerocopy(sock, "")  # type: ignore[arg-type]


async def threads(listener: trio.SocketListener) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(b"")

    await trio_uring.serve_threads(handler, [listener], threads=2, ring=RingConfig())


async def threads_that_say_when_they_serve(
    listeners: list[trio.SocketListener], task_status: trio.TaskStatus[list[trio.SocketListener]]
) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(b"")

    await trio_uring.serve_threads(handler, listeners, threads=2, task_status=task_status)


async def threads_of_another_kind(listener: trio.SocketListener) -> None:
    async def handler(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.do_handshake()

    await trio_uring.serve_threads(handler, [listener], threads=2)  # type: ignore[arg-type]


# --- Low level ------------------------------------------------------------------------------


def statistics() -> None:
    assert_type(on_ring(), bool)
    found = trio_uring.statistics()
    assert_type(found.backend, Literal["io_uring", "epoll"])
    assert_type(found.fallback_reason, str)
    assert_type(found.completed, Mapping[str, int])
    if found.backend == "io_uring":
        each_field(found, FallbackStatistics(tasks_waiting_read=0, tasks_waiting_write=0))


def each_field(ring: RingStatistics, fallback: FallbackStatistics) -> None:
    assert_type(ring.backend, Literal["io_uring"])
    assert_type(ring.tasks_waiting_read, int)
    assert_type(ring.tasks_waiting_write, int)
    assert_type(ring.setup_flags, "tuple[str, ...]")
    assert_type(ring.features, "tuple[str, ...]")
    assert_type(ring.refused, "tuple[str, ...]")
    assert_type(ring.entries, int)
    assert_type(ring.in_flight, int)
    assert_type(ring.submitted, int)
    assert_type(ring.enters, int)
    assert_type(ring.cancelled, int)
    assert_type(ring.completed, Mapping[str, int])
    assert_type(ring.waiting_for_limit, int)
    assert_type(ring.routes, Mapping[str, int])
    assert_type(ring.limits, Mapping[str, int])
    assert_type(fallback.backend, Literal["epoll"])
    assert_type(fallback.in_flight, int)
    assert_type(fallback.tasks_waiting_read, int)
    assert_type(fallback.tasks_waiting_write, int)
    assert_type(fallback.fallback_reason, str)


async def performing(operation: Operation[list[str]]) -> None:
    assert_type(await perform(operation), "list[str]")
    assert_type(await perform(operations.nop()), None)
    more_general: Operation[object] = operation
    _ = more_general


def on_sockets(buffers: operations.ProvidedBuffers, message: operations.Message[int]) -> None:
    assert_type(operations.recv(3, bytearray(1), 0), Operation[int])
    assert_type(operations.recv_select(3, buffers, 1, poll_first=True), Operation[bytes])
    assert_type(operations.recvmsg(3, [bytearray(1)], 16, 0), "Operation[operations.Message[int]]")
    assert_type(operations.recvmsg_select(3, buffers, 1), "Operation[operations.Message[bytes]]")
    assert_type(operations.recv_multishot(3, buffers, lambda _res, _flags: None), Operation[bytes])
    assert_type(operations.accept_multishot(3, lambda _res, _flags: None), Operation[int])
    assert_type(operations.send(3, b""), Operation[int])
    assert_type(operations.send_zc(3, memoryview(b""), on_copied=print), Operation[int])
    assert_type(operations.sendmsg(3, [b""], [(1, 2, b"")], 0, b""), Operation[int])
    assert_type(operations.sendmsg_zc(3, (bytearray(1),), on_copied=print), Operation[int])
    assert_type(operations.accept(3), "Operation[tuple[int, bytes]]")
    assert_type(operations.connect(3, b""), Operation[None])
    assert_type(operations.socket(socket.AF_INET, socket.SOCK_STREAM), Operation[int])
    assert_type(operations.bind(3, b""), Operation[None])
    assert_type(operations.listen(3, 128), Operation[None])
    assert_type(operations.shutdown(3, socket.SHUT_WR), Operation[None])
    assert_type(operations.encode_sockaddr(socket.AF_INET, ("::1", 1)), "bytes | None")
    assert_type(operations.decode_sockaddr(b""), operations.Address)
    assert_type(buffers.group, int)
    assert_type(buffers.take(0, 0), bytes)
    assert_type(message.data, int)
    assert_type(message.ancillary, "list[tuple[int, int, bytes]]")
    assert_type(message.flags, int)
    assert_type(message.address, operations.Address)


def on_files(buffers: operations.ProvidedBuffers) -> None:
    assert_type(operations.read(3, bytearray(1), 0, cancellable=True), Operation[int])
    assert_type(operations.read_fixed(3, bytearray(1), 0, 0), Operation[int])
    assert_type(operations.read_select(3, buffers, 1), Operation[bytes])
    assert_type(operations.readv(3, [bytearray(1)], 0), Operation[int])
    assert_type(operations.readv_fixed(3, [bytearray(1)], 0, 0), Operation[int])
    assert_type(operations.write(3, b"", 0, in_worker=True), Operation[int])
    assert_type(operations.write_fixed(3, bytearray(1), 0, 0), Operation[int])
    assert_type(operations.writev(3, [b""], 0), Operation[int])
    assert_type(operations.writev_fixed(3, [bytearray(1)], 0, 0), Operation[int])
    assert_type(operations.fsync(3, data_only=True), Operation[None])
    assert_type(operations.sync_file_range(3, 0, 1, 2), Operation[None])
    assert_type(operations.fallocate(3, 0, 1), Operation[None])
    assert_type(operations.fadvise(3, 0, 1, os.POSIX_FADV_DONTNEED), Operation[None])
    assert_type(operations.ftruncate(3, 0), Operation[None])
    assert_type(operations.splice(3, 4, 1, offset_in=0), Operation[int])
    assert_type(operations.tee(3, 4, 1), Operation[int])
    assert_type(operations.pipe(), "Operation[tuple[int, int]]")


def on_paths() -> None:
    assert_type(operations.openat("name", os.O_RDONLY, dir_fd=3), Operation[int])
    assert_type(operations.openat2(b"name", os.O_RDONLY, resolve=8), Operation[int])
    assert_type(operations.unlinkat(Path(), directory=True), Operation[None])
    assert_type(operations.renameat("a", Path("b")), Operation[None])
    assert_type(operations.mkdirat("a", 0o700), Operation[None])
    assert_type(operations.symlinkat("a", "b"), Operation[None])
    assert_type(operations.linkat("a", "b", follow_symlinks=True), Operation[None])
    assert_type(operations.statx("a", follow_symlinks=False), Operation[os.stat_result])
    assert_type(operations.statx(3), Operation[os.stat_result])
    assert_type(operations.getxattr("a", "user.a"), Operation[bytes])
    assert_type(operations.fgetxattr(3, b"user.a"), Operation[bytes])
    assert_type(operations.setxattr("a", "user.a", b"", os.XATTR_CREATE), Operation[None])
    assert_type(operations.fsetxattr(3, "user.a", bytearray()), Operation[None])


def on_the_system(status: operations.ChildStatus) -> None:
    with mmap.mmap(-1, 4096) as memory:
        assert_type(operations.madvise(memory, mmap.MADV_DONTNEED), Operation[None])
    word = bytearray(4)
    assert_type(operations.futex_wait(word, 0, private=True), Operation[None])
    assert_type(operations.futex_waitv([(word, 0)]), Operation[int])
    assert_type(operations.futex_wake(word, 1), Operation[int])
    assert_type(
        operations.waitid(os.P_PID, 1, os.WEXITED), "Operation[operations.ChildStatus | None]"
    )
    assert_type(status.pid, int)
    assert_type(status.uid, int)
    assert_type(status.code, int)
    assert_type(status.status, int)
    assert_type(operations.epoll_ctl(3, 1, 4, 1), Operation[None])
    assert_type(operations.epoll_wait(3, 10), "Operation[list[tuple[int, int]]]")


def on_the_ring() -> None:
    assert_type(operations.nop(), Operation[None])
    assert_type(operations.async_cancel(3), Operation[int])
    assert_type(operations.async_cancel_any(), Operation[int])
    assert_type(operations.poll_add(3, 1), Operation[int])
    assert_type(operations.close(3, in_worker=True), Operation[None])
    assert_type(operations.timeout(1_000_000, absolute=True), Operation[None])
    assert_type(operations.msg_ring(3, 4), Operation[None])
    assert_type(operations.msg_ring_fd(3, 0, 4, 0), Operation[int])
    assert_type(operations.files_update([3, -1]), "Operation[list[int]]")
    assert_type(operations.fixed_fd_install(0), Operation[int])
