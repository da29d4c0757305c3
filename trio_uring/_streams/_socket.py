"""`UringSocket`: a Trio socket whose operations complete on the ring.

Receives from streams use the ring, and so does everything that is sent, except by `sendto`. All
else calls Trio's own method, which calls the standard library, so that semantics and exceptions are
exactly the same: an unusual address family or flag, a wrong argument, a closed socket, a send to a
full socket. So does every call in a run without a ring.

Why datagrams and connections are received by Trio's methods
------------------------------------------------------------

Facts. A RECV, RECVMSG or ACCEPT that waits is tried again when poll reports the socket as readable.
If this fails 128 times (a wrong checksum, an unread error queue, another process that was faster),
the kernel hands the operation to a worker (APOLL_MAX_RETRY in io_uring/poll.c). There RECVMSG and
ACCEPT fail with EAGAIN, and RECV blocks the worker until something arrives. Besides, an ACCEPT in
flight is an exclusive waiter: the kernel may give a connection to a process that computes while
another one is idle. If a process is killed with an ACCEPT in flight, its port stays in use for a
while. (Linux 6.18)

What does this mean for us? Anybody can send bad datagrams, and urgent bytes. So we wait in the
kernel only by its poll: for readiness, with epoll, or in a multishot receive, which is never handed
to a worker. A multishot receive with a limit on its bytes receives no more than asked for. It
exists only for streams. If the kernel doesn't have it, Trio's method receives from streams too.

Why `sendto` does not use the ring
----------------------------------

Facts. A datagram server usually answers one datagram after the other, in one task. On the ring,
each answer takes a loop iteration, and encoding an address takes longer than in Python's socket.
Such a server took 1.5 times the CPU time of plain Trio. With system calls, as many in one loop
iteration as its turn budget allows, it takes 0.43 (benchmarks/bench_sockets.py).

What does this mean for us? `sendto` calls Python's socket at once. A send without an address uses
the ring, because many tasks send that way in the same iteration, with one system call.

Calls that begin in the same loop iteration
-------------------------------------------

Facts. Trio's methods make the system call at once, and wait only if it fails with EAGAIN. Here an
operation is only pushed, and the kernel performs it at the end of the loop iteration, in order.

What does this mean for us? If two receives from one stream begin in the same iteration, the second
raises `trio.BusyResourceError`, even if there is data for both. Direct system calls in an iteration
happen before the sends of the same iteration. `shutdown`, `close` and `detach` submit those sends
first.

What programs replace and watch
-------------------------------

Facts. Test suites and sandboxes replace methods of `socket.socket`, such as ``connect``, to forbid
connections. Trio's methods look up ``connect``, ``sendto`` and ``sendmsg`` at each call, and no
others. Python raises an audit event in each of these three.

What does this mean for us? `connect` and `sendmsg` use the ring only if Python's method is still
the one in C, and raise its event. `sendto` looks up the method too.

`close` is Trio's method. It calls `notify_closing`, which ends what is in flight before the fd is
closed.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
)

from trio_uring import _operations as operations
from trio_uring._engine._buffer_pool import RECEIVE_BUFFER_SIZE
from trio_uring._engine._io_manager import UringIOManager, current_ring
from trio_uring._kernel import sockets as abi
from trio_uring._trio_private import TrioSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from types import TracebackType
    from typing import Concatenate

    from typing_extensions import Buffer, ParamSpec

    P = ParamSpec("P")
    WaitFn = Callable[[stdlib_socket.socket], Awaitable[None]]

T = TypeVar("T")

# The flags that are supported on the ring. Others, such as MSG_DONTWAIT, need the system call.
_SEND_FLAGS: Final = abi.MSG_NOSIGNAL | abi.MSG_MORE | abi.MSG_DONTROUTE
_INTERNET: Final = (abi.AF_INET, abi.AF_INET6)

# No data was received, though there may be some: no provided buffer was left, or another process
# received it.
_NOT_RECEIVED: Final = (errno.ENOBUFS, errno.EAGAIN)

# Errors of a connection attempt that has begun. Trio adds the address to their messages.
_LATE_CONNECT_ERRORS: Final = frozenset(
    (errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH)
)

# A socket made with this type is non-blocking, which saves the call that makes it so.
_NONBLOCKING_STREAM: Final = abi.SOCK_STREAM | abi.SOCK_NONBLOCK

# The C properties return numbers. Those of Python's class convert them to enums, which is slow.
_C_SOCKET: Final = vars(stdlib_socket.SocketType)
_family: Final[Callable[[stdlib_socket.socket], int]] = _C_SOCKET["family"].__get__
_proto: Final[Callable[[stdlib_socket.socket], int]] = _C_SOCKET["proto"].__get__

_connect: Final = _C_SOCKET["connect"]
_sendmsg: Final = _C_SOCKET["sendmsg"]

_NOT_PLAIN: Final = (TypeError, ValueError, BufferError, OverflowError)


def _only(flags: object, allowed: int) -> bool:
    return isinstance(flags, int) and not flags & ~allowed


class UringSocket(TrioSocket):
    """A Trio socket whose operations complete on the ring, in a run that has one."""

    is_stream: bool = False  # set by the first receive: see _native.py

    # ---- Receiving -------------------------------------------------------------------------

    async def recv(self, buflen: int, flags: int = 0, /) -> bytes:
        """Like :meth:`socket.socket.recv`, but async."""
        if type(buflen) is not int or type(flags) is not int:  # 3.0 equals 3, but is an error
            return await super().recv(buflen, flags)
        manager = current_ring("sockets")
        key = (manager, self._sock.fileno(), buflen, flags)
        if key != self._receive_key:
            self._receive_key, self._receive = key, self._recv_operation(*key)
        if manager is None or self._receive is None:
            return await super().recv(buflen, flags)
        try:
            return await manager.perform(self._receive)
        except OSError as exc:
            if exc.errno not in _NOT_RECEIVED:
                raise
        return await self.recv_directly(buflen)

    async def recv_directly(self, buflen: int) -> bytes:
        """Receive by the system call, after a receive on the ring that got no data.

        More receives completed at once than there are provided buffers, so the data is still in the
        socket. Another attempt on the ring could find no buffer again and again. The socket may
        have been closed meanwhile, and then the system call fails, as in Trio.
        """
        while True:
            try:
                return self._sock.recv(buflen)
            except BlockingIOError:
                pass
            await trio.lowlevel.wait_readable(self._sock)

    # A program tends to repeat the same receive. Reusing its operation saves a tenth of the cost of
    # a receive (benchmarks/bench_sockets.py). This is safe, because the operation has no buffer of
    # its own, and only one receive can be in flight.
    _receive_key: object = None
    _receive: operations.Operation[bytes] | None = None

    def _recv_operation(
        self, manager: UringIOManager | None, fd: int, size: int, flags: int
    ) -> operations.Operation[bytes] | None:
        """Return the operation for recv; None if Trio's method must be called."""
        if manager is None or fd < 0 or not 0 < size <= RECEIVE_BUFFER_SIZE or flags:
            return None
        if self._sock.type != stdlib_socket.SOCK_STREAM:
            return None
        buffers = manager.stream_buffers
        return None if buffers is None else operations.recv_once(fd, buffers, size)

    # ---- Sending ---------------------------------------------------------------------------
    #
    # A send never waits in the kernel. If the peer has shut down its side and the socket is full,
    # the kernel's poll reports POLLRDHUP again and again, and the send ends in a kernel worker.
    # 40 such sends occupy all workers and block all other operations there (Linux 6.18). So sends
    # have MSG_DONTWAIT. If the socket is full, Trio's method waits until it is writable, and sends.

    async def send(self, bytes: Buffer, flags: int = 0, /) -> int:
        """Like :meth:`socket.socket.send`, but async."""
        manager = current_ring("sockets")
        fd = self._sock.fileno()
        if manager is not None and fd >= 0 and _only(flags, _SEND_FLAGS):
            if manager.is_quiet():
                manager.sent_now += 1
                return await super().send(bytes, flags | abi.MSG_NOSIGNAL)  # as an operation
            try:
                operation = operations.send(fd, bytes, flags | abi.MSG_DONTWAIT)
            except _NOT_PLAIN:
                pass
            else:
                try:
                    return await manager.perform(operation)
                except BlockingIOError:
                    pass
        return await super().send(bytes, flags)

    async def sendto(self, *args: Any) -> int:  # noqa: ANN401 (Trio's signature)
        """Like :meth:`socket.socket.sendto`, but async."""
        if self.is_resolved(args[-1] if args else None):
            sendto = stdlib_socket.socket.sendto
            return await self._nonblocking_helper(trio.lowlevel.wait_writable, sendto, *args)
        return await super().sendto(*args)

    def is_resolved(self, address: object) -> bool:
        """Whether *address* is a numeric IP address and a port, so it need not be resolved."""
        if type(address) is not tuple or len(address) != 2:
            return False
        host, port = address
        if type(host) is not str or type(port) is not int:
            return False
        try:
            stdlib_socket.inet_pton(_family(self._sock), host)
        except (OSError, ValueError):  # not numeric, or not an internet socket
            return False
        return True

    async def sendmsg(
        self,
        buffers: Iterable[Buffer],
        ancdata: Iterable[tuple[int, int, Buffer]] = (),
        flags: int = 0,
        address: object = None,
        /,
    ) -> int:
        """Like :meth:`socket.socket.sendmsg`, but async."""
        manager = current_ring("sockets")
        intact = stdlib_socket.socket.sendmsg is _sendmsg
        if manager is not None and self._sock.fileno() >= 0 and intact:
            buffers = _materialised(buffers)
            ancdata = _materialised(ancdata)
            raw: bytes | None = b""
            if address is not None:
                address = await self._resolve_address_nocp(address, local=False)
                raw = operations.encode_sockaddr(self.family, address)
            if raw is not None:
                sent = await self._sendmsg(manager, buffers, ancdata, flags, address, raw)
                if sent is not None:
                    return sent
        return await super().sendmsg(buffers, ancdata, flags, address)

    async def _sendmsg(
        self,
        manager: UringIOManager,
        buffers: Iterable[Buffer],
        ancillary: Iterable[tuple[int, int, Buffer]],
        flags: int,
        address: object,
        raw_address: bytes,
    ) -> int | None:
        """Send one message. Return None if Trio's method must be called."""
        if not _only(flags, _SEND_FLAGS):
            return None
        try:
            operation = operations.sendmsg(
                self._sock.fileno(), buffers, ancillary, flags | abi.MSG_DONTWAIT, raw_address
            )
        except _NOT_PLAIN:
            return None
        sys.audit("socket.sendmsg", self._sock, address)
        try:
            return await manager.perform(operation)
        except BlockingIOError:
            return None

    # ---- Calls of the standard library -----------------------------------------------------

    async def _nonblocking_helper(
        self,
        wait_fn: WaitFn,
        fn: Callable[Concatenate[stdlib_socket.socket, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call *fn*, and again after each *wait_fn*, until it does not raise BlockingIOError.

        Trio's methods call this. Trio's own is slower, and always executes a schedule point after
        a call that need not wait; see `TurnBudget`.
        """
        manager = current_ring("sockets")
        if manager is None:
            return await super()._nonblocking_helper(wait_fn, fn, *args, **kwargs)
        await checkpoint_if_cancelled()
        try:
            result = fn(self._sock, *args, **kwargs)
        except BlockingIOError:
            pass  # waiting here would make it the context of later errors
        except BaseException:
            await cancel_shielded_checkpoint()
            raise
        else:
            if not manager.turn_budget.skip_schedule_point():
                await cancel_shielded_checkpoint()
            return result
        return await self.call_when_ready(wait_fn, fn, *args, **kwargs)

    async def call_when_ready(
        self,
        wait_fn: WaitFn,
        fn: Callable[Concatenate[stdlib_socket.socket, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call *fn* after each *wait_fn*, until it does not raise BlockingIOError."""
        while True:
            await wait_fn(self._sock)
            try:
                return fn(self._sock, *args, **kwargs)
            except BlockingIOError:
                pass

    # ---- Connections -----------------------------------------------------------------------

    @enable_ki_protection
    async def accept(self) -> tuple[trio.socket.SocketType, Any]:
        """Like :meth:`socket.socket.accept`, but async.

        Trio's method, protected against Ctrl-C between the system call and making the socket, which
        would lose the fd.
        """
        connection, address = await super().accept()
        if isinstance(connection, UringSocket):
            self.is_stream = self.is_stream or self.type == stdlib_socket.SOCK_STREAM
            connection.is_stream = self.is_stream
        return connection, address

    def stream_connection(self, fd: int) -> UringSocket:
        """Return a socket for *fd*, a non-blocking connection that this stream listener accepted.

        The socket owns *fd*. If this fails, *fd* is closed.
        """
        own = self._sock
        try:
            sock = stdlib_socket.socket(_family(own), _NONBLOCKING_STREAM, _proto(own), fd)
        except BaseException:
            os.close(fd)
            raise
        connection = UringSocket(sock)
        connection.is_stream = True
        return connection

    async def connect(self, address: object) -> None:
        """Like :meth:`socket.socket.connect`, but async.

        If cancelled, the socket is closed, because the attempt to connect cannot be undone.
        """
        manager = current_ring("sockets")
        intact = type(self._sock).connect is _connect
        if manager is None or self._sock.fileno() < 0 or not intact:
            return await super().connect(address)
        try:
            address = await self._resolve_address_nocp(address, local=False)
            raw = operations.encode_sockaddr(self.family, address)
            if raw is None:
                return await super().connect(address)
            credentials = manager.ring.credentials
            if credentials is not None and credentials.changed:
                return await super().connect(address)
            sys.audit("socket.connect", self._sock, address)
            await manager.perform(operations.connect(self._sock.fileno(), raw))
        except trio.Cancelled:
            self.close()
            raise
        except OSError as exc:
            code = exc.errno
            if code not in _LATE_CONNECT_ERRORS or self.family not in _INTERNET:
                raise
            raise OSError(code, f"Error connecting to {address!r}: {exc.strerror}") from None

    # ---- Closing ---------------------------------------------------------------------------

    def shutdown(self, flag: int) -> None:
        """Like :meth:`socket.socket.shutdown`. Sends that have begun are submitted first."""
        if self._sock.fileno() >= 0 and trio.lowlevel.in_trio_run():
            manager = current_ring("sockets")
            if manager is not None:
                manager.submit_for(self._sock.fileno())
        super().shutdown(flag)

    def detach(self) -> int:
        """Like :meth:`socket.socket.detach`.

        Ends the operations in flight. They would receive data that is meant for the new owner.
        """
        open_in_run = self._sock.fileno() >= 0 and trio.lowlevel.in_trio_run()
        if open_in_run and current_ring("sockets") is not None:
            trio.lowlevel.notify_closing(self._sock)
        return super().detach()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the socket.

        Trio's method doesn't notify the tasks that wait for the socket. Their operations in flight
        would keep it open: the peer would see no end of the stream, and the port would stay in use.
        """
        if trio.lowlevel.in_trio_run() and current_ring("sockets") is not None:
            self.close()
        super().__exit__(exc_type, exc_value, traceback)


def _materialised(items: Iterable[Any]) -> Iterable[Any]:
    """Return an iterator's *items* as a list, which can be read twice; anything else as it is."""
    return list(items) if isinstance(items, Iterator) else items
