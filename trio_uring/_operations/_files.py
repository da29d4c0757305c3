"""The operations on open files, pipes and terminals, one function each.

Offsets are in bytes from the beginning of the file; -1 means the current file position, which
then moves, as with read(2) and write(2). Operations that overlap must not share a position.
Pipes and terminals have none: their offset is -1.

Reads and writes end by themselves on a regular file, and the kernel does not stop them midway,
so cancelling waits for them, as with a thread. Where they can block indefinitely (a pipe, a FIFO, a
terminal, a socket, an eventfd), they can be cancelled, and nothing is lost. Such an operation does
not count against ``RingConfig.max_file_operations``. By default the kind of file decides, when the
operation is created. ``cancellable=True`` or ``False`` saves asking the kernel for it, which takes
0.4 microseconds; with ``True``, only one task at a time may read, or write, the fd.
"""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

from trio_uring._kernel import CData, ffi, lib
from trio_uring._kernel.uapi import FsyncFlag, Opcode, SqeFlag

from ._operation import (
    Exclusive,
    Operation,
    as_address,
    count,
    nothing,
    pin_readable,
    pin_writable,
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
_DATASYNC = int(FsyncFlag.DATASYNC)

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

    Without *in_worker* the kernel copies what the page cache has while it takes the SQE, and
    nothing else runs meanwhile: 100 µs per MiB. With it, a kernel worker copies; without effect
    where it is cancellable.

    Completes with: the number of bytes; 0 at the end of the file.
    Fails with: ``EBADF``, ``EISDIR``, ``EIO``, ...: see pread(2); ``EAGAIN`` if nothing is there
      yet and *fd* is non-blocking (but no pipe: newer kernels wait for those all the same).
    If cancelled: it still completes, unless it can block indefinitely; nothing is lost.
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
    """Read at most *size* bytes from a file into a buffer that the kernel chooses.

    Memory is taken only when data is there: for pipes that are silent for long. If it is
    cancellable, only one task at a time may read the fd.

    Completes with: the bytes; empty at the end of the file.
    Fails with: as `read`; ``ENOBUFS`` if the group is empty (the data stays where it is).
    If cancelled: it still completes, unless it can block indefinitely; nothing is lost.
    Since: Linux 5.19. Source: io_uring_prep_read(3), io_uring_setup_buf_ring(3).
    """
    if cancellable is None:
        cancellable = bool(lib.can_block(fd))
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
    """Read from a file into *buffers*, one after the other; otherwise like `read`.

    Completes with: the number of bytes; 0 at the end of the file.
    Fails with: as `read`; ``EINVAL`` for more than 1024 buffers.
    If cancelled: it still completes, unless it can block indefinitely; nothing is lost.
    Since: Linux 5.1. Source: io_uring_prep_readv2(3), preadv2(2).
    """
    pins = [pin_writable(buffer) for buffer in buffers]
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
    fd: int, buffer: Buffer, offset: int, buf_index: int, flags: int = 0
) -> Operation[int]:
    """Read from a file into *buffer*, which lies within the registered buffer *buf_index*.

    Completes with: the number of bytes; 0 at the end of the file.
    Fails with: as `read`; ``EFAULT`` if *buffer* lies elsewhere, or nothing is registered there.
    If cancelled: it still completes.
    Since: Linux 5.1. Source: io_uring_prep_read_fixed(3).
    """
    pin = pin_writable(buffer)
    return _transfer(
        Opcode.READ_FIXED, fd, pin, size_of(pin), flags, offset, (pin,), buf_index=buf_index
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
    pins = [pin_writable(buffer) for buffer in buffers]
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

    A file opened with ``O_APPEND`` is appended to wherever *offset* points. *in_worker* as for
    `read`; many file systems need a worker anyway.

    Completes with: the number of bytes written: all, or fewer if the disk is full.
    Fails with: ``ENOSPC``, ``EFBIG``, ``EIO``, ``EBADF``, ...: see pwrite(2); ``EPIPE`` (the
      signal is sent, too; Python ignores it); ``EAGAIN`` as for `read`.
    If cancelled: it still completes, unless it can block indefinitely; then the number of bytes
      written so far, if any, is the result.
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
        (pin,),
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
    """Write *buffers* to a file, one after the other; otherwise like `write`.

    Completes with: the number of bytes written.
    Fails with: as `write`; ``EINVAL`` for more than 1024 buffers.
    If cancelled: as `write`.
    Since: Linux 5.1. Source: io_uring_prep_writev2(3), pwritev2(2).
    """
    pins = [ffi.from_buffer("char[]", buffer) for buffer in buffers]
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
    fd: int, data: Buffer, offset: int, buf_index: int, flags: int = 0
) -> Operation[int]:
    """Write *data*, which lies within the registered buffer *buf_index*, to a file.

    Completes with: the number of bytes written.
    Fails with: as `write`; ``EFAULT`` if *data* lies elsewhere, or nothing is registered there.
    If cancelled: it still completes.
    Since: Linux 5.1. Source: io_uring_prep_write_fixed(3).
    """
    pin = pin_readable(data)
    return _transfer(
        Opcode.WRITE_FIXED, fd, pin, size_of(pin), flags, offset, (pin,), buf_index=buf_index
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
    pins = [ffi.from_buffer("char[]", buffer) for buffer in buffers]
    return _vectored(Opcode.WRITEV_FIXED, fd, pins, flags, offset, buf_index=buf_index)


def fsync(fd: int, *, data_only: bool = False) -> Operation[None]:
    """Flush a file to the disk: its data and, unless *data_only*, its metadata.

    Completes with: nothing.
    Fails with: ``EIO``, ``ENOSPC``; ``EINVAL`` if *fd* cannot be synchronised.
    If cancelled: it still completes.
    Since: Linux 5.1. Source: io_uring_prep_fsync(3), fsync(2).
    """
    flags = _DATASYNC if data_only else 0
    return Operation(Opcode.FSYNC, nothing, fd, op_flags=flags, cancellable=False, limited=True)


def sync_file_range(fd: int, offset: int, size: int, flags: int) -> Operation[None]:
    """Start (*flags* 2), and wait for (1: before, 4: after), the write-back of dirty pages.

    From *offset*, *size* bytes, or to the end of the file if that is 0. No metadata is written,
    so this is no replacement for `fsync`.

    Completes with: nothing.
    Fails with: ``EIO``, ``ENOSPC``, ``ESPIPE``, ``EINVAL``: see sync_file_range(2).
    If cancelled: it still completes.
    Since: Linux 5.2. Source: io_uring_prep_sync_file_range(3), sync_file_range(2).
    """
    return Operation(
        Opcode.SYNC_FILE_RANGE,
        nothing,
        fd,
        len=size,
        op_flags=flags,
        off=signed_64_bits(offset),
        cancellable=False,
        limited=True,
    )


def fallocate(fd: int, offset: int, size: int, mode: int = 0) -> Operation[None]:
    """Reserve disk space for *size* bytes at *offset*, or with a *mode* do more to them.

    Modes are the ``FALLOC_FL_*`` of fallocate(2): 1 keeps the file's size, 3 punches a hole.

    Completes with: nothing.
    Fails with: ``ENOSPC``, ``EFBIG``, ``EOPNOTSUPP``, ``EINVAL``, ...: see fallocate(2).
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_fallocate(3), fallocate(2).
    """
    # The size travels in addr, and the mode in len.
    return Operation(
        Opcode.FALLOCATE,
        nothing,
        fd,
        as_address(signed_64_bits(size)),
        mode,
        off=signed_64_bits(offset),
        cancellable=False,
        limited=True,
    )


def fadvise(fd: int, offset: int, size: int, advice: int) -> Operation[None]:
    """Say how *size* bytes at *offset* (0: all that follow) will be used.

    *advice*: `os.POSIX_FADV_WILLNEED`, `os.POSIX_FADV_DONTNEED`, ...

    Completes with: nothing.
    Fails with: ``ESPIPE`` for a pipe; ``EINVAL``, on older kernels also for 4 GiB or more.
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_fadvise64(3), posix_fadvise(2).
    """
    # Older kernels want the size in len; newer ones also look in addr, which is wide enough.
    wide = size >= 1 << 32
    return Operation(
        Opcode.FADVISE,
        nothing,
        fd,
        as_address(signed_64_bits(size) if wide else 0),
        0 if wide else size,
        advice,
        signed_64_bits(offset),
        cancellable=False,
        limited=True,
    )


def ftruncate(fd: int, size: int) -> Operation[None]:
    """Make a file *size* bytes long, cutting it or filling it with zeros.

    Completes with: nothing.
    Fails with: ``EINVAL``, ``EFBIG``, ``EBADF``, ...: see ftruncate(2).
    If cancelled: it still completes.
    Since: Linux 6.9. Source: io_uring_prep_ftruncate(3), ftruncate(2).
    """
    off = signed_64_bits(size)
    return Operation(Opcode.FTRUNCATE, nothing, fd, off=off, cancellable=False, limited=True)


def splice(
    fd_in: int,
    fd_out: int,
    size: int,
    *,
    offset_in: int = -1,
    offset_out: int = -1,
    flags: int = 0,
) -> Operation[int]:
    """Move at most *size* bytes from one file to another without copying; one is a pipe.

    *flags*: `os.SPLICE_F_MOVE`, `os.SPLICE_F_MORE`. A splice that has to wait for the pipe
    occupies a kernel worker meanwhile.

    Completes with: the number of bytes; 0 at the end of the input.
    Fails with: ``EINVAL`` if neither is a pipe, ``ESPIPE``, ``EPIPE``, ...: see splice(2).
    If cancelled: what was moved so far stays moved, and its number is the result, if any.
    Since: Linux 5.7. Source: io_uring_prep_splice(3), splice(2).
    """
    # The input's offset travels in addr.
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
    """Duplicate at most *size* bytes from one pipe into another, leaving them in the first.

    Waits, as `splice` does, in a kernel worker.

    Completes with: the number of bytes; 0 at the end of the input.
    Fails with: ``EINVAL`` if they are not two pipes, ``EPIPE``: see tee(2).
    If cancelled: nothing is lost.
    Since: Linux 5.8. Source: io_uring_prep_tee(3), tee(2).
    """
    return Operation(
        Opcode.TEE, count, fd_out, len=size, op_flags=flags, splice_fd_in=fd_in, second_fd=fd_in
    )


def pipe(flags: int = 0) -> Operation[tuple[int, int]]:
    """Create a pipe. *flags*: `os.O_NONBLOCK`, ...; child processes do not inherit it.

    Completes with: the fd to read from and the fd to write to, which the caller owns.
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
        0,  # the kernel insists
        pin,
        op_flags=flags | os.O_CLOEXEC,
        pins=(pin,),
        cancellable=False,
        discard=discard,
    )


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
        cancellable = bool(lib.can_block(fd))
    return Operation(
        opcode,
        count,
        fd,
        addr,
        size,
        flags,
        signed_64_bits(offset),
        # A worker that is sent to a pipe has the kernel wait for it instead. A cancellation that
        # comes just then is lost, and answered with EALREADY (Linux 6.18).
        _ASYNC if in_worker and not cancellable else 0,
        buf_index=buf_index,
        pins=pins,
        cancellable=cancellable,
        exclusive=exclusive,
        limited=not cancellable,
    )
