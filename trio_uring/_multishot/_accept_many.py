"""`accept_many`: one multishot operation that accepts many connections.

The kernel has no limit for it: each time, it accepts all connections in the listener's backlog. So
the operation is stopped when *max_waiting* connections wait to be taken, and started again when all
of them were taken. After any error the next connection is accepted with
`trio.SocketListener.accept`, which meets the error again if it persists, and handles it as Trio
does. The same happens where the kernel does not support the operation.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
import warnings
from collections import deque
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
)

from trio_uring import _operations as operations
from trio_uring._arguments import check_int, check_type
from trio_uring._engine._io_manager import current_ring
from trio_uring._kernel import sockets as abi
from trio_uring._trio_private import TrioSocket

from ._multishot import MultishotOperation

if TYPE_CHECKING:
    from typing_extensions import Self

    from trio_uring._engine._io_manager import UringIOManager

_FLAGS: Final = abi.SOCK_CLOEXEC | abi.SOCK_NONBLOCK

# Accepted connections that wait to be taken. With half or double, a burst of connections is
# accepted as fast (benchmarks/bench_accept_many.py).
WAITING_MAX: Final = 64
# More fds than a process may have (fs.nr_open) cannot wait.
_WAITING_LIMIT: Final = 1 << 30


def accept_many(
    listener: trio.SocketListener, *, max_waiting: int = WAITING_MAX
) -> MultishotListener:
    """Accept connections before they are asked for, with one multishot operation.

    Without a ring, and where the kernel does not support the operation, each connection is accepted
    when it is asked for, with the same result.

    Args:
      listener: Belongs to the `MultishotListener` from then on, and is closed with it.
      max_waiting: When this many connections wait to be taken, accept no more until all of them
        were taken. More can wait, because the kernel accepts the whole backlog at once.

    Returns:
      A `trio.abc.Listener`, for ``async for``, `trio.serve_listeners`, or ``accept``.

    Raises:
      ValueError: *max_waiting* is less than 1.
      TypeError: *listener* is not a `trio.SocketListener`.
      RuntimeError: outside a run.

    Source: io_uring_prep_multishot_accept(3), accept(2).
    """
    expected = "a trio.SocketListener, one of those that trio.open_tcp_listeners returns"
    check_type("listener", listener, trio.SocketListener, expected)
    check_int("max_waiting", max_waiting, 1, _WAITING_LIMIT)
    return MultishotListener(listener, max_waiting)


class MultishotListener(trio.abc.Listener[trio.SocketStream]):
    """Made by `accept_many`. Iterating over it yields connections: `trio.SocketStream` objects."""

    _operation: _AcceptOperation | None = None

    def __init__(self, listener: trio.SocketListener, max_waiting: int) -> None:
        self._listener = listener
        manager = current_ring("sockets")
        if manager is not None and isinstance(listener.socket, TrioSocket):
            self._operation = _AcceptOperation(manager, listener.socket, max_waiting)

    @property
    def socket(self) -> trio.socket.SocketType:
        """The listening socket."""
        return self._listener.socket

    @property
    def waiting(self) -> int:
        """How many accepted connections wait to be taken."""
        return len(self._operation.fds) if self._operation is not None else 0

    @enable_ki_protection
    async def accept(self) -> trio.SocketStream:
        """Take the next connection; wait for one if none waits to be taken.

        Raises:
          OSError: as `trio.SocketListener.accept`, for example ``EMFILE``. Call it again later.
          trio.ClosedResourceError: the listener is closed, or closes while we wait.
          trio.BusyResourceError: another task is accepting.

        A checkpoint, always. If cancelled, no connection is lost: the next call takes it.
        """
        operation = self._operation
        if operation is None:
            return await self._listener.accept()
        await checkpoint_if_cancelled()
        if operation.fds:
            await cancel_shielded_checkpoint()
        while not operation.fds:
            if self.socket.fileno() == -1:
                raise trio.ClosedResourceError("this listener was closed")
            if operation.error is not None:
                error, operation.error = operation.error, None
                return await self._accept_after(error, operation)
            if not operation.armed:
                operation.begin()
            await operation.wait()
        return operation.take()

    async def _accept_after(
        self, error: OSError | trio.ClosedResourceError, operation: _AcceptOperation
    ) -> trio.SocketStream:
        """Accept a connection with Trio's listener, which handles *error* if it persists."""
        if isinstance(error, trio.ClosedResourceError):
            raise error
        stream = await self._listener.accept()
        if error.errno == errno.EINVAL:  # not the listener's fault: that has just accepted
            operation.unknown(error)
            self._operation = None
        return stream

    @enable_ki_protection
    async def stop(self) -> list[trio.SocketStream]:
        """Stop accepting. The listener stays open, and a later `accept` starts again.

        Returns:
          The connections that were accepted and not taken. Serve or close them.

        Raises:
          trio.BusyResourceError: another task is accepting.

        A checkpoint, always. If cancelled before it begins, nothing happened. Later it ignores
        cancellation.
        """
        await checkpoint()
        if self._operation is None:
            return []
        if self._operation.busy:
            raise trio.BusyResourceError("another task is accepting")
        await self._operation.stop_and_wait()
        return [self._operation.take() for _ in range(self.waiting)]

    @enable_ki_protection
    async def aclose(self) -> None:
        """Close the listener, and the connections that were accepted and not taken.

        Their peers see the same as if the connections had still been in the listener's backlog. To
        lose none, call `stop` first.
        """
        operation = self._operation
        if operation is not None:
            operation.discard()
        self._listener.socket.close()
        if operation is not None:
            operation.wake()
            await operation.stop_and_wait()
            operation.discard()
        await self._listener.aclose()

    def __del__(self) -> None:
        operation = self._operation
        if operation is not None and operation.in_use:
            warnings.warn("a MultishotListener was not closed", ResourceWarning, stacklevel=2)
            operation.forget()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> trio.SocketStream:
        return await self.accept()


class _AcceptOperation(MultishotOperation):
    def __init__(self, manager: UringIOManager, sock: TrioSocket, max_waiting: int) -> None:
        super().__init__(manager)
        self._sock = sock
        self._kind = (sock.family, sock.type, sock.proto)
        self._max_waiting = max_waiting
        self.fds: deque[int] = deque()
        self.error: OSError | trio.ClosedResourceError | None = None

    def begin(self) -> None:
        self.arm(operations.accept_multishot(self._sock.fileno(), self._accepted, _FLAGS))

    def _accepted(self, fd: int, _flags: int) -> None:
        self.fds.append(fd)
        if len(self.fds) == self._max_waiting:
            self.stop()
        self.wake()

    def last(self, res: int, flags: int) -> None:
        self._accepted(res, flags)

    def failed(self, exc: OSError | trio.ClosedResourceError) -> None:
        self.error = exc

    def unknown(self, exc: OSError) -> None:
        self._manager.ring.note_refused("ACCEPT_MULTISHOT", exc)

    def take(self) -> trio.SocketStream:
        fd = self.fds.popleft()
        try:
            sock = stdlib_socket.socket(*self._kind, fileno=fd)
        except BaseException:
            os.close(fd)
            raise
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    @property
    def in_use(self) -> bool:
        """Whether it accepts connections, or some wait to be taken."""
        return bool(self.fds) or (self.armed and not self._manager.ring.closed)

    def __del__(self) -> None:
        self.discard()

    def dispose(self) -> None:
        self.discard()

    def discard(self) -> None:
        while self.fds:
            os.close(self.fds.popleft())
