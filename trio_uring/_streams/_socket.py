"""`UringSocket`: Trio's socket, on completions.

Each method picks an operation and a buffer; everything else is Trio's own. What is not plain
(an exotic address family or flag, a wrong argument, a closed socket, a send that finds the
socket full) goes Trio's own way, which asks the standard library: its semantics and its
exceptions, to the letter. So does everything in a run without a ring.

Only the methods that wait are here, and `__exit__`. `close` is Trio's: it calls
`notify_closing`, which ends what is in flight before the fd goes.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from collections.abc import Iterable, Iterator
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

# The flags that go to the ring. The others mean something that only the system call does
# right: MSG_DONTWAIT, MSG_WAITALL, MSG_TRUNC (a result larger than the buffer), MSG_ERRQUEUE
# and MSG_OOB (the kernel's poll does not wait for them).
_RECV_FLAGS: Final = abi.MSG_PEEK | abi.MSG_CMSG_CLOEXEC
_SEND_FLAGS: Final = abi.MSG_NOSIGNAL | abi.MSG_MORE | abi.MSG_DONTROUTE
_ACCEPT_FLAGS: Final = abi.SOCK_CLOEXEC | abi.SOCK_NONBLOCK
_INTERNET: Final = (abi.AF_INET, abi.AF_INET6)
_FAMILIES: Final = (*_INTERNET, abi.AF_UNIX)

# The errors that connect(2) reports only after it has begun: Trio then adds the address.
_LATE_CONNECT_ERRORS: Final = frozenset(
    (errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH)
)

_NOT_PLAIN: Final = (TypeError, ValueError, BufferError, OverflowError)


def _only(flags: object, allowed: int) -> bool:
    return isinstance(flags, int) and not flags & ~allowed


def _fits(size: object) -> bool:
    return type(size) is int and 0 < size <= RECEIVE_BUFFER_SIZE


def _part(buffer: Buffer, size: int) -> Buffer:
    """Return the first *size* bytes of *buffer*, or all of it for 0.

    Raises ValueError for what the standard library should refuse, or answer without waiting.
    """
    with memoryview(buffer) as view:
        if not 0 <= size <= view.nbytes or not view.nbytes:
            raise ValueError
    return memoryview(buffer).cast("B")[:size] if size else buffer


class UringSocket(TrioSocket):
    """A Trio socket whose operations complete on the ring, in a run that has one."""

    # ---- Receiving -------------------------------------------------------------------------

    async def recv(self, buflen: int, flags: int = 0, /) -> bytes:
        """Like :meth:`socket.socket.recv`, but async."""
        while True:
            manager = current_ring("sockets")
            key = (manager, self._sock.fileno(), buflen, flags)
            if key != self._receive_key:
                self._receive_key, self._receive = key, self._recv_operation(*key)
            if manager is None or self._receive is None:
                return await super().recv(buflen, flags)
            try:
                return await manager.perform(self._receive)
            except OSError as exc:
                # More receives completed at once than there are buffers: try again, the data
                # is still in the socket. Begin anew: by now that may be closed, and its fd be
                # another's.
                if exc.errno != errno.ENOBUFS:
                    raise

    # A program receives from a socket the same way again and again. Describing that operation
    # once spares a tenth of what each costs (benchmarks/bench_echo.py). It has no memory of
    # its own, and only one can be in flight.
    _receive_key: object = None
    _receive: operations.Operation[bytes] | None = None

    def _recv_operation(
        self, manager: UringIOManager | None, fd: int, size: int, flags: int
    ) -> operations.Operation[bytes] | None:
        """Return what recv performs; None if that must go Trio's way."""
        if manager is None or fd < 0 or not _fits(size) or not _only(flags, _RECV_FLAGS):
            return None
        buffers = manager.buffers
        return None if buffers is None else operations.recv_select(fd, buffers, size, flags)

    async def recv_into(self, /, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        """Like :meth:`socket.socket.recv_into`, but async."""
        manager = current_ring("sockets")
        fd = self._sock.fileno()
        if manager is not None and fd >= 0 and _only(flags, _RECV_FLAGS):
            try:
                operation = operations.recv(fd, _part(buffer, nbytes), flags)
            except _NOT_PLAIN:
                pass
            else:
                return await manager.perform(operation)
        return await super().recv_into(buffer, nbytes, flags)

    async def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """Like :meth:`socket.socket.recvfrom`, but async."""
        message = await self._recvmsg_select(bufsize, 0, flags)
        if message is None:
            return await super().recvfrom(bufsize, flags)
        return message.data, message.address

    async def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        """Like :meth:`socket.socket.recvmsg`, but async."""
        message = await self._recvmsg_select(bufsize, ancbufsize, flags)
        if message is None:
            return await super().recvmsg(bufsize, ancbufsize, flags)
        return message.data, message.ancillary, message.flags, message.address

    async def _recvmsg_select(
        self, size: int, ancillary_size: int, flags: int
    ) -> operations.Message[bytes] | None:
        """Receive one message into a provided buffer; None if that must go Trio's way."""
        manager = self._message_manager(flags, ancillary_size)
        if manager is None or not _fits(size):
            return None
        buffers = manager.buffers
        while buffers is not None:
            try:
                return await manager.perform(
                    operations.recvmsg_select(
                        self._sock.fileno(), buffers, size, ancillary_size, flags
                    )
                )
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise
        return None

    async def recvfrom_into(
        self, /, buffer: Buffer, nbytes: int = 0, flags: int = 0
    ) -> tuple[int, Any]:
        """Like :meth:`socket.socket.recvfrom_into`, but async."""
        manager = self._message_manager(flags)
        if manager is not None:
            try:
                operation = operations.recvmsg(
                    self._sock.fileno(), [_part(buffer, nbytes)], 0, flags
                )
            except _NOT_PLAIN:
                pass
            else:
                message = await manager.perform(operation)
                return message.data, message.address
        return await super().recvfrom_into(buffer, nbytes, flags)

    async def recvmsg_into(
        self, buffers: Iterable[Buffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, object]:
        """Like :meth:`socket.socket.recvmsg_into`, but async."""
        manager = self._message_manager(flags, ancbufsize)
        if manager is not None:
            buffers = _materialised(buffers)
            try:
                parts = [_part(buffer, 0) for buffer in buffers]
                operation = operations.recvmsg(self._sock.fileno(), parts, ancbufsize, flags)
            except _NOT_PLAIN:
                pass
            else:
                message = await manager.perform(operation)
                return message.data, message.ancillary, message.flags, message.address
        return await super().recvmsg_into(buffers, ancbufsize, flags)

    def _message_manager(self, flags: int, ancillary_size: int = 0) -> UringIOManager | None:
        manager = current_ring("sockets")
        if (
            self._sock.fileno() >= 0
            and self.family in _FAMILIES
            and _only(flags, _RECV_FLAGS)
            and type(ancillary_size) is int
            and 0 <= ancillary_size <= RECEIVE_BUFFER_SIZE
        ):
            return manager
        return None

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
        """Like :meth:`socket.socket.accept`, but async."""
        manager = current_ring("sockets")
        if manager is None or self._sock.fileno() < 0 or self.family not in _FAMILIES:
            return await super().accept()
        fd, raw = await manager.perform(operations.accept(self._sock.fileno(), _ACCEPT_FLAGS))
        try:
            sock = stdlib_socket.socket(self.family, self.type, self.proto, fileno=fd)
        except BaseException:
            os.close(fd)
            raise
        return trio.socket.from_stdlib_socket(sock), operations.decode_sockaddr(raw)

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
