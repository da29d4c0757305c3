"""`relay`: from a socket into another, inside the kernel: socket → pipe → socket."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import attrs
from trio.lowlevel import checkpoint, enable_ki_protection

from trio_uring._streams._endpoints import ring_for_splices, sink_of, source_of

from ._send_file import SendProgress, sent_counter
from ._splice_pipes import current_pipes
from ._transfer import Transfer, check_range, empty_into, fill_from

if TYPE_CHECKING:
    import trio

    from trio_uring._streams._endpoints import ReceivesBytes, SendsBytes, Sink, Source

# What is received at once, where there is no splice: what Trio's streams ask for.
_BLOCK_SIZE: Final = 1 << 16
# While less than this comes at a time, it is received and sent: that is one operation each, and
# a splice has to wait for readiness first. Messages of 100 bytes come through a fifth faster then
# (benchmarks/bench_splice.py).
_SPLICE_MIN: Final = 1 << 14


@attrs.define
class RelayProgress(SendProgress):
    """How far `relay` has come; also valid when it was cancelled, or failed.

    Args:
      bytes_sent: As in `SendProgress`.
      left: What came out of the source and did not go into the destination, because it was
        cancelled, or the destination broke; otherwise empty. Whoever goes on sends it first.
        It is added to what is there already. If the destination is no socket, some of it may
        have gone.
    """

    left: bytes = b""


@enable_ki_protection
async def relay(
    source: trio.abc.ReceiveStream | trio.socket.SocketType | ReceivesBytes,
    destination: trio.abc.SendStream | trio.socket.SocketType | SendsBytes,
    *,
    count: int | None = None,
    progress: RelayProgress | None = None,
) -> int:
    """Send on what *source* receives: up to its end, or so many bytes.

    Between two of `trio.SocketStream`, trio sockets and AnyIO's TCP and UNIX streams the bytes do
    not leave the kernel, in a run on the ring. Between others, such as a `trio.SSLStream`, and in
    runs without a ring, they are received and sent, with the same result; so are small messages.

    One direction only, and it ends with the source: to pass the end on, call *destination*'s
    ``send_eof``. A proxy runs two, one each way.

    Args:
      source: Where from: a stream of Trio's or AnyIO's, or a trio socket. That must be of type
        ``SOCK_STREAM``, and connected.
      destination: Where to, likewise.
      count: How many bytes to move; None: all up to the end of *source*. Not one byte more is
        taken out of it.
      progress: Is kept up to date with the bytes sent; see `RelayProgress`.

    Returns:
      The number of bytes sent: fewer than *count* only where *source* ends before.

    Raises:
      ValueError: *count* is negative, or a socket is of another type.
      TypeError: an argument is no stream.
      OSError: for a socket, as its ``recv`` or ``send``.
      trio.BusyResourceError: another task waits to receive from *source*, or sends on
        *destination*, also while this one waits for *source*.
      trio.BrokenResourceError: for a stream, the connection is broken.
      trio.ClosedResourceError: for a stream, it was closed, also meanwhile. For AnyIO's streams
        these three are AnyIO's own.

    A checkpoint, always. If cancelled, *progress* says how many bytes are gone, and has those
    that were on the way: none is lost.

    Source: splice(2), pipe(7).
    """
    check_range(0, count)
    progress = progress or RelayProgress()
    transfer = Transfer(count, sent_counter(progress))
    with ExitStack() as stack:
        from_, to = source_of(source, stack), sink_of(destination, stack)
        await checkpoint()
        splices = ring_for_splices(files=False) is not None and from_.splices and to.splices
        size = _SPLICE_MIN  # of what came last
        while size and not transfer.done:
            step = _splice_some if splices and size >= _SPLICE_MIN else _receive_and_send
            size = await step(from_, to, transfer, progress)
        return transfer.moved


async def _splice_some(
    source: Source, sink: Sink, transfer: Transfer, progress: RelayProgress
) -> int:
    """Move what is there; returns how much that is, and 0 at the end."""
    await source.wait_readable()
    with current_pipes().lent() as pipe:
        count = 0 if pipe is None else fill_from(source, pipe, transfer)
        if pipe is not None and count:
            try:
                await empty_into(sink, pipe, transfer)
            except BaseException:
                progress.left += pipe.take_rest()
                raise
    return count or await _receive_and_send(source, sink, transfer, progress)


async def _receive_and_send(
    source: Source, sink: Sink, transfer: Transfer, progress: RelayProgress
) -> int:
    left = memoryview(await source.receive_some(transfer.next(_BLOCK_SIZE)))
    size = len(left)
    try:
        while left:
            sent = await sink.send_some(left)
            transfer.add(sent)
            left = left[sent:]
    except BaseException:
        progress.left += bytes(left)
        raise
    return size
