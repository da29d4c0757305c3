"""Pipes, sockets and terminals below files that the program has opened itself, such as `sys.stdin`.

How they are read and written without a thread
----------------------------------------------

Facts. Standard input and output are often shared with other processes, and so is their O_NONBLOCK
flag. preadv2(2) and pwritev2(2) with RWF_NOWAIT do not block on pipes (Linux 6.4) and sockets,
whatever the flag says. Terminals do not support it, and a read(2) after poll(2) blocks if another
process takes the input first. But /proc/self/fd opens the same terminal again, with a flag of its
own. CPython's buffered files look up the methods of their raw file in its instance first. They hold
a lock while they call it, and a second call in the same thread then fails. If the raw file raises,
a buffered or text file forgets what that call has read so far. A text file that got bytes only up
to the end of the line that it returned has no text left over. Its ``readline(0)`` consumes nothing,
and asks for bytes only if no text is left over.

What does this mean for us? `StreamRaw` puts methods of its own into the instance of `io.FileIO`. A
call that reads first waits in its task, without a lock, until all that it needs is in memory, in
*ahead*. Then the file's method is called directly, and finds everything there. While the call
waits, no read is in flight, so no byte is taken that nobody asks for. A call that is cancelled
leaves what has arrived in *ahead*, which the next one, also a synchronous one, reads first.

A call that writes is made directly, too. What the kernel does not accept at once is kept in
*behind*. The call does not end, and cannot be cancelled, before that is written. Whoever writes to
the file synchronously in the meantime writes *behind* first, so that nothing is interleaved.

Everything else goes to a thread: fds that somebody has made non-blocking, where CPython's files
behave differently; text in other encodings; calls on a text file that has text left over, of which
we do not know how much, or a bare carriage return, of which we do not know whether it ends a line;
the first call on a file if other threads exist, of which one may be inside it already.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
import threading
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import ref

import trio
from trio.lowlevel import ParkingLot, checkpoint_if_cancelled, current_task, enable_ki_protection

from trio_uring import _operations as operations
from trio_uring._engine._file_systems import FileSystem, file_system_of
from trio_uring._trio_private import at_cancel_point, schedule_point

from ._methods import is_long_write
from ._needs import need_of
from ._open import OPEN_FILES, has_ascii_line_ends
from ._paths import TEXT_MAX
from ._stream_raw import DryError, NeedsThreadError, StreamRaw, has_bare_cr

if sys.platform != "win32":
    import termios

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ._bridge import FilesRun

T = TypeVar("T")

_KEY: Final = "_trio_uring"  # in the instance of the raw file: its `StreamFile`
_PTMX: Final = (5, 2)  # the device that makes a new terminal each time it is opened
_CLOSED: Final = "I/O operation on closed file."

READS: Final = frozenset(
    ("peek", "read", "read1", "readall", "readinto", "readinto1", "readline", "readlines")
)
WRITES: Final = frozenset(("flush", "write", "writelines"))


# What a subclass of `io.TextIOWrapper` must not have changed. The MCP SDK's has its own `close`.
_OF_TEXT: Final = (
    *("__iter__", "__next__", "buffer", "closed", "encoding", "flush", "read", "readable"),
    *("readline", "readlines", "writable", "write", "writelines"),
)


@cache
def _is_text(kind: type) -> bool:
    """Whether files of class *kind* read and write as `io.TextIOWrapper` does."""
    wrapper = io.TextIOWrapper
    return issubclass(kind, wrapper) and all(
        getattr(kind, name) is getattr(wrapper, name) for name in _OF_TEXT
    )


def raw_below(file: object) -> io.FileIO | None:
    """Return the `io.FileIO`, of exactly that class, below *file*."""
    try:
        if isinstance(file, io.TextIOWrapper) and _is_text(type(file)):
            file = file.buffer
        if type(file) is io.BufferedReader or type(file) is io.BufferedWriter:
            file = file.raw
    except ValueError:  # detached
        return None
    return file if type(file) is io.FileIO else None


def stream_file(file: object) -> StreamFile | None:
    """Return the `StreamFile` of the raw file below *file*; None if that is no stream."""
    raw = raw_below(file)
    if raw is None or raw.closed:
        return None
    found = vars(raw).get(_KEY)
    if found is None:
        fd = io.FileIO.fileno(raw)
        try:
            mode = _status_of(fd).st_mode
        except OSError:
            return None
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)):
            return None
        found = vars(raw)[_KEY] = StreamFile(StreamRaw(raw, fd))
    assert isinstance(found, StreamFile)
    return found


def _status_of(fd: int) -> os.stat_result:
    """Return the status of *fd*.

    Raises:
      OSError: there is no such fd, or a server would be asked for its status.
    """
    if file_system_of(fd) is FileSystem.SERVER:
        raise OSError(errno.EREMOTE, os.strerror(errno.EREMOTE))
    return os.fstat(fd)


def stream_call(
    files: FilesRun,
    file: object,
    name: str,
    args: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> Callable[[], Awaitable[Any]] | None:
    """Return how to call the method *name* of *file*; None if it must go to a thread."""
    if keywords or not (name in READS or name in WRITES or name == "close"):
        return None
    stream = stream_file(file)
    if stream is None:
        return None
    if name == "close":
        return partial(stream.close, files, file)
    if isinstance(file, io.TextIOWrapper) and not has_ascii_line_ends(file.encoding):
        return None
    return partial(stream.call, files, file, name, args)


class _Side:
    """Reading, or writing: only one call at a time.

    Attributes:
      user: The run whose call has the turn.
      fd: What a call waits for; -1 if none does.
    """

    def __init__(self) -> None:
        self.user: FilesRun | None = None
        self.fd = -1
        self._waiters = ParkingLot()

    async def acquire(self, files: FilesRun) -> bool:
        """Wait for the turn, and take it. Return False if another run has it."""
        if self.user is None:
            self.user = files
        elif self.user is files:
            await self._waiters.park()  # release() hands it over
        return self.user is files

    def release(self) -> None:
        if self._waiters:
            self._waiters.unpark()
        else:
            self.user = None


class StreamFile:
    """The calls of tasks on files over one pipe, socket or terminal.

    Args:
      raw: What is below the files.
    """

    def __init__(self, raw: StreamRaw) -> None:
        self._raw = raw
        self._reading, self._writing = _Side(), _Side()
        self._is_new = True  # whether a thread may have been inside before we noted that

    @enable_ki_protection
    async def call(
        self,
        files: FilesRun,
        file: Any,  # noqa: ANN401 (a file of one of four classes)
        name: str,
        args: tuple[Any, ...],
    ) -> Any:  # noqa: ANN401 (what the method returns)
        """Call the method *name* of *file*. Only reading can be cancelled, and loses nothing."""
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        side = self._reading if name in READS else self._writing
        if not await side.acquire(files):
            return await files.call_in_thread(getattr(file, name), args)
        try:
            made = await self._call_directly(files, file, name, args)
            if made is None:
                return await self._call_in_thread(files, file, name, args)
        finally:
            side.release()
        value, waited = made
        if waited:
            files.on_ring += 1
            return value
        files.inline += 1
        if not files.manager.turn_budget.skip_schedule_point():
            await schedule_point()
        return value

    async def _call_directly(
        self,
        files: FilesRun,
        file: Any,  # noqa: ANN401 (as in `call`)
        name: str,
        args: tuple[Any, ...],
    ) -> tuple[Any, bool] | None:
        """Return the result, and whether the call has waited; None if it must go to a thread."""
        fd = -1
        try:
            fd = self._open(file, reading=name in READS)
            if name in READS:
                return await self._read(files, fd, file, name, args)
            return await self._write(files, fd, getattr(file, name), args)
        except NeedsThreadError:
            return None
        finally:
            if fd not in {-1, self._raw.fd}:
                os.close(fd)

    @enable_ki_protection
    async def close(
        self,
        files: FilesRun,
        file: Any,  # noqa: ANN401 (as in `call`)
        *,
        shielded: bool = False,
    ) -> None:
        """Close *file* in a thread, as it may have to write. Wake the task that reads."""
        owned = False
        try:
            with trio.CancelScope(shield=shielded):
                owned = await self._writing.acquire(files)
            if self._reading.user is files and self._reading.fd >= 0:
                files.manager.notify_closing(self._reading.fd)
            await files.call_in_thread(file.close, shielded=shielded)
        finally:
            if owned:
                self._writing.release()

    async def _call_in_thread(
        self,
        files: FilesRun,
        file: Any,  # noqa: ANN401 (as in `call`)
        name: str,
        args: tuple[Any, ...],
    ) -> Any:  # noqa: ANN401 (as in `call`)
        raw = self._raw
        by_line = name == "readline" and isinstance(file, io.TextIOWrapper)
        if by_line:
            raw.begin_by_line()
        try:
            value = await files.call_in_thread(getattr(file, name), args)
        finally:
            raw.by_line = self._is_new = False
        if by_line and raw.gave_all(value):
            raw.clean = ref(file)
        return value

    def _open(self, file: Any, *, reading: bool) -> int:  # noqa: ANN401 (as in `call`)
        """Return an fd that can be read, or written, without blocking. It may be a new one."""
        fd = self._raw.fd
        if self._is_new and threading.active_count() == 1:
            self._is_new = False
        try:
            usable = not file.closed and (file.readable() if reading else file.writable())
            if self._is_new or self._raw.inside or not usable or not os.get_blocking(fd):
                raise NeedsThreadError
            status = _status_of(fd)  # each time, as it may have been replaced by dup2
            if stat.S_ISCHR(status.st_mode):
                return _open_terminal(fd, status.st_rdev, reading=reading)
        except (OSError, termios.error):
            raise NeedsThreadError from None
        if not self._raw.has_nowait or stat.S_ISREG(status.st_mode):
            raise NeedsThreadError
        return fd

    # ---- Reading ---------------------------------------------------------------------------

    async def _read(
        self,
        files: FilesRun,
        fd: int,
        file: Any,  # noqa: ANN401 (as in `call`)
        name: str,
        args: tuple[Any, ...],
    ) -> tuple[Any, bool]:
        """Return the result, and whether the call has waited."""
        raw = self._raw
        is_text = isinstance(file, io.TextIOWrapper)
        need = need_of(io.TextIOWrapper if is_text else type(file), name, args)
        if need is None:
            raise NeedsThreadError
        is_text_line = is_text and need.is_line
        waited = False
        raw.scanned = 0
        while True:
            self._take_leftovers(fd, file)
            if is_text_line:
                self._check_no_text_left(fd, file)
            start = raw.scanned
            end = need.end(raw.ahead, start, ended=raw.ended)
            if end is None:
                if is_text_line and b"\r" in raw.ahead[start:]:
                    raise NeedsThreadError
                raw.scanned = len(raw.ahead)
                waited |= await self._fill(files, fd, need.next_read(len(raw.ahead)))
                continue
            if (is_text_line and has_bare_cr(raw.ahead[:end])) or (is_text and end > TEXT_MAX):
                raise NeedsThreadError
            try:
                value = raw.run(fd, end, getattr(file, name), args)
            except DryError:
                raw.put_back()
                raw.scanned = end
                continue
            if is_text_line and not raw.gave_all(value):
                raw.clean = None
            return value, waited

    def _take_leftovers(self, fd: int, file: Any) -> None:  # noqa: ANN401 (as in `call`)
        """Move to *ahead* what a synchronous call has left in the buffered file."""
        raw = self._raw
        buffered = file.buffer if isinstance(file, io.TextIOWrapper) else file
        if type(buffered) is not io.BufferedReader:
            return
        if raw.inside:
            raise NeedsThreadError
        try:
            size = len(raw.run(fd, -1, buffered.peek, ()))
        except DryError:
            return
        raw.put_first(raw.run(fd, -1, buffered.read, (size,)))

    def _check_no_text_left(self, fd: int, file: io.TextIOWrapper) -> None:
        raw = self._raw
        if raw.clean is None or raw.clean() is not file:
            try:
                raw.run(fd, -1, file.readline, (0,))
            except DryError:
                raw.clean = ref(file)
            else:
                raise NeedsThreadError

    async def _fill(self, files: FilesRun, fd: int, size: int) -> bool:
        """Read once; return whether that had to be waited for. If cancelled, nothing was read."""
        raw = self._raw
        waited = False
        while True:
            if raw.is_closed():
                raise ValueError(_CLOSED)
            if raw.read_ahead(fd, size):
                return waited
            waited = True
            self._reading.fd = fd
            try:
                await files.manager.perform(operations.poll_add(fd, select.POLLIN))
            except trio.ClosedResourceError:
                raise ValueError(_CLOSED) from None
            finally:
                self._reading.fd = -1

    # ---- Writing ---------------------------------------------------------------------------

    async def _write(
        self, files: FilesRun, fd: int, method: Callable[..., T], args: tuple[Any, ...]
    ) -> tuple[T, bool]:
        """Return the result, and whether the call has waited."""
        if is_long_write(method.__name__, args):
            raise NeedsThreadError
        waited = False
        try:
            value = self._raw.run(fd, -1, method, args)
        finally:
            # To CPython's files it is written already, so this must not be cancelled.
            with trio.CancelScope(shield=True):
                while not self._raw.push(fd):
                    waited = True
                    await self._wait_writable(files, fd)
        return value, waited

    async def _wait_writable(self, files: FilesRun, fd: int) -> None:
        try:
            if self._raw.has_nowait:
                await files.manager.wait_writable(fd)
                return
        except trio.BusyResourceError:  # the program waits for the same fd
            pass
        await files.call_in_thread(self._raw.write_behind)


def _open_terminal(fd: int, device: int, *, reading: bool) -> int:
    """Open the terminal at *fd* again, non-blocking."""
    settings = termios.tcgetattr(fd)  # fails for other devices
    special = settings[6]
    is_usual = settings[3] & termios.ICANON or (
        # Otherwise read(2) waits for a time, or for more bytes.
        special[termios.VMIN] == 1 and special[termios.VTIME] == 0
    )
    if (os.major(device), os.minor(device)) == _PTMX or (reading and not is_usual):
        raise NeedsThreadError
    flags = os.O_NONBLOCK | os.O_NOCTTY | (os.O_RDONLY if reading else os.O_WRONLY)
    return os.open(f"{OPEN_FILES}/{fd}", flags)
