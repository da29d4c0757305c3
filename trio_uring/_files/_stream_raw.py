"""`StreamRaw`: what is read ahead of an `io.FileIO`, and written behind. See `_stream_file`.

Its methods replace those of the file, in the file's instance. In a synchronous call they do what
the file's own methods do, after what is left in *ahead* or *behind*.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections import deque
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Final, TypeVar
from weakref import ref

from ._needs import READ_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

T = TypeVar("T")

_file_io: Final = io.FileIO
_RWF_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 8)
_HERE: Final = -1  # as an offset: the file has no position


class DryError(Exception):
    """The call needs more than what it may have."""


class NeedsThreadError(Exception):
    """The call must be made in a thread."""


class StreamRaw:
    """What is read ahead of a file, and what is to be written behind.

    Args:
      raw: The file, over a pipe, a socket or a terminal.
      fd: Its fd.

    Attributes:
      ahead: What has been read and not yet been given to *raw*'s callers.
      ended: Whether the read after that has found the end.
      scanned: How much of *ahead* was searched for the end of a line.
      by_line: Whether a call that is made in a thread gets one line at a time.
      clean: A text file that has no text left over.
      inside: The threads that are inside a blocking call, with the lock of the buffered file.
      has_nowait: Whether the kernel has RWF_NOWAIT for pipes.
      end_given: Whether the last `run` got to the end.
    """

    def __init__(self, raw: io.FileIO, fd: int) -> None:
        self.fd = fd
        self.ahead = bytearray()
        self.ended = False
        self.scanned = 0
        self.by_line = False
        self.clean: ref[io.TextIOWrapper] | None = None
        self.inside: list[int] = []
        self.has_nowait = True
        self.end_given = False

        self._raw = ref(raw)  # as it refers to this object
        self._behind: deque[bytes] = deque()  # not joined, as small writes to pipes are atomic
        self._lock = threading.Lock()  # for what is ahead and behind
        # During `run`: its thread, its fd, how many bytes it may still have, and what it has got.
        self._thread: int | None = None
        self._fd = -1
        self._allowed = 0
        self._handed = bytearray()
        vars(raw).update(
            readinto=self._readinto, read=self._read, readall=self._readall, write=self._write
        )

    def is_closed(self) -> bool:
        """Whether the file is closed."""
        raw = self._raw()
        return raw is None or raw.closed

    def run(self, fd: int, allowed: int, method: Callable[..., T], args: tuple[object, ...]) -> T:
        """Call *method* of a file above. It does not block.

        Args:
          fd: What it writes to.
          allowed: How many bytes of *ahead* it may have; -1 for none, and not the end either.
          method: The bound method.
          args: Its arguments.

        Raises:
          DryError: it needs more than that.
        """
        self._allowed, self._fd, self.end_given = allowed, fd, False
        self._handed.clear()
        self._thread = get_ident()
        try:
            value = method(*args)
        finally:
            self._thread = None
        if self.end_given:
            self.ended = False
        return value

    def begin_by_line(self) -> None:
        """Let the call that is made in a thread next get one line at a time."""
        self._handed.clear()
        self.by_line, self.end_given = True, False

    def gave_all(self, line: str) -> bool:
        """Whether the text file that has returned *line* has kept no text of what it got for it."""
        whole = self.end_given or (self._handed.endswith(b"\n") and line.endswith("\n"))
        return whole and not has_bare_cr(self._handed)

    # ---- Reading ---------------------------------------------------------------------------

    def read_ahead(self, fd: int, size: int) -> bool:
        """Read at most *size* bytes, or find the end. Return False if that would block."""
        try:
            if fd != self.fd:
                data: bytes | memoryview = os.read(fd, size)
            else:
                buffer = bytearray(size)
                data = memoryview(buffer)[: os.preadv(fd, (buffer,), _HERE, _RWF_NOWAIT)]
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            self.has_nowait = False
            raise NeedsThreadError from None
        with self._lock:
            self.ahead += data
            self.ended = not data
        return True

    def put_first(self, data: bytes | bytearray) -> None:
        """Put *data* before what is ahead."""
        with self._lock:
            self.ahead[:0] = data
            self.scanned = 0

    def put_back(self) -> None:
        """Put back what the method that `run` has called got, and has forgotten."""
        self.put_first(self._handed)

    def _readinto(self, buffer: Buffer, /) -> int | None:
        with memoryview(buffer) as whole, whole.cast("B") as view:
            if self._thread == get_ident():
                return self._hand_out(view)
            self.clean = None
            count = self._take(view)
            if count is not None:
                return count
            if not self.by_line:
                return self._block_for(_file_io.readinto, view)
            piece = bytearray(READ_SIZE)
            size = self._block_for(_file_io.readinto, piece)
            if size is None:
                return None
            with self._lock:
                self.ahead += piece[:size]
                self.ended = not size
            return self._take(view)

    def _hand_out(self, view: memoryview) -> int:
        """Give the method that `run` has called what it may have."""
        if not view.nbytes:
            return 0
        with self._lock:
            count = min(view.nbytes, self._allowed, len(self.ahead))
            if count <= 0:
                if self._allowed < 0 or self.ahead or not self.ended:
                    raise DryError
                self.end_given = True
                return 0
            view[:count] = self.ahead[:count]
            self._handed += self.ahead[:count]
            del self.ahead[:count]
            self._allowed -= count
            return count

    def _take(self, view: memoryview) -> int | None:
        """Read what is ahead in a synchronous call. Return None if there is nothing."""
        with self._lock:
            if not self.ahead:
                ended, self.ended = self.ended, False
                return 0 if ended else None
            count = min(view.nbytes, len(self.ahead))
            if self.by_line:
                count = self.ahead.find(b"\n", 0, count) + 1 or count
                self._handed[:] = self.ahead[:count]
            view[:count] = self.ahead[:count]
            del self.ahead[:count]
            self.scanned = 0
            return count

    def _read(self, size: int | None = -1, /) -> bytes | None:
        if size is None or size < 0:
            return self._readall()
        buffer = bytearray(size)
        count = self._readinto(buffer)
        return None if count is None else bytes(buffer[:count])

    def _readall(self) -> bytes | None:
        with self._lock:
            in_run = self._thread == get_ident()
            if in_run and (self._allowed < 0 or not self.ended):
                raise DryError
            data, ended = bytes(self.ahead), self.ended
            self.ahead.clear()
            self.scanned, self.ended = 0, in_run
        if in_run:
            self.end_given = True
        if ended:
            return data
        self.clean = None
        rest = self._block_for(_file_io.readall)
        return data + rest if rest else data or rest

    # ---- Writing ---------------------------------------------------------------------------

    def push(self, fd: int) -> bool:
        """Write what the kernel accepts now to *fd*; return whether that was everything."""
        if not self._behind:
            return True
        if not self._lock.acquire(blocking=False):  # another thread writes it
            return False
        try:
            while self._behind:
                self._note_written(self._write_now(fd, self._behind[0]))
        except BlockingIOError:
            return False
        finally:
            self._lock.release()
        return True

    def write_behind(self) -> None:
        """Write everything, and block for it."""
        with self._lock:
            while self._behind:
                self._note_written(os.write(self.fd, self._behind[0]))

    def _note_written(self, count: int) -> None:
        first = self._behind.popleft()
        if count < len(first):
            self._behind.appendleft(first[count:])

    def _write_now(self, fd: int, data: Buffer) -> int:
        if fd != self.fd:
            return os.write(fd, data)
        try:
            return os.pwritev(fd, (data,), _HERE, _RWF_NOWAIT)
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            self.has_nowait = False
            raise BlockingIOError from None

    def _write(self, data: Buffer, /) -> int | None:
        if self._thread != get_ident():
            return self._block_for(self._write_in_order if self._behind else _file_io.write, data)
        with memoryview(data) as whole, whole.cast("B") as view, self._lock:
            count = 0
            if not self._behind:
                with suppress(BlockingIOError):
                    count = self._write_now(self._fd, view)
            if count < view.nbytes:
                self._behind.append(bytes(view[count:]))
            return view.nbytes

    def _write_in_order(self, raw: io.FileIO, data: Buffer) -> int | None:
        self.write_behind()
        return _file_io.write(raw, data)

    def _block_for(self, method: Callable[..., T], *args: object) -> T:
        """Call a method of `io.FileIO`, which may block, and note that a thread is inside."""
        self.inside.append(get_ident())
        try:
            # The reference is dead if the garbage collector finalizes the buffered file.
            return method(self._raw() or _file_io(self.fd, "r+", closefd=False), *args)
        finally:
            self.inside.pop()


def has_bare_cr(line: bytearray) -> bool:
    """Whether *line* has a carriage return elsewhere than in a line end at its end."""
    return b"\r" in bytes(line).removesuffix(b"\n").removesuffix(b"\r")
