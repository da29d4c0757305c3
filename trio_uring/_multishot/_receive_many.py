"""`receive_many`: one multishot operation that receives many times, into buffers that it lends out.

Each receiver has its own buffer group. So the kernel enforces the limit: when all buffers of the
group are in use, the operation ends with ``ENOBUFS``, and further data stays in the socket until
buffers are given back and the operation is started again. And no receiver can use up the buffers of
another one, however much its peer sends or however long its leases are kept.

Between two such operations no other task may receive from the socket, or data would be reordered.
An `FdReservation` prevents that.
"""

from __future__ import annotations

import errno
import warnings
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import (
    ParkingLot,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    current_trio_token,
    enable_ki_protection,
)

from trio_uring import _operations as operations
from trio_uring._arguments import check_int
from trio_uring._engine._fd_waiters import FdReservation
from trio_uring._engine._io_manager import current_ring
from trio_uring._lease import Lease
from trio_uring._streams._endpoints import source_of
from trio_uring._trio_private import TrioSocket, at_cancel_point

from ._multishot import MultishotOperation

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

    from trio_uring._engine._buffer_pool import BufferPool
    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._streams._endpoints import ReceivesBytes, Source

# The buffers of one receiver: 1 MiB at most, and only used pages occupy memory. With half as many
# buffers, a stream of large messages costs a quarter more. With smaller buffers, it costs
# twice as much, because it comes in more pieces (benchmarks/bench_receive_many.py).
BUFFERS: Final = 16
BUFFER_SIZE: Final = 65536
_BUFFERS_MAX: Final = 32768  # the kernel's limit for a buffer group
_SIZE_MAX: Final = 1 << 20


def receive_many(
    stream: trio.abc.ReceiveStream | trio.socket.SocketType | ReceivesBytes,
    *,
    max_buffers: int = BUFFERS,
    buffer_size: int = BUFFER_SIZE,
) -> ReceivedLeases:
    """Receive data before it is asked for, with one multishot operation and without a copy.

    The data is lent out in the buffers that the kernel wrote it to. This works for a
    `trio.SocketStream`, a trio socket, and AnyIO's TCP and UNIX streams. For other streams, without
    a ring, and where the kernel does not support the operation, data is received when it is asked
    for, with the same result.

    Args:
      stream: A stream of Trio's or AnyIO's, or a trio socket. A socket must be of type
        ``SOCK_STREAM``, and connected. The caller closes it. Until the block is left nobody else
        may receive from it.
      max_buffers: How many buffers this receiver has, 1 to 32768. When all hold data, taken or not,
        it receives no more: further data stays in the socket.
      buffer_size: In bytes, 1 to 1 MiB.

    Returns:
      A `trio.abc.ReceiveChannel` of `ReceivedLease`, to be used with ``async with``.

    Raises:
      ValueError: a number is out of range, or the socket is of another type.
      TypeError: *stream* is not a stream.
      RuntimeError: outside a run.

    Source: io_uring_prep_recv_multishot(3), io_uring_setup_buf_ring(3).
    """
    check_int("max_buffers", max_buffers, 1, _BUFFERS_MAX)
    check_int("buffer_size", buffer_size, 1, _SIZE_MAX)
    stack = ExitStack()
    return ReceivedLeases(source_of("stream", stream, stack), stack, max_buffers, buffer_size)


class ReceivedLease(Lease):
    """Received data, at least one byte, yours until you `release` it; use ``with``.

    Its memory is read-only. It may be used after the block that it was received in, and after the
    run.
    """

    __slots__ = ("_flags", "_leases")

    def __init__(self, leases: ReceivedLeases, memory: memoryview, flags: int) -> None:
        super().__init__(memory)
        self._leases = leases
        self._flags = flags

    def _give_back(self) -> None:
        self._leases.take_back(self._flags)

    def _forgotten(self, views: int) -> None:
        self._leases.forgotten(self._flags, views)


class ReceivedLeases(trio.abc.ReceiveChannel[ReceivedLease]):
    """Made by `receive_many`. Iterating over it yields `ReceivedLease` objects until the end."""

    _operation: _ReceiveOperation | None = None

    def __init__(
        self, source: Source, stack: ExitStack, max_buffers: int, buffer_size: int
    ) -> None:
        self._source = source
        self._stack = stack
        self._max_buffers = max_buffers
        self._size = buffer_size
        self._leased = 0
        self._stay_lent = 0  # those that were forgotten, and something used their memory
        self._unread = b""
        self._closed = False
        self._error_raised = False
        self._given_back = ParkingLot()
        self._receiving: trio.CancelScope | None = None
        manager = current_ring("sockets")
        self._token = current_trio_token()
        if manager is not None and isinstance(source.sock, TrioSocket):
            self._operation = _ReceiveOperation(manager, source.sock, max_buffers, buffer_size)

    @property
    def leased(self) -> int:
        """How many leases were taken and not given back."""
        return self._leased

    @property
    def unread(self) -> bytes:
        """The data that was received and not taken when the block was left.

        It comes before what is still in the stream.
        """
        return self._unread

    @enable_ki_protection
    async def receive(self) -> ReceivedLease:
        """Take the next received data; wait if there is none yet.

        If *max_buffers* leases are taken, it waits until one of them is given back.

        Raises:
          trio.EndOfChannel: the stream has ended.
          trio.BrokenResourceError: the connection is broken.

        A checkpoint, always. If cancelled, no data is lost: the next call takes it.
        """
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        if self._operation is not None and self._operation.queue:
            await cancel_shielded_checkpoint()
        while (operation := self._operation) is not None:
            lease = self._next(operation)
            if lease is not None:
                return lease
            if self._operation is operation:
                await operation.wait()
        return await self._receive_plainly()

    @enable_ki_protection
    def receive_nowait(self) -> ReceivedLease:
        """Take the next received data without waiting. No checkpoint.

        Raises:
          trio.WouldBlock: no data waits to be taken.
          trio.EndOfChannel: this and the other errors are as for `receive`.
        """
        lease = self._next(self._operation) if self._operation is not None else None
        if lease is None:
            self._check_open()
            raise trio.WouldBlock
        return lease

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this receive_many block was left")

    def _next(self, operation: _ReceiveOperation) -> ReceivedLease | None:
        """Return the next lease, if there is one; start the operation again if need be."""
        self._check_open()
        if not operation.armed:
            with self._source.errors():
                if not operation.begin(self._leased):
                    self._operation = None
                    return None
        if operation.queue:
            res, flags = operation.queue.popleft()
            self._leased += 1
            return ReceivedLease(self, operation.view(res, flags), flags)
        if operation.error is not None:
            self._error_raised = True
            with self._source.errors():
                raise operation.error
        if operation.ended:
            raise trio.EndOfChannel
        return None

    async def _receive_plainly(self) -> ReceivedLease:
        self._check_open()
        if self._receiving is not None:
            raise trio.BusyResourceError("another task is receiving already")
        received: Buffer = b""
        try:
            with trio.CancelScope() as self._receiving:
                while self._leased == self._max_buffers:
                    await self._given_back.park()
                received = await self._source.receive_some(self._size)
        finally:
            self._receiving = None
        data = memoryview(received).toreadonly()
        if not data:
            self._check_open()
            raise trio.EndOfChannel
        self._leased += 1
        return ReceivedLease(self, data, 0)

    def take_back(self, flags: int) -> None:
        """Take a buffer back. Called by `ReceivedLease`."""
        self._leased -= 1
        if self._operation is not None:
            self._operation.give_back(flags)
        elif self._given_back:
            self._given_back.unpark()

    def forgotten(self, flags: int, views: int) -> None:
        """Take a buffer back soon, if nothing uses it. Called by the finalizer of a lease.

        Args:
          flags: Of the completion.
          views: How many memoryviews there are of the memory of all buffers. There is one of the
            whole, and one of each other lease.
        """
        if self._operation is not None and views > self._leased - self._stay_lent:
            self._stay_lent += 1
            return
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.take_back, flags)

    def __del__(self) -> None:
        operation = self._operation
        if operation is not None and operation.in_use:
            warnings.warn("a receive_many block was not left", ResourceWarning, stacklevel=2)
            self._stack.close()
            operation.forget()

    @enable_ki_protection
    async def aclose(self) -> None:
        """Stop receiving. The data that was received and not taken is in `unread` then.

        The stream stays open. A checkpoint, always. If cancelled, it stops all the same.
        """
        if not self._closed:
            self._closed = True
            if self._receiving is not None:
                self._receiving.cancel()
            if self._operation is not None:
                self._operation.wake()
                await self._operation.stop_and_wait()
                self._unread = self._operation.finish()
            self._stack.close()
        await checkpoint()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Call `aclose`.

        Raises:
          trio.BrokenResourceError: the connection is broken, and `receive` has not raised this yet.
            The stream itself would not raise it again. Other errors likewise.
        """
        await self.aclose()
        error = self._operation.error if self._operation is not None else None
        if exc is None and isinstance(error, OSError) and not self._error_raised:
            with self._source.errors():
                raise error


class _ReceiveOperation(MultishotOperation):
    def __init__(
        self, manager: UringIOManager, sock: TrioSocket, max_buffers: int, buffer_size: int
    ) -> None:
        super().__init__(manager)
        self._sock = sock
        self._max_buffers = max_buffers
        self._size = buffer_size
        self._pool: BufferPool | None = None
        self._reservation: FdReservation | None = None
        self.queue: deque[tuple[int, int]] = deque()  # res and flags
        self.ended = False
        self.error: OSError | trio.ClosedResourceError | None = None

    def begin(self, leased: int) -> bool:
        """Start the operation if it can receive now; False if the kernel does not support it."""
        error = self.error
        if isinstance(error, OSError) and error.errno == errno.EINVAL and not self.queue:
            self._refused("RECV_MULTISHOT", error)
            return False
        fd = self._sock.fileno()
        if fd == -1:
            raise trio.ClosedResourceError("this stream was closed")
        # Start again when half of the buffers are free, or no data is left to take: not for each
        # buffer that is given back.
        free = self._max_buffers - leased - len(self.queue)
        if self.ended or error is not None or not free:
            return True
        if self.queue and free * 2 < self._max_buffers:
            return True
        pool = self._pool or self._open_pool(fd)
        if pool is not None:
            self.arm(operations.recv_multishot(fd, pool, self._received, exclusive=None))
        return pool is not None

    def _open_pool(self, fd: int) -> BufferPool | None:
        try:
            pool = self._manager.pools.open(self._max_buffers, self._size)
        except OSError as exc:  # EINVAL before Linux 5.19; ENOMEM
            self._refused("PBUF_RING", exc)
            return None
        whole = operations.recv_multishot(fd, pool, self._received)
        reservation = FdReservation(whole, self.wake)
        try:
            self._manager.fd_waiters.register(reservation)
        except BaseException:
            self._manager.pools.close(pool)
            raise
        self._pool, self._reservation = pool, reservation
        return pool

    def _refused(self, what: str, exc: OSError) -> None:
        self._manager.ring.note_refused(what, exc)
        self.finish()

    def _received(self, res: int, flags: int) -> None:
        self.queue.append((res, flags))
        self.wake()

    def last(self, res: int, flags: int) -> None:
        if res:
            self.queue.append((res, flags))
        else:
            self.give_back(flags)
            self.ended = True

    def failed(self, exc: OSError | trio.ClosedResourceError) -> None:
        if not isinstance(exc, OSError) or exc.errno != errno.ENOBUFS:
            self.error = exc

    @property
    def in_use(self) -> bool:
        """Whether it has buffers, and so the socket to itself."""
        return self._pool is not None and not self._manager.ring.closed

    def let_go(self) -> None:
        self._unreserve()
        super().let_go()

    def dispose(self) -> None:
        self.finish()

    def view(self, res: int, flags: int) -> memoryview:
        assert self._pool is not None
        return self._pool.view(res, flags)

    def give_back(self, flags: int) -> None:
        if self._pool is not None and not self._manager.ring.closed:
            self._pool.give_back(flags)
            if not self.armed:
                self.wake()

    def finish(self) -> bytes:
        """Release the socket and the buffers; return the data that was not taken."""
        pool, self._pool = self._pool, None
        if pool is None or not self._manager.ring.usable:  # the run crashed
            return b""
        unread = b"".join([pool.view(res, flags) for res, flags in self.queue])
        self.queue.clear()
        self._unreserve()
        self._manager.pools.close(pool)
        return unread

    def _unreserve(self) -> None:
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            self._manager.fd_waiters.unregister(reservation)
