"""`relay`: move bytes from one socket into another inside the kernel: socket → pipe → socket."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import attrs
from trio.lowlevel import checkpoint, enable_ki_protection

from trio_uring._streams._endpoints import ring_for_splices, sink_of, source_of

from ._send_file import SendProgress, sent_counter
from ._splice_pipes import current_pipes
from ._transfer import Transfer, check_progress, check_range, empty_into, fill_from

if TYPE_CHECKING:
    import trio

    from trio_uring._streams._endpoints import ReceivesBytes, SendsBytes, Sink, Source

# How much is received at once where there is no splice: as Trio's streams do.
_BLOCK_SIZE: Final = 1 << 16
# While less than this comes at a time, it is received and sent. That takes one operation each; a
# splice must wait for readiness first. Messages of 100 bytes are a fifth faster this way
# (benchmarks/bench_splice.py).
_SPLICE_MIN: Final = 1 << 14


@attrs.define
class RelayProgress(SendProgress):
    """How far `relay` has come; also valid when it was cancelled or failed.

    Args:
      bytes_sent: As in `SendProgress`.
      left: Data that was received and not sent, because `relay` was cancelled or the destination
        broke; otherwise empty. To continue, send it first. It is appended to what is there
        already. If the destination is not a socket, a part of it may have been sent.
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
    """Receive from *source* and send to *destination*: up to the end, or *count* bytes.

    Between `trio.SocketStream`, trio sockets, and AnyIO's TCP and UNIX streams, the bytes stay in
    the kernel. This needs a run on the ring. For other streams, such as a `trio.SSLStream`, without
    a ring, and for small messages, the data is received and sent, with the same result.

    It moves data in one direction. To pass on the end of *source*, call *destination*'s
    ``send_eof`` afterwards. A proxy runs two of these, one for each direction.

    Args:
      source: A stream of Trio's or AnyIO's, or a trio socket. A socket must be of type
        ``SOCK_STREAM``, and connected.
      destination: Likewise.
      count: How many bytes to move; None for all up to the end of *source*. Never more than this
        is taken out of *source*.
      progress: Is kept up to date with the bytes sent; see `RelayProgress`.

    Returns:
      The number of bytes sent: fewer than *count* only if *source* ends before.

    Raises:
      ValueError: *count* is negative, or a socket is of another type.
      TypeError: an argument is not a stream.
      OSError: for a socket, as its ``recv`` or ``send``.
      trio.BusyResourceError: another task waits to receive from *source*, or sends on
        *destination*. The latter also while this one waits for *source*.
      trio.BrokenResourceError: for a stream, the connection is broken.
      trio.ClosedResourceError: for a stream, it is closed, or closes meanwhile. For AnyIO's streams
        these three are AnyIO's own.

    A checkpoint, always. If cancelled, no data is lost: *progress* says how many bytes were sent,
    and holds those that were received and not sent.

    Source: splice(2), pipe(7).
    """
    check_range(0, count)
    check_progress(progress, RelayProgress)
    progress = progress or RelayProgress()
    transfer = Transfer(count, sent_counter(progress))
    with ExitStack() as stack:
        from_ = source_of("source", source, stack)
        to = sink_of("destination", destination, stack)
        await checkpoint()
        splices = ring_for_splices(files=False) is not None and from_.splices and to.splices
        size = _SPLICE_MIN  # of the last step
        while size and not transfer.done:
            step = _splice_some if splices and size >= _SPLICE_MIN else _receive_and_send
            size = await step(from_, to, transfer, progress)
        return transfer.moved


async def _splice_some(
    source: Source, sink: Sink, transfer: Transfer, progress: RelayProgress
) -> int:
    """Move what is available; return how many bytes, and 0 at the end."""
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
