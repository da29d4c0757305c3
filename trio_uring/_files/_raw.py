"""`RingFileIO`: the raw file, which performs operations on the ring when it runs on a bridge.

Everywhere else it behaves as `io.FileIO` and blocks: in a worker thread, in plain synchronous code,
and in a finaliser that happens to run inside another file's call.

The file position
-----------------

Facts. The position belongs to the open file description. A duplicate of the fd moves it too:
``2>&1``, a child process, a thread. read(2) and write(2) hold a lock from reading the position
until they have moved it. No operation of io_uring takes that lock. An operation with offset -1
reads the position when it begins and sets it when it ends. It doesn't set it after a write that was
short because the disk was full (Linux 6.18: io_kiocb_update_pos and kiocb_done in io_uring/rw.c).
A write in a kernel worker on ext4 takes 15 microseconds with 16 tasks, and 75 with one. In a
thread it takes 107 and 135.

What does this mean for us? A private file uses the ring. A file is private if we opened it by its
path, nobody has asked for its fd (`RingFileIO.fileno`), and the process has not forked since. Only
one call at a time is inside a file, so nothing else moves the position. Each operation has an
explicit offset, except appending writes. A write moves the position before it begins, so that
whoever gets the fd meanwhile writes behind it. A file that others may share is read and written by
read(2) and write(2), in a thread, in one call. Pipes and terminals have no position.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from trio.lowlevel import ParkingLot

from trio_uring import _operations as operations
from trio_uring._engine._file_systems import FileSystem, file_system_of
from trio_uring._errors import UnsupportedOpcodeError
from trio_uring._kernel import native, why_no_native

from ._bridge import current_bridge, getcurrent

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from trio_uring._operations import Operation

    from ._bridge import GreenletBridge
    from ._hits import PythonHit

# In bytes. A kernel worker performs larger transfers, so that copying does not block the event
# loop. Copying 256 KiB takes 25 microseconds, and handing it to a worker takes about as long. At
# double, many such reads would noticeably delay the loop. At half, handing over would cost more
# than the copy.
IN_WORKER_MIN: Final = 256 * 1024

_RWF_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 8)
_HERE: Final = -1  # as an offset: the file's position, which moves

# The size of each read, in bytes, if a read to the end cannot know the size: of a pipe, or of a
# file that is longer than its size says. Zeroing this much memory takes 0.4 microseconds.
_PIECE_SIZE: Final = 16384

_file_io: Final = io.FileIO
_fileno: Final = _file_io.fileno


class _Forks:
    """Knows whether this process has forked. A file is shared with each child forked since.

    Attributes:
      era: An object that stands for the time since the last fork.
    """

    def __init__(self) -> None:
        self.begin_era()

    def begin_era(self) -> None:
        """Note that the process is about to fork."""
        self.era = object()
        if not why_no_native:
            native.set_era(self.era)


forks: Final = _Forks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=forks.begin_era)


class RingFileIO(io.FileIO):
    """An `io.FileIO` that uses the ring while its `bridge` runs a call on it."""

    bridge: GreenletBridge | None = None

    # Only one call at a time is inside a file, in FIFO order, by whatever route it runs: the C
    # layers raise on re-entry from one thread, while a second thread would wait.
    busy = False
    waiters: ParkingLot | None = None

    closing = False  # a task waits to close the file
    used_ring = False
    _era: object = None  # the era in which the file is private

    # For hits; see `_hits`. The native engine reads these, and `busy`, from the instance.
    direct: object = None  # the era in which the file may be read without a bridge
    lines = 0  # how many lines, at least, are decoded and not yet read
    hit: PythonHit | None = None  # what reads it now without waiting
    counts_lines = False  # whether each newline byte ends a line of text

    _streams: bool | None = None
    appends: bool | None = None
    _ended = False  # whether the last read reached the end of the file
    written = 0

    # Whether small transfers are tried without the ring first, by a non-blocking system call: it
    # succeeds for data in the page cache, or in a pipe. A file system that doesn't support such
    # calls fails with EOPNOTSUPP. Then only files in memory are tried.
    _nowait_read = True
    nowait_write = True
    nowait_flags = _RWF_NOWAIT

    def __init__(
        self,
        file: str | bytes | int,
        mode: str = "r",
        closefd: bool = True,  # noqa: FBT001, FBT002 (FileIO's signature)
        opener: Callable[[Any, int], int] | None = None,
    ) -> None:
        _file_io.__init__(self, file, mode, closefd, opener)
        self.file_system = file_system_of(_fileno(self))
        bridge = current_bridge()
        if bridge is not None:
            bridge.adopt(self)

    async def acquire(self) -> None:
        """Wait until no other task uses the file, and take it. If cancelled, it is not taken."""
        if self.waiters is None:
            self.waiters = ParkingLot()
        await self.waiters.park()  # release() hands it over

    def release(self) -> None:
        """Hand the file to the first waiter, if there is one."""
        if self.waiters:
            self.waiters.unpark()
        else:
            self.busy = False

    def set_private(self, *, is_regular: bool = False) -> None:
        """Note that the file is private: nobody else has it open or can move its position."""
        self._era = forks.era
        if is_regular:
            self._streams = False
        if self._nowait_read and self.file_system is not FileSystem.SERVER and not self.is_stream:
            self.direct = self._era
            if self.file_system is FileSystem.MEMORY:
                self._is_memory(_fileno(self))

    @property
    def is_shared(self) -> bool:
        """Return whether others may have the file open too, and move its position."""
        return self._era is not forks.era and not self.is_stream

    def fileno(self) -> int:
        """See `io.IOBase.fileno`. The file is not private from now on."""
        self._era = self.direct = None
        return _fileno(self)

    @property
    def is_stream(self) -> bool:
        """Whether it has no position and can block indefinitely: a pipe, a terminal, ..."""
        if self._streams is None:
            # Not `seekable`: if the first seek fails, for example because of a negative position,
            # `io.FileIO` concludes that the file is not seekable.
            try:
                os.lseek(_fileno(self), 0, os.SEEK_CUR)
                self._streams = False
            except OSError:
                self._streams = True
        return self._streams

    def size_left(self) -> int:
        """Return the number of bytes from the position to the end of the file; 0 if unknown."""
        try:
            return max(os.fstat(_fileno(self)).st_size - self.tell(), 0)
        except (OSError, ValueError):  # not seekable, or closed
            return 0

    # If one of these is false, the call goes to FileIO, which raises its own errors.

    def _may_read(self) -> bool:
        return not self.closed and self.readable()

    def _may_write(self) -> bool:
        return not self.closed and self.writable()

    # ---- Reading ---------------------------------------------------------------------------

    def readinto(self, buffer: Buffer, /) -> int | None:
        """See `io.RawIOBase.readinto`."""
        if self.hit is not None:
            return self.hit.readinto(buffer)
        bridge = self.bridge
        if bridge is None or getcurrent() is not bridge or not self._may_read():
            return _file_io.readinto(self, buffer)
        if type(buffer) is not memoryview:  # the buffered layers pass a memoryview
            buffer = memoryview(buffer)
        if buffer.readonly or not buffer.c_contiguous:
            return _file_io.readinto(self, buffer)
        count = self._read(bridge, buffer)
        if count and self.counts_lines:
            self.lines += bytes(buffer[:count]).count(b"\n")
        return count

    def read(self, size: int | None = -1, /) -> bytes | None:  # type: ignore[override]
        """See `io.RawIOBase.read`."""
        bridge = self.bridge
        if bridge is None or getcurrent() is not bridge or not self._may_read():
            return _file_io.read(self, size)
        if size is None:
            size = -1
        if type(size) is not int or size == 0:
            return _file_io.read(self, size)
        if size < 0:
            return self.readall()
        return self._read_bytes(bridge, size)

    def readall(self) -> bytes | None:  # type: ignore[override]
        """See `io.RawIOBase.readall`."""
        if self.hit is not None:
            return self.hit.readall()
        bridge = self.bridge
        if bridge is None or getcurrent() is not bridge or not self._may_read():
            return _file_io.readall(self)
        if self.is_shared:
            return bridge.call_in_thread(partial(_file_io.readall, self))
        self._ended = False
        # Most files fit into this. Asking for the size first takes as long as reading them.
        scratch = bridge.files.scratch
        data: bytes | None = bytes(scratch[: self._read_at_once(bridge, scratch)])
        if not data and not self._ended:
            data = self._read_bytes(bridge, _PIECE_SIZE)
        if not data or self._ended:
            return data
        # Not cancellable from here on, or *data* would be lost.
        cancellable, bridge.cancellable = bridge.cancellable, False
        try:
            return self._read_on(bridge, data)
        finally:
            bridge.cancellable = cancellable

    def _read_on(self, bridge: GreenletBridge, data: bytes) -> bytes:
        """Return *data* and all that follows it. A file can be longer than its size says."""
        size = self.size_left()
        if size:
            # Read into the memory of the result, which saves a copy (30 ms for 64 MiB). A page of
            # it is allocated only when the kernel writes to it.
            whole = io.BytesIO(bytes(len(data) + size))
            with whole.getbuffer() as view:
                view[: len(data)] = data
                count = self._read(bridge, view[len(data) :])
            whole.truncate(len(data) + (count or 0))
            data = whole.getvalue()
        rest = bytearray()
        while not self._ended:
            more = self._read_bytes(bridge, max(len(rest), _PIECE_SIZE))
            if not more:
                break
            rest += more
        return data + rest if rest else data

    def _read_bytes(self, bridge: GreenletBridge, size: int) -> bytes | None:
        """Read once, at most *size* bytes."""
        if size <= IN_WORKER_MIN:
            buffer = bytearray(size)
            count = self._read(bridge, memoryview(buffer))
            return None if count is None else bytes(memoryview(buffer)[:count])
        result = io.BytesIO(bytes(size))
        with result.getbuffer() as view:
            count = self._read(bridge, view)
        if count is None:
            return None
        result.truncate(count)
        return result.getvalue()

    def _read(self, bridge: GreenletBridge, view: memoryview) -> int | None:
        """Read like read(2). Return None if the fd is non-blocking and has no data."""
        if self.is_shared:
            return bridge.call_in_thread(partial(_file_io.readinto, self, view))
        done = self._read_at_once(bridge, view)
        if done == view.nbytes or self._ended or (done and self.is_stream):
            return done
        return self._read_on_ring(bridge, view[done:] if done else view, done)

    def _read_at_once(self, bridge: GreenletBridge, view: memoryview) -> int:
        """Read what is in the page cache or in the pipe, and note if the file ended there."""
        self._ended = False
        size = view.nbytes
        if not self._nowait_read or size > bridge.budget:
            return 0
        fd = _fileno(self)
        done = 0
        try:
            while done < size:
                part = view[done:] if done else view
                count = os.preadv(fd, (part,), _HERE, self.nowait_flags)
                if count == 0:
                    self._ended = True
                    break
                done += count
                bridge.budget -= count
                if done < size and self.is_stream:
                    break
                # A short read: the file, or its part in the page cache, ends here.
        except BlockingIOError:
            pass
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                self._nowait_read = bool(self.nowait_flags) and self._is_memory(fd)
                if not self._nowait_read:
                    self.direct = None
                return self._read_at_once(bridge, view)
            if not done:  # otherwise the next read gets the error again
                raise
        return done

    def _is_memory(self, fd: int) -> bool:
        """Return whether to try without RWF_NOWAIT: for files in memory, but not FIFOs there."""
        in_memory = self.file_system is FileSystem.MEMORY
        if in_memory and stat.S_ISREG(os.fstat(fd).st_mode):
            self.nowait_flags = 0
            return True
        return False

    def _read_on_ring(self, bridge: GreenletBridge, view: memoryview, done: int) -> int | None:
        try:
            while True:
                if not self.is_stream:
                    return done + self._read_at_position(bridge, view)
                if not os.get_blocking(_fileno(self)):  # the ring would ignore O_NONBLOCK and wait
                    return _file_io.readinto(self, view)
                operation = operations.read(_fileno(self), view, _HERE, cancellable=True)
                try:
                    return done + self._wait(bridge, operation)
                except InterruptedError:
                    continue
        except BlockingIOError:
            return done or None
        except OSError:
            if done:  # the next read gets the error again
                return done
            raise

    def _read_at_position(self, bridge: GreenletBridge, view: memoryview) -> int:
        in_worker = view.nbytes > IN_WORKER_MIN
        position = self.tell()
        self.used_ring = True
        count = bridge.perform(
            operations.read(_fileno(self), view, position, cancellable=False, in_worker=in_worker)
        )
        _file_io.seek(self, count, os.SEEK_CUR)
        return count

    def _wait(self, bridge: GreenletBridge, operation: Operation[int]) -> int:
        """Perform a transfer that can block indefinitely."""
        if self.closing:
            raise ValueError("I/O operation on closed file")
        operation.exclusive = None  # as several threads may wait for the same pipe
        try:
            if bridge.cancellable:
                return bridge.perform_cancellable(operation)
            return bridge.perform(operation)
        except trio.ClosedResourceError:
            raise ValueError("I/O operation on closed file") from None

    # ---- Writing ---------------------------------------------------------------------------

    def write(self, data: Buffer, /) -> int | None:  # type: ignore[override]
        """See `io.RawIOBase.write`."""
        bridge = self.bridge
        if bridge is None or getcurrent() is not bridge or not self._may_write():
            return _file_io.write(self, data)
        try:
            view = memoryview(data)
        except TypeError:
            return _file_io.write(self, data)
        if not view.nbytes or not view.c_contiguous:
            return _file_io.write(self, data)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        written = self._write(bridge, view)
        self.written += written or 0
        return written

    def _write(self, bridge: GreenletBridge, view: memoryview) -> int | None:
        """Write like write(2). Return None if the fd is non-blocking and has no room."""
        if self.is_shared:
            return bridge.call_in_thread(partial(_file_io.write, self, view))
        size = view.nbytes
        done = 0
        while self._may_write_at_once() and size <= bridge.budget:
            try:
                done = os.pwritev(_fileno(self), (view,), _HERE, self.nowait_flags)
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self.nowait_write = bool(self.nowait_flags) and self._is_memory(_fileno(self))
                continue
            bridge.budget -= done
            break
        while done < size:
            if self.is_stream and not os.get_blocking(_fileno(self)):
                return done + (_file_io.write(self, view[done:]) or 0) or None
            try:
                done += self._write_on_ring(bridge, view[done:] if done else view)
            except InterruptedError:
                continue
            except BlockingIOError:
                return done or None
            except (OSError, trio.Cancelled) as exc:
                if done:  # report what was written; the next write gets the error again
                    return done
                if isinstance(exc, OSError) and exc.errno == errno.EFBIG:
                    # SIGXFSZ is delivered to the kernel worker, and lost. A thread's is not.
                    return bridge.call_in_thread(partial(_file_io.write, self, view))
                raise
            if not self.is_stream:
                break
        return done

    def _may_write_at_once(self) -> bool:
        """Return whether to try a non-blocking write first.

        Not for an appending write: it could be short, and another process could append to the file
        before the rest is written. Files in memory are written completely.
        """
        if self.appends is None:
            self.appends = bool(fcntl.fcntl(_fileno(self), fcntl.F_GETFL) & os.O_APPEND)
            if self.appends and not self.is_stream:
                self.nowait_write = self._is_memory(_fileno(self))
        return self.nowait_write

    def _write_on_ring(self, bridge: GreenletBridge, view: memoryview) -> int:
        fd = _fileno(self)
        if self.is_stream:
            return self._wait(bridge, operations.write(fd, view, _HERE, cancellable=True))
        self.used_ring = True
        size = view.nbytes
        in_worker = size > IN_WORKER_MIN
        if self.appends:
            count = bridge.perform(
                operations.write(fd, view, _HERE, cancellable=False, in_worker=True)
            )
            if count < size:
                _file_io.seek(self, 0, os.SEEK_END)
            return count
        # In /proc and /sys a position is not a number of bytes.
        end = 0 if self.file_system is FileSystem.KERNEL else self._move(size)
        if end < size:  # also a device without positions, or beyond the largest file size
            return bridge.call_in_thread(partial(_file_io.write, self, view)) or 0
        position = end - size
        count = 0
        try:
            count = bridge.perform(
                operations.write(fd, view, position, cancellable=False, in_worker=in_worker)
            )
        finally:
            if count < size and self.tell() == end:
                _file_io.seek(self, position + count)
        return count

    def _move(self, size: int) -> int:
        """Move the position forward by *size*, and return it; 0 if that is not possible."""
        try:
            return _file_io.seek(self, size, os.SEEK_CUR)
        except OSError:
            return 0

    def truncate(self, size: int | None = None, /) -> int:
        """See `io.IOBase.truncate`."""
        bridge = self.bridge
        if bridge is None or getcurrent() is not bridge or not self._may_write():
            return _file_io.truncate(self, size)
        if size is None:
            size = self.tell()
        if type(size) is not int or not -(1 << 63) <= size < 1 << 63:
            return _file_io.truncate(self, size)
        self.used_ring = True
        try:
            bridge.perform(operations.ftruncate(_fileno(self), size))
        except OSError as exc:
            # There is no FTRUNCATE before Linux 6.9. SIGXFSZ would be lost in a kernel worker.
            if exc.errno != errno.EFBIG and not isinstance(exc, UnsupportedOpcodeError):
                raise
            return bridge.call_in_thread(partial(_file_io.truncate, self, size))
        return size

    def sync(self, *, data_only: bool) -> None:
        """Call `os.fsync`, or `os.fdatasync` if *data_only*."""
        fd = _fileno(self)  # not `fileno`, as the file remains private
        bridge = self.bridge
        if bridge is not None and getcurrent() is bridge:
            self.used_ring = True
            bridge.perform(operations.fsync(fd, data_only=data_only))
        elif data_only:
            os.fdatasync(fd)
        else:
            os.fsync(fd)

    # ---- Closing ---------------------------------------------------------------------------

    # When close(2) takes long
    # ------------------------
    #
    # Facts. Each close(2) of a file on NFS, SMB or FUSE first sends what was written. It can take
    # seconds, and reports the errors of those writes. The last close also releases the file: ext4
    # then starts the write-back of a file that was truncated and rewritten. An IORING_OP_CLOSE in a
    # kernel worker completes before that: the worker releases the file when it is idle (Linux
    # 6.18: __fput is its task work). Until then the file cannot be executed (ETXTBSY), and its file
    # system cannot be unmounted. A read or write in a worker may hold the file for a moment after
    # it completed, until the next io_uring_enter (DEFER_TASKRUN): one in 2,000 files of 1000 bytes.
    #
    # What does this mean for us? A file on such a file system is closed in a thread, and so is a
    # file to which much was written. All others are closed directly. If they used the ring, an
    # io_uring_enter follows.

    def close(self) -> None:
        """See `io.IOBase.close`."""
        bridge = self.bridge
        if bridge is None or getcurrent() is not bridge or self.closed:
            return _file_io.close(self)
        try:
            if self.written > IN_WORKER_MIN or self.file_system is FileSystem.SERVER:
                bridge.call_in_thread(partial(_file_io.close, self))
        finally:
            _file_io.close(self)  # does nothing if the thread has closed it
            if self.used_ring:
                bridge.manager.ring.flush()
        return None
