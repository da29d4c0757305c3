"""How each method of the files that `open_file` makes is called.

There are three ways: on a bridge; inline, for what never waits; and in a thread, where decoding
or splitting lines would block the loop for long.
"""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from trio_uring._engine._file_systems import FileSystem

from ._hits import never_waits
from ._paths import TEXT_MAX
from ._raw import RingFileIO
from ._unbuffered import write

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ._bridge import FilesRun

T = TypeVar("T")

BUFFERED: Final = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)
FILES: Final = frozenset((RingFileIO, io.TextIOWrapper, *BUFFERED))

ASYNC_METHODS: Final = frozenset(
    (
        "flush",
        "peek",
        "read",
        "read1",
        "readall",
        "readinto",
        "readinto1",
        "readline",
        "readlines",
        "seek",
        "tell",
        "truncate",
        "write",
        "writelines",
    )
)
_ROUTED: Final = ASYNC_METHODS | {"close", "detach"}
_LONG_OF_LINES: Final = frozenset(("readlines", "writelines"))
_LONG_OF_TEXT: Final = frozenset(("read", "write"))


def raw_of(file: object) -> RingFileIO | None:
    """Return the raw file below *file* if it is a `RingFileIO`."""
    try:
        if type(file) is io.TextIOWrapper:
            file = file.buffer
        if type(file) in BUFFERED:
            file = file.raw  # type: ignore[attr-defined]
    except ValueError:  # detached
        return None
    return file if type(file) is RingFileIO else None


def file_call(
    files: FilesRun,
    method: Callable[..., T],
    file: object,
    args: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> Callable[[], Awaitable[T]] | None:
    """Return how to call *method* of *file*; None if it must go to a thread."""
    raw = raw_of(file)
    name = method.__name__
    if raw is None or name not in _ROUTED:
        return None
    if keywords:
        method, args = partial(method, *args, **keywords), ()
    if name == "close":
        return partial(close, files, method, raw)
    return partial(way_of(type(file), name, raw), files, method, args)


def way_of(
    kind: type, name: str, raw: RingFileIO
) -> Callable[[FilesRun, Callable[..., Any], tuple[Any, ...]], Awaitable[Any]]:
    """Return how to call the method *name* of a file of class *kind* over *raw*.

    What is returned is called with the run's files, the bound method, and its arguments.
    """
    cancellable = kind is RingFileIO

    def inline(files: FilesRun, method: Callable[..., T], args: tuple[Any, ...]) -> Awaitable[T]:
        return files.call_inline(method, args, raw)

    def on_bridge(files: FilesRun, method: Callable[..., T], args: tuple[Any, ...]) -> Awaitable[T]:
        return files.call(method, args, raw, cancellable)

    def by_length(files: FilesRun, method: Callable[..., T], args: tuple[Any, ...]) -> Awaitable[T]:
        if is_long(name, raw, args):
            return files.call_in_thread(method, args, raw)
        return files.call(method, args, raw, cancellable)

    def counting_lines(
        files: FilesRun, method: Callable[..., T], args: tuple[Any, ...]
    ) -> Awaitable[T]:
        return files.call(_read_line, (raw, method, *args), raw)

    def in_thread(files: FilesRun, method: Callable[..., T], args: tuple[Any, ...]) -> Awaitable[T]:
        return files.call_in_thread(method, args, raw)

    if raw.file_system is FileSystem.SERVER:
        return in_thread
    if never_waits(kind, name):
        return inline
    if raw.counts_lines and name == "readline":
        return counting_lines
    if kind is RingFileIO and name == "write":
        return partial(write, raw)
    return by_length if may_be_long(kind, name) else on_bridge


def _read_line(raw: RingFileIO, method: Callable[..., T], *args: object) -> T:
    """Read a line on the bridge, after which `RingFileIO.lines` is right."""
    try:
        line = method(*args)
    except BaseException:
        raw.lines = 0
        raise
    raw.lines = max(raw.lines - 1, 0) if line else 0
    return line


def may_be_long(kind: type, name: str) -> bool:
    """Whether a call can block the loop for long with Python's own work, such as decoding."""
    return name in _LONG_OF_LINES or (name in _LONG_OF_TEXT and kind is io.TextIOWrapper)


def is_long(name: str, raw: RingFileIO, args: tuple[Any, ...]) -> bool:
    """Whether a call for which `may_be_long` is true would take long with these arguments."""
    if name in {"read", "readlines"}:
        size = args[0] if args else None
        if type(size) is int and size >= 0 and name == "read":
            return size > TEXT_MAX
        return raw.size_left() > TEXT_MAX
    return is_long_write(name, args)


def is_long_write(name: str, args: tuple[Any, ...]) -> bool:
    """Whether writing these arguments to a text file would take long."""
    if name == "write":
        return bool(args) and type(args[0]) is str and len(args[0]) > TEXT_MAX
    if name == "writelines":
        # Anything but a list or tuple runs the program's own code, which may take long.
        return not args or not _is_short(args[0])
    return False


def _is_short(lines: object) -> bool:
    if type(lines) is not list and type(lines) is not tuple:
        return False
    try:
        return sum(map(len, lines)) <= TEXT_MAX
    except TypeError:
        return False


async def close(
    files: FilesRun, method: Callable[[], T], raw: RingFileIO, *, shielded: bool = False
) -> T:
    """Close a file over *raw*; wake the task that waits for a pipe inside it, if there is one."""
    if raw.busy and not raw.closed and raw.is_stream:
        raw.closing = True
        files.manager.notify_closing(io.FileIO.fileno(raw))
    if raw.file_system is FileSystem.SERVER:
        return await files.call_in_thread(method, (), raw, shielded=shielded)
    # There is nothing to send, and nothing else to do.
    if not raw.closed and not raw.writable() and not raw.used_ring:
        return await files.call_inline(method, (), raw, shielded=shielded)
    return await files.call(method, (), raw, shielded=shielded)
