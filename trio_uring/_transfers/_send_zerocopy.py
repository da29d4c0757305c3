"""`send_zerocopy`: zero-copy send: the network card reads the program's memory."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import attrs
from trio.lowlevel import checkpoint, enable_ki_protection

from trio_uring import _operations as operations
from trio_uring._arguments import check_readable
from trio_uring._engine._io_manager import UringIOManager, current_ring
from trio_uring._kernel.sockets import MSG_DONTWAIT
from trio_uring._streams._endpoints import sink_of
from trio_uring._trio_private import TrioSocket

from ._send_file import SendProgress, sent_counter
from ._transfer import Transfer, check_progress, send_block

if TYPE_CHECKING:
    from collections.abc import Sequence

    import trio
    from typing_extensions import Buffer

    from trio_uring._operations import Operation
    from trio_uring._streams._endpoints import SendsBytes, Sink

# The most buffers in one message (UIO_MAXIOV, sendmsg(2)).
_BUFFERS_MAX: Final = 1024

# Errors after which a plain send is used: this kernel (before 6.0; 6.1 for several buffers; 6.2 to
# report copies), this socket, or this process (RLIMIT_MEMLOCK; RingConfig.allowed_operations) has
# no zero-copy send.
_CANNOT: Final = frozenset(
    (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOMEM, errno.ENOBUFS, errno.EACCES, errno.EPERM)
)


@attrs.define
class ZeroCopyProgress(SendProgress):
    """How far `send_zerocopy` has come; also valid when it was cancelled or failed.

    Args:
      bytes_sent: As in `SendProgress`.
      bytes_copied: How many of these bytes were copied: by the kernel, because the route to the
        receiver cannot use the memory directly, or because a plain send was used.
    """

    bytes_copied: int = 0


@enable_ki_protection
async def send_zerocopy(
    stream: trio.abc.SendStream | trio.socket.SocketType | SendsBytes,
    *data: Buffer,
    progress: ZeroCopyProgress | None = None,
) -> None:
    """Send all of *data* without copying it, and wait until its memory may be reused.

    This works for a `trio.SocketStream`, a trio socket, and AnyIO's TCP stream, in a run on the
    ring. Where there is no zero-copy send (UNIX sockets, a `trio.SSLStream`, a kernel before 6.2, a
    run without a ring), it is a plain send, with the same result.

    The memory may be reused when the receiver's kernel has acknowledged all data that was sent from
    it. That takes at least a round trip, and longer if the receiver does not read. Over loopback
    the kernel copies anyway.

    Args:
      stream: A stream of Trio's or AnyIO's, or a trio socket. A socket must be of type
        ``SOCK_STREAM``, and connected.
      *data: Buffers to send one after the other. Until this returns or raises they must not be
        changed, and a `bytearray` cannot be resized.
      progress: Is kept up to date with the bytes sent and copied; see `ZeroCopyProgress`.

    Raises:
      ValueError: the socket is of another type.
      TypeError: *stream* is not a stream, or *data* contains something that is not a buffer.
      OSError: for a socket, as its ``send``.
      trio.BusyResourceError: another task is sending on this stream.
      trio.BrokenResourceError: for a stream, the connection is broken.
      trio.ClosedResourceError: for a stream, it is closed, or closes meanwhile. For AnyIO's streams
        these three are AnyIO's own.

    A checkpoint, always. If cancelled, it sends no more, and *progress* says how much was sent. It
    still waits until the memory may be reused, which can take long if the receiver does not read.
    Only a reset of the connection (``SO_LINGER`` of 0 seconds, then close) ends that wait sooner.

    Source: io_uring_prep_send_zc(3), io_uring_prep_sendmsg_zc(3).
    """
    check_progress(progress, ZeroCopyProgress)
    progress = progress or ZeroCopyProgress()
    add = sent_counter(progress)
    with ExitStack() as stack:
        blocks = [stack.enter_context(_bytes_of(block)) for block in data]
        sink = sink_of("stream", stream, stack)
        await checkpoint()
        manager, sock = current_ring("sockets"), sink.sock
        left = [block for block in blocks if len(block)]
        if manager is not None and isinstance(sock, TrioSocket):
            left = await _send(manager, sink, sock, left, progress)
        transfer = Transfer(None, add)
        for block in left:
            try:
                await send_block(sink, block, transfer)
            finally:
                progress.bytes_copied += transfer.moved
                transfer.moved = 0


def _bytes_of(data: Buffer) -> memoryview:
    check_readable("each of data", data)
    return memoryview(data).cast("B")


async def _send(
    manager: UringIOManager,
    sink: Sink,
    sock: TrioSocket,
    left: list[memoryview],
    progress: ZeroCopyProgress,
) -> list[memoryview]:
    """Send without a copy; return what remains to be sent with one."""
    with sink.errors():
        while left:
            operation = _operation(sock.fileno(), left[:_BUFFERS_MAX], progress)
            try:
                # A waiting send could occupy a kernel worker, see _socket.py.
                sent = await manager.perform(operation)
            except BlockingIOError:
                if sock.fileno() >= 0:  # if it was closed meanwhile, the next attempt raises
                    await sock.wait_writable()
            except OSError as exc:
                if exc.errno in _CANNOT:
                    break
                raise
            else:
                progress.bytes_sent += sent
                left = _without(left, sent)
    return left


def _operation(fd: int, blocks: Sequence[memoryview], progress: ZeroCopyProgress) -> Operation[int]:
    def on_copied(count: int) -> None:
        progress.bytes_copied += count

    if len(blocks) == 1:
        return operations.send_zc(fd, blocks[0], MSG_DONTWAIT, on_copied=on_copied)
    return operations.sendmsg_zc(fd, blocks, (), MSG_DONTWAIT, on_copied=on_copied)


def _without(blocks: list[memoryview], count: int) -> list[memoryview]:
    """Return *blocks* without their first *count* bytes."""
    for index, block in enumerate(blocks):
        if count < len(block):
            return [block[count:], *blocks[index + 1 :]]
        count -= len(block)
    return []
