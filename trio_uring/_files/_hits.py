"""Calls on files that need neither the ring nor a bridge: what they read is in memory already.

How a buffered file is read without waiting
-------------------------------------------

Facts. The raw file of a buffered file may be non-blocking: its ``readinto`` then returns None. The
buffered file returns what it has read so far, or None if that is nothing, and has lost nothing. A
text file does not support this: it treats None as the end of the file. preadv2(2) with RWF_NOWAIT
fails with EAGAIN where it would wait for a disk.

What does this mean for us? While a *hit* calls a method of a buffered file, `RingFileIO.readinto`
reads with RWF_NOWAIT, and returns None if that fails. Then a bridge makes a second call for the
rest. A line of a text file is read directly only if its end is decoded already. We know that
because the bridge's last call counted the newlines of what it gave to the decoder. If the program
has since read lines through ``wrapped``, a hit may read on, in a call that blocks as ``wrapped``
itself does. To read all of a text, a hit first reads all that the file still has, and then gives
it to the call.

Only private files (see `RingFileIO`) are read directly, and only for arguments that run no code of
the program. A hit copies at most `INLINE_MAX` bytes.
"""

from __future__ import annotations

import io
import os
from functools import cache, partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio
from trio.lowlevel import current_task, enable_ki_protection

from trio_uring._engine._file_systems import FileSystem, file_system_of, known
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._kernel import native, why_no_native
from trio_uring._trio_private import (
    at_cancel_point,
    current_io_manager,
    is_cancelled,
    schedule_point,
)

from ._bridge import INLINE_MAX, current_bridge, current_files
from ._raw import RingFileIO, forks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from typing_extensions import Buffer

    from ._bridge import FilesRun

    # How a method is called: with the run's files, the bound method, and its arguments.
    Way = Callable[[FilesRun, Callable[..., Any], tuple[Any, ...]], Awaitable[Any]]

T = TypeVar("T")

_HERE: Final = -1  # as an offset: the file's position, which moves
_fileno: Final = io.FileIO.fileno

# What a hit returns if it could not make the call, or not all of it.
OTHERWISE: Final = object()

# How a hit makes a call. The numbers are those of hits.c.
_SIMPLE: Final = 0  # it reads nothing
_READ: Final = 1
_READINTO: Final = 2
_RAW_READ: Final = 3
_RAW_READINTO: Final = 4
_TEXT_LINE: Final = 5
_TEXT_READ: Final = 6  # to the end of the file
_ROWS: Final[tuple[tuple[type, str, int], ...]] = (
    # What moves or returns the position: at most an lseek(2), which takes 0.1 microseconds. (A text
    # file's tell and a writer's seek flush first.)
    (RingFileIO, "seek tell flush", _SIMPLE),
    (io.BufferedReader, "seek tell flush", _SIMPLE),
    (io.BufferedWriter, "tell", _SIMPLE),
    (io.BufferedRandom, "tell", _SIMPLE),
    (io.BufferedReader, "read read1 readline peek", _READ),
    (io.BufferedReader, "readinto readinto1", _READINTO),
    (RingFileIO, "read", _RAW_READ),
    (RingFileIO, "readinto", _RAW_READINTO),
    (io.TextIOWrapper, "readline", _TEXT_LINE),
    (io.TextIOWrapper, "read", _TEXT_READ),
)
_WHAT: Final = {(kind, name): what for kind, names, what in _ROWS for name in names.split()}


def never_waits(kind: type, name: str) -> bool:
    """Whether the method *name* of a file of class *kind* neither reads nor writes."""
    return _WHAT.get((kind, name)) == _SIMPLE


def hit_first(
    kind: type,
    name: str,
    raw: RingFileIO,
    method: Callable[..., Any],
    find_way: Callable[[], Way],
) -> Callable[..., Awaitable[object]] | None:
    """Return a coroutine function that calls *method* by a hit if possible.

    Otherwise it calls it in the way that *find_way* returns. Return None if there are no hits for
    the method *name* of a file of class *kind* over *raw*.
    """
    found = file_method(kind, name, raw, method, find_way)
    return None if found is None else MethodType(_shell(kind, name), found)


def file_method(
    kind: type,
    name: str,
    raw: RingFileIO,
    method: Callable[..., Any],
    find_way: Callable[[], Way],
) -> FileMethod | None:
    """Return what `hit_first` needs for a method; None if it has no hits."""
    what = _WHAT.get((kind, name))
    if what is None or raw.file_system is FileSystem.SERVER:
        return None
    if what == _TEXT_LINE and not raw.counts_lines:
        return None
    # Others write first what they have, which may be what this reads.
    if what == _TEXT_READ and type(method.__self__.buffer) is not io.BufferedReader:  # type: ignore[attr-defined]
        return None
    try:
        manager = current_io_manager()
    except RuntimeError:  # taken in a thread, before the run, or by AnyIO on asyncio
        return None
    is_native = isinstance(manager, UringIOManager) and manager.native is not None
    kind_of_hit = native.FileHit if is_native else PythonHit
    return FileMethod(kind_of_hit(what, raw, method, raw.nowait_flags), method, raw, find_way)


class PythonHit:
    """One method of one file; the twin of FileHit in hits.c.

    A call returns what the method returns. It returns `OTHERWISE` if there is more to do, which
    *due* and *missed* tell.

    Args:
      what: How to make the call.
      raw: The raw file.
      method: The bound method of the file over *raw*.
      flags: Of preadv2(2).

    Attributes:
      budget: How many bytes a call may copy before other tasks run.
      due: Whether the call is made, but a schedule point must follow. `take` returns or raises its
        result.
      missed: Whether the call found a part of the data, or nothing. `take` returns it.
    """

    __slots__ = (
        *("_ahead", "_failure", "_left", "_method", "_raw", "_value", "_what"),
        *("budget", "due", "flags", "missed"),
    )

    def __init__(
        self, what: int, raw: RingFileIO, method: Callable[..., object], flags: int
    ) -> None:
        self._what = what
        self._raw = raw
        self._method = method
        self.flags = flags
        self.budget = INLINE_MAX
        self.due = self.missed = False
        self._value: object = None
        self._failure: BaseException | None = None
        self._left = 0
        self._ahead: bytes | None = None  # what `readall` returns, if it was called ahead

    def __call__(self, *args: Any) -> object:  # noqa: ANN401 (the method's own)
        raw = self._raw
        try:
            files = current_files()
            task = current_task()
        except RuntimeError:  # on asyncio
            return OTHERWISE
        if files is None or raw.busy or is_cancelled(task) or not self._may_try(args):
            return OTHERWISE
        value = failure = None
        try:
            value = self._make_call(args)
        except Exception as exc:  # noqa: BLE001 (raised below)
            failure = exc
        if self.missed:
            self._value = value
            return OTHERWISE
        at_cancel_point(task)
        files.inline += 1
        if not files.manager.turn_budget.skip_schedule_point():
            self.due, self._value, self._failure = True, value, failure
            return OTHERWISE
        if failure is None:
            return value
        try:
            raise failure
        finally:
            del failure  # or there would be a reference cycle

    def take(self) -> object:
        """Return or raise what a call has left, and forget it."""
        value, failure = self._value, self._failure
        self._value = self._failure = None
        self.due = self.missed = False
        if failure is None:
            return value
        try:
            raise failure
        finally:
            del failure

    def _may_try(self, args: tuple[Any, ...]) -> bool:
        what, raw = self._what, self._raw
        if what == _SIMPLE:
            return all(type(arg) is int for arg in args)
        if raw.direct is not forks.era or len(args) > 1:
            return False
        if what in {_READINTO, _RAW_READINTO}:
            return len(args) == 1 and type(args[0]) in {bytearray, memoryview}
        if args and args[0] is not None and (type(args[0]) is not int or args[0] > INLINE_MAX):
            return False
        if what == _TEXT_READ:
            return not args or args[0] is None or args[0] < 0
        if what == _TEXT_LINE:
            if raw.lines <= 0:
                return False
            raw.lines -= 1
        return True

    def _make_call(self, args: tuple[Any, ...]) -> object:
        what, raw = self._what, self._raw
        if what in {_SIMPLE, _TEXT_LINE}:
            return self._method(*args)
        self._left = self.budget
        raw.hit = self
        try:
            if what == _RAW_READINTO:
                with memoryview(args[0]) as view:
                    return self._fill(view.cast("B"))
            if what == _TEXT_READ:
                return self._read_text(args)
            if what != _RAW_READ:
                return self._method(*args)
            size = args[0] if args and args[0] is not None else -1
            return self.readall() if size < 0 else self._read(size)
        finally:
            raw.hit = None

    def _read_text(self, args: tuple[Any, ...]) -> object:
        # A text file would take None for the end of the file, so all of it is read first.
        self._ahead = self.readall()
        if self._ahead is None:
            return None
        self._raw.lines = 0  # no line is left afterwards
        try:
            return self._method(*args)
        finally:
            self._ahead = None

    # ---- For `RingFileIO`, while the call is made ------------------------------------------

    def readinto(self, buffer: Buffer) -> int | None:
        """Read like one read(2), or read nothing and return None if that would wait."""
        done = self._fill(memoryview(buffer))
        # With a part, CPython's buffer would differ from what one read(2) leaves in it.
        if self.missed:
            self._give_up(done)
            return None
        return done

    def _give_up(self, done: int) -> None:
        """Move the position back by *done* bytes, which are not used."""
        self.missed = True
        self._raw.seek(-done, os.SEEK_CUR)

    def _read_once(self, view: memoryview) -> int | None:
        self.missed = True
        if self._left < view.nbytes:
            if not self._left:
                return None
            view = view[: self._left]
        try:
            count = os.preadv(_fileno(self._raw), (view,), _HERE, self.flags)
        except (OSError, ValueError):
            # It would wait, or fails. Then the bridge reads again, and gets the error.
            return None
        self.missed = False
        self._left -= count
        return count

    def readall(self) -> bytes | None:
        """Read to the end of the file, or nothing. Most files that are read whole are short."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead
        data = self._read(65536 + 1)
        if self.missed or len(data) > 65536:
            # The bridge reads into the final object, which saves a copy.
            self._give_up(len(data))
            return None
        return data

    def _read(self, size: int) -> bytes:
        buffer = bytearray(size)
        with memoryview(buffer) as view:
            done = self._fill(view)
        return bytes(buffer[:done])

    def _fill(self, view: memoryview) -> int:
        """Read until *view* is full, or the file ends, or the rest would wait."""
        done = 0
        while True:
            count = self._read_once(view[done:] if done else view)
            if not count:
                return done
            done += count
            if done == view.nbytes:
                return done


class FileMethod:
    """One method of one file, as a program calls it: by a hit if possible.

    Args:
      hit: What is tried first.
      method: The bound method of the file.
      raw: The raw file below it.
      find_way: Returns how the method is called otherwise; see `way_of`.
    """

    __slots__ = ("_find_way", "_way", "hit", "method", "raw")

    def __init__(
        self,
        hit: Any,  # noqa: ANN401 (a PythonHit, or its twin)
        method: Callable[..., Any],
        raw: RingFileIO,
        find_way: Callable[[], Way],
    ) -> None:
        self.hit = hit
        self.method = method
        self.raw = raw
        self._find_way = find_way
        self._way: Way | None = None

    @property
    def _call(self) -> Way:
        # Found when it is first needed: most files that are read whole never need it.
        if self._way is None:
            self._way = self._find_way()
        return self._way

    async def otherwise(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> object:
        """Make the call, or the rest of it, in another way. Not for a hit that is due."""
        hit = self.hit
        files = current_files()
        if files is None:
            return await trio.to_thread.run_sync(partial(self.method, *args, **keywords))
        if hit.missed:
            return await self._rest(files, args, hit.take())
        if keywords:
            return await self._call(files, partial(self.method, *args, **keywords), ())
        return await self._call(files, self.method, args)

    async def _rest(
        self,
        files: FilesRun,
        args: tuple[Any, ...],
        part: Any,  # noqa: ANN401 (a number, or bytes)
    ) -> object:
        """Read what follows *part*, which is what a hit has read."""
        if not part:
            result = await self._call(files, self.method, args)
            self.hit.flags = self.raw.nowait_flags
            return result
        if type(part) is int:
            spent = part
            left: Any = memoryview(args[0]).cast("B")[part:]
        else:
            spent = len(part)
            left = args[0] if args else None
            if left is not None and left >= 0:
                left -= spent
        try:
            # The part would be lost if this were cancelled.
            rest = await files.call(_spent, (spent, self.method, left), self.raw, shielded=True)
        except OSError:
            if self.method.__self__ is self.raw:  # type: ignore[attr-defined]
                return part  # like read(2); the next read gets the error again
            raise
        return part + rest if rest else part


def _spent(count: int, method: Callable[..., T], *args: object) -> T:
    """Call *method* on the bridge, after a hit has copied *count* bytes in the same call."""
    bridge = current_bridge()
    if bridge is not None:  # none at the exit of the interpreter
        bridge.budget -= count
    return method(*args)


@cache
def _shell(kind: type, name: str) -> Callable[..., Awaitable[object]]:
    """Return the function of the method *name*. It is a coroutine function, as Trio's are."""

    @enable_ki_protection
    async def call(
        self: FileMethod,
        *args: Any,  # noqa: ANN401 (the method's own)
        **keywords: Any,  # noqa: ANN401
    ) -> object:
        if not keywords:
            hit = self.hit
            value = hit(*args)
            if value is not OTHERWISE:
                return value
            if hit.due:  # here, as another coroutine takes longer than a schedule point
                try:
                    return hit.take()
                finally:
                    await schedule_point()
        return await self.otherwise(args, keywords)

    call.__name__ = name
    call.__qualname__ = f"AsyncIOWrapper.{name}"
    call.__doc__ = f"Like :meth:`~{kind.__module__}.{kind.__qualname__}.{name}`, but async."
    return call


if not why_no_native:
    native.set_files(
        RingFileIO,
        io.FileIO.fileno,
        RingFileIO.readinto,
        RingFileIO.readall,
        OTHERWISE,
        INLINE_MAX,
    )
    native.set_opened(
        RingFileIO,
        io.BufferedReader,
        io.TextIOWrapper,
        known,
        file_system_of,
        FileSystem.SERVER,
        FileSystem.MEMORY,
    )
