"""The operations on sockets, one function each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from trio_uring._arguments import check_index, wrong_type
from trio_uring._kernel import ffi
from trio_uring._kernel.sockets import MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_CLOEXEC
from trio_uring._kernel.uapi import (
    NOTIF_USAGE_ZC_COPIED,
    AcceptFlag,
    Opcode,
    RecvSendFlag,
    SqeFlag,
)

from ._message import Message, MessageHeader, header_to_receive, header_to_send
from ._operation import (
    Operation,
    address_of,
    count,
    nothing,
    pin_readable,
    pin_writable,
    pins_of,
    size_of,
)
from ._sockaddr import SOCKADDR_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from ._operation import Exclusive, ProvidedBuffers

# Plain ints: an IntFlag in an expression costs a microsecond.
_POLL_FIRST = int(RecvSendFlag.POLL_FIRST)
_RECV_MULTISHOT = int(RecvSendFlag.MULTISHOT)
_ACCEPT_MULTISHOT = int(AcceptFlag.MULTISHOT)
_BUFFER_SELECT = int(SqeFlag.BUFFER_SELECT)
_ZC_REPORT_USAGE = int(RecvSendFlag.ZC_REPORT_USAGE)
_SEND = int(Opcode.SEND)

# In bytes. Streams send memoryviews. Copying one of this size takes less time than pinning it.
_COPY_MAX = 4096


def recv(fd: int, buffer: Buffer, flags: int = 0) -> Operation[int]:
    """Receive from a socket into *buffer*, at most its size in bytes.

    Completes with: the number of bytes; 0 at the end of the stream.
    Fails with: ``ECONNRESET``, ``ENOTCONN``, ``ENOTSOCK``, ...: see recv(2).
    If cancelled: no data is lost. With ``MSG_WAITALL``, the result is the number of bytes received
      so far, if any.
    Since: Linux 5.6. Source: io_uring_prep_recv(3), recv(2).
    """
    pin = pin_writable(buffer)
    return Operation(
        Opcode.RECV, count, fd, pin, size_of(pin), flags, pins=(pin,), exclusive="read"
    )


def recv_select(
    fd: int, buffers: ProvidedBuffers, size: int, flags: int = 0, *, poll_first: bool = False
) -> Operation[bytes]:
    """Receive at most *size* bytes from a socket into a provided buffer that the kernel chooses.

    The buffer is taken only when there is data. *poll_first* skips the first attempt, which is
    useful if the socket is known to be empty. After 128 wake-ups without data, the operation blocks
    a kernel worker until data arrives. `recv_once` doesn't.

    Completes with: the bytes; empty at the end of the stream.
    Fails with: as `recv`; ``ENOBUFS`` if the group has no free buffer (the data stays in the
      socket).
    If cancelled: no data is lost.
    Since: Linux 5.19. Source: io_uring_prep_recv(3), io_uring_setup_buf_ring(3).
    """
    return Operation(
        Opcode.RECV,
        buffers.take,
        fd,
        len=size,
        op_flags=flags,
        sqe_flags=_BUFFER_SELECT,
        ioprio=_POLL_FIRST if poll_first else 0,
        buf_index=buffers.group,
        buffers=buffers,
        exclusive="read",
    )


def recv_once(fd: int, buffers: ProvidedBuffers, size: int) -> Operation[bytes]:
    """Receive at most *size* bytes from a stream socket, and never in a kernel worker.

    It is like `recv_select`, which the kernel hands to a worker after 128 wake-ups without data (by
    urgent bytes, or if another process receives the data). This is a multishot receive with a limit
    of one byte, after which it ends. The kernel never hands multishot receives to a worker.

    Completes with: the bytes; empty at the end of the stream.
    Fails with: as `recv_select`; ``EINVAL`` if the kernel doesn't support such a limit.
    If cancelled: no data is lost.
    Since: Linux 6.17. Source: io_uring_prep_recv_multishot(3).
    """
    return Operation(
        Opcode.RECV,
        buffers.take,
        fd,
        len=size,
        sqe_flags=_BUFFER_SELECT,
        ioprio=_RECV_MULTISHOT,
        buf_index=buffers.group,
        splice_fd_in=1,  # optlen: the limit, in bytes; a single receive may exceed it
        buffers=buffers,
        exclusive="read",
    )


def recv_multishot(
    fd: int,
    buffers: ProvidedBuffers,
    on_cqe_more: Callable[[int, int], None],
    flags: int = 0,
    *,
    exclusive: Exclusive | None = "read",
) -> Operation[bytes]:
    """Receive from a socket many times, each time into a provided buffer that the kernel chooses.

    *on_cqe_more* is called with ``res`` and ``flags`` of each receive but the last, from which
    `ProvidedBuffers.take` makes the bytes. It must not raise. With *exclusive* None, the caller
    must prevent that other tasks receive at the same time.

    Completes with: the last bytes; empty at the end of the stream. It can end before that, for
      example if the CQ overflows.
    Fails with: as `recv`; ``ENOBUFS`` if the group has no free buffer (the data stays in the
      socket).
    If cancelled: no data is lost; some may go to *on_cqe_more* first.
    Since: Linux 6.0. Source: io_uring_prep_recv_multishot(3).
    """
    return Operation(
        Opcode.RECV,
        buffers.take,
        fd,
        op_flags=flags,
        sqe_flags=_BUFFER_SELECT,
        ioprio=_RECV_MULTISHOT,
        buf_index=buffers.group,
        buffers=buffers,
        exclusive=exclusive,
        on_cqe_more=on_cqe_more,
    )


def send(fd: int, data: Buffer, flags: int = 0) -> Operation[int]:
    """Send *data* on a connected socket. It never raises ``SIGPIPE``.

    With ``MSG_DONTWAIT`` in *flags*, it fails immediately with ``EAGAIN`` if the socket's buffer is
    full. Otherwise it waits. Warning: if the peer has shut down its side, a send that waits
    occupies a kernel worker until the peer reads or closes.

    Completes with: the number of bytes that the kernel has taken: some, or all.
    Fails with: ``EPIPE``, ``ECONNRESET``, ``ENOTCONN``, ``EAGAIN``, ...: see send(2).
    If cancelled: the result is the number of bytes sent so far, if any.
    Since: Linux 5.6. Source: io_uring_prep_send(3), send(2).
    """
    if type(data) is memoryview and data.nbytes <= _COPY_MAX and data.c_contiguous:
        data = bytes(data)
    pin = pin_readable(data)
    waits = not flags & MSG_DONTWAIT
    return Operation(
        _SEND,
        count,
        fd,
        pin,
        size_of(pin),
        flags | MSG_NOSIGNAL,
        pins=() if pin is data else (pin,),
        cancellable=waits,
        exclusive="write" if waits else None,
    )


def sendmsg(
    fd: int,
    buffers: Iterable[Buffer],
    ancillary: Iterable[tuple[int, int, Buffer]] = (),
    flags: int = 0,
    address: bytes = b"",
) -> Operation[int]:
    """Send *buffers* as one message, with *ancillary* data, to *address* (a ``sockaddr``).

    Completes with: the number of bytes sent.
    Fails with: ``EMSGSIZE``, ``EPIPE``, ``EAGAIN`` (with ``MSG_DONTWAIT``), ...: see sendmsg(2).
    If cancelled: the result is the number of bytes sent so far, if any.
    Since: Linux 5.3. Source: io_uring_prep_sendmsg(3), sendmsg(2).
    """
    return _sendmsg(Opcode.SENDMSG, fd, header_to_send(buffers, ancillary, address), flags)


def send_zc(
    fd: int, data: Buffer, flags: int = 0, *, on_copied: Callable[[int], object] | None = None
) -> Operation[int]:
    """Send *data* on a connected socket without copying it into the kernel.

    It completes when the network no longer needs *data*: for TCP, when the peer has acknowledged
    it. This pays off for large buffers, and never on loopback, which copies anyway. If the kernel
    copied the data nevertheless, *on_copied* is called with the number of bytes (Linux 6.2).

    Completes with: the number of bytes that the kernel has taken: some, or all.
    Fails with: as `send`; ``ENOMEM`` if ``RLIMIT_MEMLOCK`` is too low; ``EOPNOTSUPP``.
    If cancelled: the result is the number of bytes sent so far, if any.
    Since: Linux 6.0. Source: io_uring_prep_send_zc(3), send(2).
    """
    pin = pin_readable(data)
    waits = not flags & MSG_DONTWAIT
    return Operation(
        Opcode.SEND_ZC,
        count if on_copied is None else _counting_copied(on_copied),
        fd,
        pin,
        size_of(pin),
        flags | MSG_NOSIGNAL,
        ioprio=0 if on_copied is None else _ZC_REPORT_USAGE,
        pins=() if pin is data else (pin,),
        cancellable=waits,
        exclusive="write" if waits else None,
    )


def sendmsg_zc(
    fd: int,
    buffers: Iterable[Buffer],
    ancillary: Iterable[tuple[int, int, Buffer]] = (),
    flags: int = 0,
    address: bytes = b"",
    *,
    on_copied: Callable[[int], object] | None = None,
) -> Operation[int]:
    """Send *buffers* as one message without copying them. Like `sendmsg` and `send_zc`.

    Completes with: the number of bytes sent, when the network no longer needs *buffers*.
    Fails with: as `sendmsg`; ``ENOMEM`` if ``RLIMIT_MEMLOCK`` is too low; ``EOPNOTSUPP``.
    If cancelled: the result is the number of bytes sent so far, if any.
    Since: Linux 6.1. Source: io_uring_prep_sendmsg_zc(3), sendmsg(2).
    """
    message = header_to_send(buffers, ancillary, address)
    return _sendmsg(Opcode.SENDMSG_ZC, fd, message, flags, on_copied)


def _counting_copied(on_copied: Callable[[int], object]) -> Callable[[int, int], int]:
    def decode(res: int, flags: int) -> int:
        if flags & NOTIF_USAGE_ZC_COPIED:  # the notification's res, see process_events
            on_copied(res)
        return res

    return decode


def _sendmsg(
    opcode: int,
    fd: int,
    message: MessageHeader,
    flags: int,
    on_copied: Callable[[int], object] | None = None,
) -> Operation[int]:
    waits = not flags & MSG_DONTWAIT
    return Operation(
        opcode,
        count if on_copied is None else _counting_copied(on_copied),
        fd,
        message.header,
        1,
        flags | MSG_NOSIGNAL,
        ioprio=0 if on_copied is None else _ZC_REPORT_USAGE,
        pins=tuple(message.pins),
        cancellable=waits,
        exclusive="write" if waits else None,
    )


def recvmsg(
    fd: int, buffers: Sequence[Buffer], ancillary_size: int = 0, flags: int = 0
) -> Operation[Message[int]]:
    """Receive one message into *buffers*, with at most *ancillary_size* bytes of ancillary data.

    Completes with: a `Message`, whose data is the number of bytes.
    Fails with: ``ECONNREFUSED``, ``ENOTCONN``, ...: see recvmsg(2).
    If cancelled: no message is lost.
    Since: Linux 5.3. Source: io_uring_prep_recvmsg(3), recvmsg(2).
    """
    pins = pins_of(buffers, pin_writable)
    message = header_to_receive([(pin, len(pin)) for pin in pins], ancillary_size)
    return Operation(
        Opcode.RECVMSG,
        lambda res, _flags: message.received(res),
        fd,
        message.header,
        1,
        flags,
        pins=(*message.pins, *pins),
        exclusive="read",
        discard=message.discard,
    )


def recvmsg_select(
    fd: int, buffers: ProvidedBuffers, size: int, ancillary_size: int = 0, flags: int = 0
) -> Operation[Message[bytes]]:
    """Receive one message of at most *size* bytes into a provided buffer that the kernel chooses.

    Completes with: a `Message`, whose data is the bytes.
    Fails with: as `recvmsg`; ``ENOBUFS`` if the group has no free buffer (the message stays in the
      socket).
    If cancelled: no message is lost.
    Since: Linux 5.19. Source: io_uring_prep_recvmsg(3), io_uring_setup_buf_ring(3).
    """
    message = header_to_receive([(ffi.NULL, size)], ancillary_size)
    return Operation(
        Opcode.RECVMSG,
        lambda res, cqe_flags: message.received(buffers.take(res, cqe_flags)),
        fd,
        message.header,
        1,
        flags,
        sqe_flags=_BUFFER_SELECT,
        buf_index=buffers.group,
        buffers=buffers,
        pins=tuple(message.pins),
        exclusive="read",
        discard=message.discard,
    )


def accept(fd: int, flags: int = SOCK_CLOEXEC) -> Operation[tuple[int, bytes]]:
    """Accept one connection on a listening socket.

    Completes with: the new fd, which the caller owns, and the peer's ``sockaddr``.
    Fails with: ``EMFILE``, ``ENFILE``, ``EINVAL``, ``ECONNABORTED``, ...: see accept(2).
    If cancelled: if a connection was accepted first, it is the result. None is lost.
    Since: Linux 5.5. Source: io_uring_prep_accept(3), accept(2).
    """
    name = ffi.new("char[]", SOCKADDR_SIZE)
    name_len = ffi.new("socklen_t[1]")
    name_len[0] = SOCKADDR_SIZE

    def decode(res: int, _flags: int) -> tuple[int, bytes]:
        size = min(int(name_len[0]), SOCKADDR_SIZE)
        return res, ffi.buffer(name, size)[:]

    return Operation(
        Opcode.ACCEPT,
        decode,
        fd,
        name,
        op_flags=flags,
        off=address_of(name_len),
        pins=(name, name_len),
        exclusive="read",
        discard=os.close,
    )


def accept_multishot(
    fd: int, on_cqe_more: Callable[[int, int], None], flags: int = SOCK_CLOEXEC
) -> Operation[int]:
    """Accept many connections on a listening socket.

    For each connection but the last, *on_cqe_more* is called with ``res``, which is the new fd, and
    ``flags``. The caller owns the fd. *on_cqe_more* must not raise.

    Completes with: the last new fd, which the caller owns. This happens only if the CQ overflows.
      Usually it ends with an error.
    Fails with: as `accept`. Connections that were accepted before are not lost.
    If cancelled: some connections may go to *on_cqe_more* first, and the last one may be the
      result.
    Since: Linux 5.19. Source: io_uring_prep_multishot_accept(3), accept(2).
    """
    return Operation(
        Opcode.ACCEPT,
        count,
        fd,
        op_flags=flags,
        ioprio=_ACCEPT_MULTISHOT,
        exclusive="read",
        on_cqe_more=on_cqe_more,
        discard=os.close,
    )


def connect(fd: int, address: bytes) -> Operation[None]:
    """Connect a socket to *address*, a ``struct sockaddr``.

    Completes with: nothing, when the connection is established.
    Fails with: ``ECONNREFUSED``, ``ETIMEDOUT``, ``ENETUNREACH``, ...: see connect(2).
    If cancelled: the attempt may go on (``SYN_SENT``). The socket can only be closed.
    Since: Linux 5.5. Source: io_uring_prep_connect(3), connect(2).
    """
    if type(address) is not bytes:
        raise _wrong_address(address)
    return Operation(Opcode.CONNECT, nothing, fd, address, off=len(address), exclusive="write")


def _wrong_address(address: object) -> TypeError:
    expected = "a struct sockaddr as bytes, which operations.encode_sockaddr makes"
    return wrong_type("address", address, expected)


def socket(family: int, type: int, protocol: int = 0) -> Operation[int]:
    """Create a socket. *type* may contain ``SOCK_NONBLOCK`` and ``SOCK_CLOEXEC``.

    Completes with: the new fd, which the caller owns.
    Fails with: ``EAFNOSUPPORT``, ``EMFILE``, ...: see socket(2).
    If cancelled: if the socket was created first, it is the result.
    Since: Linux 5.19. Source: io_uring_prep_socket(3), socket(2).
    """
    check_index("family", family)
    check_index("type", type)
    return Operation(
        Opcode.SOCKET, count, family, off=type, len=protocol, cancellable=False, discard=os.close
    )


def bind(fd: int, address: bytes) -> Operation[None]:
    """Bind a socket to the local *address*, a ``struct sockaddr``.

    Completes with: nothing.
    Fails with: ``EADDRINUSE``, ``EACCES``, ...: see bind(2).
    If cancelled: it still completes.
    Since: Linux 6.11. Source: io_uring_prep_bind(3), bind(2).
    """
    if type(address) is not bytes:
        raise _wrong_address(address)
    return Operation(Opcode.BIND, nothing, fd, address, off=len(address), cancellable=False)


def listen(fd: int, backlog: int) -> Operation[None]:
    """Make a socket accept connections. At most *backlog* connections wait to be accepted.

    Completes with: nothing.
    Fails with: ``EADDRINUSE``, ``EOPNOTSUPP``, ...: see listen(2).
    If cancelled: it still completes.
    Since: Linux 6.11. Source: io_uring_prep_listen(3), listen(2).
    """
    return Operation(Opcode.LISTEN, nothing, fd, len=backlog, cancellable=False)


def shutdown(fd: int, how: int) -> Operation[None]:
    """Shut down reading (`socket.SHUT_RD`), writing, or both.

    Completes with: nothing.
    Fails with: ``ENOTCONN``, ``ENOTSOCK``: see shutdown(2).
    If cancelled: it still completes.
    Since: Linux 5.11. Source: io_uring_prep_shutdown(3), shutdown(2).
    """
    return Operation(Opcode.SHUTDOWN, nothing, fd, len=how, cancellable=False)
