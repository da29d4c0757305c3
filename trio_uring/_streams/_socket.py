"""`UringSocket`: Trio's socket, on completions.

Streams are received from, and everything is sent, on the ring. What is not plain (an exotic
address family or flag, a wrong argument, a closed socket, a send that finds the socket full)
goes Trio's own way, which asks the standard library: its semantics and its exceptions, to the
letter. So does everything in a run without a ring.

Why datagrams and connections are received Trio's way
-----------------------------------------------------

Facts. A RECV, RECVMSG or ACCEPT that waits is woken, and tried again, when poll says that there
is something. If there is nothing 128 times (a wrong checksum, an unread error queue, another
process that was faster), the kernel has a worker try (APOLL_MAX_RETRY in io_uring/poll.c). There
RECVMSG and ACCEPT fail with EAGAIN, and RECV blocks the worker for as long as nothing comes. And
an ACCEPT in flight waits exclusively: a connection is given to a process that computes while
another one idles. If it is killed, its port stays taken for a while. (Linux 6.18)

What does this mean for us? A stranger can send bad datagrams, and urgent bytes. So what waits in
the kernel waits only in its poll: readiness, with epoll, or a multishot receive, which is never
handed to a worker. A multishot with a limit takes no more than it was asked for, but only streams
have that. Where the kernel does not, streams are received from Trio's way, too.

Calls that are begun in one turn of the loop
--------------------------------------------

Facts. A call of Trio's tries at once, and waits only if that fails. Here it is only noted, and the
kernel carries it out at the end of the turn, in order.

What does this mean? Of two receives that are begun in one turn on one stream, the second raises
`trio.BusyResourceError`, even with data there for both. What the standard library is asked for
in the same turn comes before what this turn's tasks have sent; but `shutdown`, `close` and
`detach` have that sent first.

`close` is Trio's: it calls `notify_closing`, which ends what is in flight before the fd goes.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import trio
from trio.lowlevel import enable_ki_protection

from trio_uring import _operations as operations
from trio_uring._engine._buffer_pool import RECEIVE_BUFFER_SIZE
from trio_uring._engine._io_manager import UringIOManager, current_ring
from trio_uring._kernel import sockets as abi
from trio_uring._trio_private import TrioSocket

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

# The flags that go to the ring. MSG_DONTWAIT and the like mean something that only the system
# call does right.
_SEND_FLAGS: Final = abi.MSG_NOSIGNAL | abi.MSG_MORE | abi.MSG_DONTROUTE
_INTERNET: Final = (abi.AF_INET, abi.AF_INET6)

# Data that is, or may be, there was not received: no buffer was left, or somebody took it.
_NOT_RECEIVED: Final = (errno.ENOBUFS, errno.EAGAIN)

# The errors that connect(2) reports only after it has begun: Trio then adds the address.
_LATE_CONNECT_ERRORS: Final = frozenset(
    (errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH)
)

# A socket that is made with this type does not have to be told that it is non-blocking.
_NONBLOCKING_STREAM: Final = abi.SOCK_STREAM | abi.SOCK_NONBLOCK

# As numbers: the properties of Python's class make an enum of them.
_C_SOCKET: Final = vars(stdlib_socket.SocketType)
_family: Final[Callable[[stdlib_socket.socket], int]] = _C_SOCKET["family"].__get__
_proto: Final[Callable[[stdlib_socket.socket], int]] = _C_SOCKET["proto"].__get__

_NOT_PLAIN: Final = (TypeError, ValueError, BufferError, OverflowError)


def _only(flags: object, allowed: int) -> bool:
    return isinstance(flags, int) and not flags & ~allowed


def _fits(size: object) -> bool:
    return type(size) is int and 0 < size <= RECEIVE_BUFFER_SIZE


class UringSocket(TrioSocket):
    """A Trio socket whose operations complete on the ring, in a run that has one."""

    is_stream: bool = False  # once known: see _native.py

    # ---- Receiving -------------------------------------------------------------------------

    async def recv(self, buflen: int, flags: int = 0, /) -> bytes:
        """Like :meth:`socket.socket.recv`, but async."""
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
        """Receive after an attempt on the ring that brought nothing.

        More receives completed at once than there are buffers; the data is still in the socket.
        This one has waited its turn, so it takes it: to begin anew would have it find no buffer
        again and again. By now the socket may be closed, so that is asked again, as Trio does.
        """
        while True:
            try:
                return self._sock.recv(buflen)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)

    # A program receives from a socket the same way again and again. Describing that operation
    # once spares a tenth of what each costs (benchmarks/bench_echo.py). It has no memory of
    # its own, and only one can be in flight.
    _receive_key: object = None
    _receive: operations.Operation[bytes] | None = None

    def _recv_operation(
        self, manager: UringIOManager | None, fd: int, size: int, flags: int
    ) -> operations.Operation[bytes] | None:
        """Return what recv performs; None if that must go Trio's way."""
        if manager is None or fd < 0 or not _fits(size) or type(flags) is not int or flags:
            return None
        if self._sock.type != stdlib_socket.SOCK_STREAM:
            return None
        buffers = manager.stream_buffers
        return None if buffers is None else operations.recv_once(fd, buffers, size)

    # ---- Sending ---------------------------------------------------------------------------
    #
    # A send never waits in the kernel: to a peer that shut down its side, with a full buffer,
    # it would take a kernel worker, because the kernel's poll also answers to POLLRDHUP, again
    # and again. 40 such sends take all workers and stall everything else (Linux 6.18). So it
    # asks with MSG_DONTWAIT, and one that finds the socket full goes Trio's way: wait until
    # it is writable, then send.

    async def send(self, bytes: Buffer, flags: int = 0, /) -> int:
        """Like :meth:`socket.socket.send`, but async."""
        manager = current_ring("sockets")
        fd = self._sock.fileno()
        if manager is not None and fd >= 0 and _only(flags, _SEND_FLAGS):
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
        manager = current_ring("sockets")
        if manager is not None and len(args) in (2, 3) and self._sock.fileno() >= 0:
            data, *flags_given, address = args
            flags = flags_given[0] if flags_given else 0
            resolved = await self._resolve_address_nocp(address, local=False)
            args = (data, *flags_given, resolved)
            raw = operations.encode_sockaddr(self.family, resolved)
            if raw is not None:
                sent = await self._sendmsg(manager, [data], [], flags, raw)
                if sent is not None:
                    return sent
        return await super().sendto(*args)

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
        if manager is not None and self._sock.fileno() >= 0:
            buffers = _materialised(buffers)
            ancdata = _materialised(ancdata)
            raw: bytes | None = b""
            if address is not None:
                address = await self._resolve_address_nocp(address, local=False)
                raw = operations.encode_sockaddr(self.family, address)
            if raw is not None:
                sent = await self._sendmsg(manager, buffers, ancdata, flags, raw)
                if sent is not None:
                    return sent
        return await super().sendmsg(buffers, ancdata, flags, address)

    async def _sendmsg(
        self,
        manager: UringIOManager,
        buffers: Iterable[Buffer],
        ancillary: Iterable[tuple[int, int, Buffer]],
        flags: int,
        address: bytes,
    ) -> int | None:
        """Send one message; None if that must go Trio's way."""
        if not _only(flags, _SEND_FLAGS):
            return None
        try:
            operation = operations.sendmsg(
                self._sock.fileno(), buffers, ancillary, flags | abi.MSG_DONTWAIT, address
            )
        except _NOT_PLAIN:
            return None
        try:
            return await manager.perform(operation)
        except BlockingIOError:
            return None

    # ---- Connections -----------------------------------------------------------------------

    @enable_ki_protection
    async def accept(self) -> tuple[trio.socket.SocketType, Any]:
        """Like :meth:`socket.socket.accept`, but async.

        As Trio does it; but Ctrl-C between the system call and the new socket would lose its fd.
        """
        return await super().accept()

    def stream_connection(self, fd: int) -> UringSocket:
        """Return the socket of a non-blocking connection that this stream listener accepted.

        It owns *fd*, which is closed if this fails.
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

        If cancelled, the socket is closed: the attempt cannot be taken back.
        """
        manager = current_ring("sockets")
        if manager is None or self._sock.fileno() < 0:
            return await super().connect(address)
        try:
            address = await self._resolve_address_nocp(address, local=False)
            raw = operations.encode_sockaddr(self.family, address)
            if raw is None:
                return await super().connect(address)
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
        """Like :meth:`socket.socket.shutdown`; what was sent before goes first."""
        if self._sock.fileno() >= 0 and trio.lowlevel.in_trio_run():
            manager = current_ring("sockets")
            if manager is not None:
                manager.submit_for(self._sock.fileno())
        super().shutdown(flag)

    def detach(self) -> int:
        """Like :meth:`socket.socket.detach`.

        Who still waits in the kernel would receive what comes for the new owner.
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
        """Close.

        Trio does so without a word to those who still wait for the socket. What they have in
        flight would keep it open: the peer would see no end, and the port stay taken.
        """
        if trio.lowlevel.in_trio_run() and current_ring("sockets") is not None:
            self.close()
        super().__exit__(exc_type, exc_value, traceback)


def _materialised(items: Iterable[Any]) -> Iterable[Any]:
    """Return *items* as something that can be read twice; what is no iterator, as it is."""
    return list(items) if isinstance(items, Iterator) else items
