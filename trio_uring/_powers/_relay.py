"""`relay`: from a socket into another, inside the kernel: socket → pipe → socket."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import attrs
from trio.lowlevel import checkpoint, enable_ki_protection

from ._ends import ring_for_splices, sink_of, source_of
from ._pipes import current_pipes
from ._send_file import SendProgress, sent_counter
from ._transfer import Transfer, check_range, empty_into, fill_from

if TYPE_CHECKING:
    import trio

    from ._ends import ReceivesBytes, SendsBytes, Sink, Source

# What is received at once, where there is no splice: what Trio's streams ask for.
_BLOCK_SIZE = 1 << 16


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

    Between two of `trio.SocketStream`, trio sockets and AnyIO's TCP and UNIX streams the bytes
    never leave the kernel, in a run on the ring. Between others, such as a `trio.SSLStream`, and
    in runs without a ring, they are received and sent, with the same result.

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
        spliceable = ring_for_splices(files=False) is not None and from_.splices and to.splices
        step = _splice_some if spliceable else _receive_and_send
        while not transfer.done and await step(from_, to, transfer, progress):
            pass
        return transfer.moved


async def _splice_some(
    source: Source, sink: Sink, transfer: Transfer, progress: RelayProgress
) -> bool:
    """Move what is there; False at the end."""
    await source.wait_readable()
    with current_pipes().lent() as pipe:
        if pipe is None:
            return await _receive_and_send(source, sink, transfer, progress)
        count = fill_from(source, pipe, transfer)
        try:
            await empty_into(sink, pipe, transfer)
        except BaseException:
            progress.left += pipe.take_rest()
            raise
        return count != 0


async def _receive_and_send(
    source: Source, sink: Sink, transfer: Transfer, progress: RelayProgress
) -> bool:
    left = memoryview(await source.receive_some(transfer.next(_BLOCK_SIZE)))
    more = len(left) > 0
    try:
        while left:
            sent = await sink.send_some(left)
            transfer.add(sent)
            left = left[sent:]
    except BaseException:
        progress.left += bytes(left)
        raise
    return more
