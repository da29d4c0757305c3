"""The operations on open files, pipes and terminals, one function each.

Offsets are in bytes from the beginning of the file. -1 means the current file position, which then
moves, as with read(2) and write(2). Do not use the position for several operations at once. Pipes
and terminals have no position: their offset is -1.

Reads and writes of a regular file end by themselves, and the kernel does not interrupt them. So
cancelling waits until they complete, as with a thread. On files where they can block indefinitely
(a pipe, a FIFO, a terminal, a socket, an eventfd), they can be cancelled, and no data is lost. Such
an operation does not count against ``RingConfig.max_file_operations``. By default, the kind of the
file decides, when the operation is made. ``cancellable=True`` or ``False`` saves asking the kernel
for it, which takes 0.4 microseconds. With ``True``, only one task at a time may read, or write, the
fd.
"""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

from trio_uring._arguments import check_fd
from trio_uring._kernel import CData, ffi, lib
from trio_uring._kernel.uapi import Opcode, SqeFlag

from ._operation import (
    Exclusive,
    Operation,
    as_address,
    count,
    pin_of_several,
    pin_readable,
    pin_writable,
    pins_of,
    signed_64_bits,
    size_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from ._operation import ProvidedBuffers

# Plain ints: an IntFlag in an expression costs a microsecond.
_ASYNC = int(SqeFlag.ASYNC)
_BUFFER_SELECT = int(SqeFlag.BUFFER_SELECT)

_READ: Exclusive = "read"
_WRITE: Exclusive = "write"


def read(
    fd: int,
    buffer: Buffer,
    offset: int,
    flags: int = 0,
    *,
    cancellable: bool | None = None,
    in_worker: bool = False,
) -> Operation[int]:
    """Read from a file into *buffer*, at most its size in bytes. *flags*: `os.RWF_NOWAIT`, ...

    Data in the page cache is copied when the operation is submitted, which blocks the event loop
    for 100 µs per MiB. A file system with a server, such as FUSE, may block it for longer. With
    *in_worker*, a kernel worker copies the data instead. It has no effect on operations that can be
    cancelled.

    Completes with: the number of bytes; 0 at the end of the file.
    Fails with: ``EBADF``, ``EISDIR``, ``EIO``, ...: see pread(2); ``EAGAIN`` if *fd* is
      non-blocking and has no data yet (but for a pipe, newer kernels wait nevertheless).
    If cancelled: it still completes, unless it can block indefinitely. No data is lost.
    Since: Linux 5.6. Source: io_uring_prep_read(3), preadv2(2).
    """
    pin = pin_writable(buffer)
    exclusive = _READ if cancellable else None
    return _transfer(
        Opcode.READ,
        fd,
        pin,
        size_of(pin),
        flags,
        offset,
        (pin,),
        cancellable=cancellable,
        exclusive=exclusive,
        in_worker=in_worker,
    )


def read_select(
    fd: int,
    buffers: ProvidedBuffers,
    size: int,
    offset: int = -1,
    flags: int = 0,
    *,
    cancellable: bool | None = None,
) -> Operation[bytes]:
    """Read at most *size* bytes from a file into a provided buffer that the kernel chooses.

    The buffer is taken only when there is data, which saves memory for pipes that are idle for
    long. If the operation can be cancelled, only one task at a time may read the fd.

    Completes with: the bytes; empty at the end of the file.
    Fails with: as `read`; ``ENOBUFS`` if the group has no free buffer (the data stays in the file).
    If cancelled: it still completes, unless it can block indefinitely. No data is lost.
    Since: Linux 5.19. Source: io_uring_prep_read(3), io_uring_setup_buf_ring(3).
    """
    if cancellable is None:
        cancellable = _can_block(fd)
    return Operation(
        Opcode.READ,
        buffers.take,
        fd,
        len=size,
        op_flags=flags,
        off=signed_64_bits(offset),
        sqe_flags=_BUFFER_SELECT,
        buf_index=buffers.group,
        buffers=buffers,
        cancellable=cancellable,
        exclusive="read" if cancellable else None,
        limited=not cancellable,
    )


def readv(
    fd: int,
    buffers: Iterable[Buffer],
    offset: int,
    flags: int = 0,
    *,
    cancellable: bool | None = None,
    in_worker: bool = False,
) -> Operation[int]:
    """Like `read`, into several *buffers*, which are filled in order.

    Completes with: the number of bytes; 0 at the end of the file.
    Fails with: as `read`; ``EINVAL`` for more than 1024 buffers.
    If cancelled: it still completes, unless it can block indefinitely. No data is lost.
    Since: Linux 5.1. Source: io_uring_prep_readv2(3), preadv2(2).
    """
    pins = pins_of(buffers, pin_writable)
    exclusive = _READ if cancellable else None
    return _vectored(
        Opcode.READV,
        fd,
        pins,
        flags,
        offset,
        cancellable=cancellable,
        exclusive=exclusive,
        in_worker=in_worker,
    )


def read_fixed(
    fd: int,
    buffer: Buffer,
    offset: int,
    buf_index: int,
    flags: int = 0,
    *,
    cancellable: bool | None = None,
    in_worker: bool = False,
) -> Operation[int]:
    """Read from a file into *buffer*, which lies within the registered buffer *buf_index*.

    Completes with: the number of bytes; 0 at the end of the file.
    Fails with: as `read`; ``EFAULT`` if *buffer* lies elsewhere, or *buf_index* isn't registered.
    If cancelled: it still completes.
    Since: Linux 5.1. Source: io_uring_prep_read_fixed(3).
    """
    pin = pin_writable(buffer)
    return _transfer(
        Opcode.READ_FIXED,
        fd,
        pin,
        size_of(pin),
        flags,
        offset,
        (pin,),
        cancellable=cancellable,
        in_worker=in_worker,
        buf_index=buf_index,
    )


def readv_fixed(
    fd: int, buffers: Iterable[Buffer], offset: int, buf_index: int, flags: int = 0
) -> Operation[int]:
    """Read from a file into *buffers*, which lie within the registered buffer *buf_index*.

    Completes with: the number of bytes; 0 at the end of the file.
    Fails with: as `readv` and `read_fixed`.
    If cancelled: it still completes.
    Since: Linux 6.15. Source: io_uring_prep_readv_fixed(3).
    """
    pins = pins_of(buffers, pin_writable)
    return _vectored(Opcode.READV_FIXED, fd, pins, flags, offset, buf_index=buf_index)


def write(
    fd: int,
    data: Buffer,
    offset: int,
    flags: int = 0,
    *,
    cancellable: bool | None = None,
    in_worker: bool = False,
) -> Operation[int]:
    """Write *data* to a file. *flags*: `os.RWF_DSYNC`, `os.RWF_APPEND`, ...

    If the file was opened with ``O_APPEND``, the data is appended whatever the *offset*.
    *in_worker* is as for `read`. Many file systems use a worker for writes anyway.

    Completes with: the number of bytes written: all, or fewer if the disk is full.
    Fails with: ``ENOSPC``, ``EFBIG``, ``EIO``, ``EBADF``, ...: see pwrite(2); ``EPIPE`` (with
      ``SIGPIPE``, which Python ignores); ``EAGAIN`` as for `read`.
    If cancelled: it still completes, unless it can block indefinitely. Then the result is the
      number of bytes written so far, if any.
    Since: Linux 5.6. Source: io_uring_prep_write(3), pwritev2(2).
    """
    pin = pin_readable(data)
    exclusive = _WRITE if cancellable else None
    return _transfer(
        Opcode.WRITE,
        fd,
        pin,
        size_of(pin),
        flags,
        offset,
        () if pin is data else (pin,),
        cancellable=cancellable,
        exclusive=exclusive,
        in_worker=in_worker,
    )


def writev(
    fd: int,
    buffers: Iterable[Buffer],
    offset: int,
    flags: int = 0,
    *,
    cancellable: bool | None = None,
    in_worker: bool = False,
) -> Operation[int]:
    """Like `write`, from several *buffers*, in order.

    Completes with: the number of bytes written.
    Fails with: as `write`; ``EINVAL`` for more than 1024 buffers.
    If cancelled: as `write`.
    Since: Linux 5.1. Source: io_uring_prep_writev2(3), pwritev2(2).
    """
    pins = pins_of(buffers, pin_of_several)
    exclusive = _WRITE if cancellable else None
    return _vectored(
        Opcode.WRITEV,
        fd,
        pins,
        flags,
        offset,
        cancellable=cancellable,
        exclusive=exclusive,
        in_worker=in_worker,
    )


def write_fixed(
    fd: int,
    data: Buffer,
    offset: int,
    buf_index: int,
    flags: int = 0,
    *,
    cancellable: bool | None = None,
    in_worker: bool = False,
) -> Operation[int]:
    """Write *data*, which lies within the registered buffer *buf_index*, to a file.

    Completes with: the number of bytes written.
    Fails with: as `write`; ``EFAULT`` if *data* lies elsewhere, or *buf_index* isn't registered.
    If cancelled: it still completes.
    Since: Linux 5.1. Source: io_uring_prep_write_fixed(3).
    """
    pin = pin_readable(data)
    pins = () if pin is data else (pin,)
    return _transfer(
        Opcode.WRITE_FIXED,
        fd,
        pin,
        size_of(pin),
        flags,
        offset,
        pins,
        cancellable=cancellable,
        in_worker=in_worker,
        buf_index=buf_index,
    )


def writev_fixed(
    fd: int, buffers: Iterable[Buffer], offset: int, buf_index: int, flags: int = 0
) -> Operation[int]:
    """Write *buffers*, which lie within the registered buffer *buf_index*, to a file.

    Completes with: the number of bytes written.
    Fails with: as `writev` and `write_fixed`.
    If cancelled: it still completes.
    Since: Linux 6.15. Source: io_uring_prep_writev_fixed(3).
    """
    pins = pins_of(buffers, pin_of_several)
    return _vectored(Opcode.WRITEV_FIXED, fd, pins, flags, offset, buf_index=buf_index)


def splice(
    fd_in: int,
    fd_out: int,
    size: int,
    *,
    offset_in: int = -1,
    offset_out: int = -1,
    flags: int = 0,
) -> Operation[int]:
    """Move at most *size* bytes between two files without copying them. One must be a pipe.

    *flags*: `os.SPLICE_F_MOVE`, `os.SPLICE_F_MORE`. A splice that waits for a pipe occupies a
    kernel worker.

    Completes with: the number of bytes; 0 at the end of the input.
    Fails with: ``EINVAL`` if neither is a pipe, ``ESPIPE``, ``EPIPE``, ...: see splice(2).
    If cancelled: the result is the number of bytes moved so far, if any. They stay moved.
    Since: Linux 5.7. Source: io_uring_prep_splice(3), splice(2).
    """
    check_fd("fd_in", fd_in)
    check_fd("fd_out", fd_out)
    # The field addr has the offset of the input.
    return Operation(
        Opcode.SPLICE,
        count,
        fd_out,
        as_address(signed_64_bits(offset_in)),
        size,
        flags,
        signed_64_bits(offset_out),
        splice_fd_in=fd_in,
        second_fd=fd_in,
    )


def tee(fd_in: int, fd_out: int, size: int, flags: int = 0) -> Operation[int]:
    """Copy at most *size* bytes from one pipe to another. They also stay in the first.

    Like `splice`, it occupies a kernel worker while it waits.

    Completes with: the number of bytes; 0 at the end of the input.
    Fails with: ``EINVAL`` if *fd_in* and *fd_out* are not two pipes, ``EPIPE``: see tee(2).
    If cancelled: no data is lost.
    Since: Linux 5.8. Source: io_uring_prep_tee(3), tee(2).
    """
    check_fd("fd_in", fd_in)
    check_fd("fd_out", fd_out)
    return Operation(
        Opcode.TEE, count, fd_out, len=size, op_flags=flags, splice_fd_in=fd_in, second_fd=fd_in
    )


def pipe(flags: int = 0) -> Operation[tuple[int, int]]:
    """Create a pipe, which child processes do not inherit. *flags*: `os.O_NONBLOCK`, ...

    Completes with: the fd to read from and the fd to write to. The caller owns both.
    Fails with: ``EMFILE``, ``ENFILE``: see pipe(2).
    If cancelled: it still completes.
    Since: Linux 6.16. Source: io_uring_prep_pipe(3), pipe(2).
    """
    fds = array("i", (-1, -1))
    pin = pin_writable(fds)

    def discard(_res: int) -> None:
        for fd in fds:
            os.close(fd)

    return Operation(
        Opcode.PIPE,
        lambda _res, _flags: (fds[0], fds[1]),
        0,  # the kernel requires 0
        pin,
        op_flags=flags | os.O_CLOEXEC,
        pins=(pin,),
        cancellable=False,
        discard=discard,
    )


def _can_block(fd: int) -> bool:
    if type(fd) is not int:
        check_fd("fd", fd)
    return bool(lib.can_block(fd))


def _vectored(
    opcode: int,
    fd: int,
    pins: Sequence[CData],
    flags: int,
    offset: int,
    *,
    cancellable: bool | None = None,
    exclusive: Exclusive | None = None,
    in_worker: bool = False,
    buf_index: int = 0,
) -> Operation[int]:
    vectors = ffi.new("struct iovec[]", len(pins))
    for index, pin in enumerate(pins):
        vectors[index].iov_base = pin
        vectors[index].iov_len = len(pin)
    return _transfer(
        opcode,
        fd,
        vectors,
        len(pins),
        flags,
        offset,
        (vectors, *pins),
        cancellable=cancellable,
        exclusive=exclusive,
        in_worker=in_worker,
        buf_index=buf_index,
    )


def _transfer(
    opcode: int,
    fd: int,
    addr: CData | bytes,
    size: int,
    flags: int,
    offset: int,
    pins: tuple[object, ...],
    *,
    cancellable: bool | None = None,
    exclusive: Exclusive | None = None,
    in_worker: bool = False,
    buf_index: int = 0,
) -> Operation[int]:
    if cancellable is None:
        cancellable = _can_block(fd)
    return Operation(
        opcode,
        count,
        fd,
        addr,
        size,
        flags,
        signed_64_bits(offset),
        # Not for pipes: the worker only starts the kernel's poll. A cancellation just then fails
        # with EALREADY, and the operation goes on (Linux 6.18).
        _ASYNC if in_worker and not cancellable else 0,
        buf_index=buf_index,
        pins=pins,
        cancellable=cancellable,
        exclusive=exclusive,
        limited=not cancellable,
    )
