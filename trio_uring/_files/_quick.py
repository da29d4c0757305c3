"""Calls on paths that the kernel's cache can answer: no bridge, no ring, and few system calls.

Facts. Finding a path in the kernel's cache takes a microsecond, and asks neither disk nor server.
The cache also knows which names do not exist, once somebody has looked for them. Trio's and AnyIO's
paths call a worker thread through several layers. A bridge takes longer than the answer.

What does this mean for us? `quick_call` recognizes the functions that those layers would call in a
thread. It makes the call if the cache has the whole path, in a mount without a server. For a file
that is read, it must be regular and small. It does not begin if that is not known before the call
raises its audit event. The event comes first, and once.

If somebody has replaced one of the functions that a method is made of, the method goes to a thread,
as described in `_routes`.

With the native engine, `call_path` comes first: it makes the most usual of these calls in C.
"""

from __future__ import annotations

import io
import os
import pathlib
import stat
import sys
from functools import cache, partial
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio
from trio.lowlevel import current_task

from trio_uring import _operations as operations
from trio_uring._engine._ring import Reader, is_in_unknown_mount, is_missing, mode_cached
from trio_uring._errors import operation_error
from trio_uring._kernel import native, why_no_native
from trio_uring._trio_private import (
    AsyncIOWrapper,
    at_cancel_point,
    is_cancelled,
    schedule_point,
)

from ._bridge import INLINE_MAX
from ._directories import CAN_MAKE_PATHS, string_of
from ._hits import OTHERWISE
from ._open import READING, is_plain, learn_mount, open_file, open_now
from ._paths import stat_known
from ._routes import PATHLIB, TRIO_PATH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._bridge import FilesRun

# The largest file that is read whole here. At double, the copy out of the buffer would not fit in
# the processor's nearest caches; at half, fewer files fit.
_SIZE_MAX: Final = 65536

_READ_FLAGS: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)  # as FileIO says to audit hooks


async def quick_call(
    files: FilesRun, function: Callable[..., object], args: tuple[Any, ...]
) -> object:
    """Return or raise what ``function(*args)`` does, or return `OTHERWISE`: nothing was done.

    A checkpoint, unless it returns `OTHERWISE`. If cancelled, it returns that.
    """
    task = current_task()
    call = _find(function, args)
    if call is None or is_cancelled(task):
        return OTHERWISE
    try:
        value = call()
    except (TypeError, UnicodeEncodeError):
        # Wrong arguments, or a path that has no bytes: the function itself knows what to do.
        return OTHERWISE
    except (OSError, ValueError):
        await _pass_checkpoint(files)
        raise
    if value is OTHERWISE:
        return value
    if type(value) is Unfinished:
        at_cancel_point(task)
        return await value.finish(files)
    await _pass_checkpoint(files)
    return value


def _no_call(*_args: object) -> object:
    return OTHERWISE


# Without the native engine, no call is made by it.
call_path: Final = _no_call if why_no_native else native.call_path
close_file: Final = _no_call if why_no_native else native.close_file


def result_of(left: tuple[Any, ...]) -> object:
    """Return or raise the result that `call_path` or `close_file` has left."""
    if len(left) == 1:
        return left[0]
    try:
        raise left[1]
    finally:
        del left  # or there would be a reference cycle


async def _pass_checkpoint(files: FilesRun) -> None:
    files.inline += 1
    at_cancel_point(current_task())
    if not files.manager.turn_budget.skip_schedule_point():
        await schedule_point()


class Unfinished:
    """A file of which a part has been read.

    Args:
      fd: The open file, which `finish` closes.
      data: The part.
      convert: Makes the result of all the data.
    """

    def __init__(self, fd: int, data: bytes, convert: Callable[[bytes], object]) -> None:
        self._fd = fd
        self._data = data
        self._convert = convert

    async def finish(self, files: FilesRun) -> object:
        """Read the rest on the ring."""
        files.on_ring += 1
        data = bytearray(self._data)
        try:
            while True:
                piece = bytearray(_SIZE_MAX)
                count = await files.manager.perform_shielded(
                    operations.read(self._fd, piece, len(data), cancellable=False)
                )
                if not count:
                    return self._convert(bytes(data))
                data += piece[:count]
        finally:
            os.close(self._fd)


# --- The calls ------------------------------------------------------------------------------
#
# Each gets the path, and the arguments of the method. They return OTHERWISE if these are unusual.


def _stat(path: str, *, follow_symlinks: object = True) -> object:
    if type(follow_symlinks) is not bool:
        return OTHERWISE
    status = stat_known(path, follow_symlinks=follow_symlinks)
    return OTHERWISE if status is None else status


def _lstat(path: str) -> object:
    return _stat(path, follow_symlinks=False)


def _exists(path: str, *, follow_symlinks: object = True) -> object:
    return _is(lambda _mode: True, path, follow_symlinks=follow_symlinks)


def _mode(path: str, flags: int = 0, size_max: int = (1 << 64) - 1) -> int:
    encoded = os.fsencode(path)
    mode = mode_cached(encoded, flags, size_max)
    if is_in_unknown_mount(mode) and learn_mount(encoded, flags):
        mode = mode_cached(encoded, flags, size_max)
    return mode


def _is(is_it: Callable[[int], bool], path: str, *, follow_symlinks: object = True) -> object:
    if type(follow_symlinks) is not bool:
        return OTHERWISE
    mode = _mode(path, 0 if follow_symlinks else os.O_NOFOLLOW)
    if mode >= 0:
        return is_it(mode)
    return False if is_missing(mode) else OTHERWISE


def _is_symlink(path: str) -> object:
    return _is(stat.S_ISLNK, path, follow_symlinks=False)


def _read_bytes(path: str) -> object:
    return _read(path, bytes)


def _read(path: str, convert: Callable[[bytes], object]) -> object:
    mode = _mode(path, size_max=_SIZE_MAX)
    if not is_missing(mode) and not (mode >= 0 and stat.S_ISREG(mode)):
        return OTHERWISE
    sys.audit("open", path, "r", _READ_FLAGS)
    if mode < 0:
        raise operation_error(mode, path)
    data, rest = _reader().read(path)
    return convert(data) if rest < 0 else Unfinished(rest, data, convert)


@cache
def _reader() -> Reader:
    # One more byte, to detect the end of the file. The GIL protects the buffer.
    return Reader(_SIZE_MAX + 1)


def _read_text(
    path: str, encoding: object = None, errors: object = None, newline: object = None
) -> object:
    if sys.flags.warn_default_encoding or not is_plain("", "r", -1, encoding, errors, newline):
        return OTHERWISE

    def decode(data: bytes) -> str:
        with io.TextIOWrapper(io.BytesIO(data), encoding, errors, newline) as file:  # type: ignore[arg-type]
            return file.read()

    return _read(path, decode)


def _open(
    path: str,
    mode: Any = "r",  # noqa: ANN401 (is_plain checks them)
    *args: Any,  # noqa: ANN401
    opener: object = None,
) -> object:
    opener = args[5] if len(args) > 5 else opener
    if sys.flags.warn_default_encoding or opener is not None or mode not in READING:
        return OTHERWISE
    if not is_plain(path, mode, *args):
        return OTHERWISE
    found = _mode(path)
    if not is_missing(found) and not (found >= 0 and stat.S_ISREG(found)):
        return OTHERWISE
    return partial(open_file, path, mode, opener=open_now)(*args[:5])


# --- Which function is which call -----------------------------------------------------------


# What a row's call does, for `native.set_paths`: which it is in paths.c.
_STATUS, _TEST, _READ_BYTES, _READ_TEXT, _OPEN, _OPEN_WRAPPED = range(6)


class _Row(NamedTuple):
    """A call, and what must be the standard library's for it to be right."""

    call: Callable[..., object]
    owners: tuple[object, ...]
    names: tuple[str, ...]
    things: tuple[object, ...]
    what: int
    flags: int  # of open(2), for the native engine
    type: int  # the type of file that a test is for; 0 for any

    @property
    def is_intact(self) -> bool:
        return all(map(is_, map(getattr, self.owners, self.names), self.things))


def _row(
    call: Callable[..., object], what: int, *names: str, flags: int = 0, type_: int = 0
) -> _Row:
    owners: list[object] = []
    for name in names:
        owner, _, _ = name.partition(".")
        owners.append({"os": os, "io": io, "Path": pathlib.Path}[owner])
    attributes = tuple(name.partition(".")[2] for name in names)
    things = tuple(map(getattr, owners, attributes))
    return _Row(call, tuple(owners), attributes, things, what, flags, type_)


def _tests() -> dict[str, _Row]:
    tests = {
        "is_dir": (stat.S_ISDIR, stat.S_IFDIR),
        "is_file": (stat.S_ISREG, stat.S_IFREG),
        "is_socket": (stat.S_ISSOCK, stat.S_IFSOCK),
        "is_fifo": (stat.S_ISFIFO, stat.S_IFIFO),
        "is_block_device": (stat.S_ISBLK, stat.S_IFBLK),
        "is_char_device": (stat.S_ISCHR, stat.S_IFCHR),
    }
    return {
        name: _row(partial(_is, is_it), _TEST, f"Path.{name}", "Path.stat", "os.stat", type_=type_)
        for name, (is_it, type_) in tests.items()
    }


_NOFOLLOW: Final = os.O_NOFOLLOW if sys.platform != "win32" else 0
_METHODS: Final = {
    "stat": _row(_stat, _STATUS, "Path.stat", "os.stat"),
    "lstat": _row(
        *(_lstat, _STATUS, "Path.lstat", "Path.stat", "os.lstat", "os.stat"), flags=_NOFOLLOW
    ),
    "exists": _row(_exists, _TEST, "Path.exists", "Path.stat", "os.stat"),
    **_tests(),
    "is_symlink": _row(
        *(_is_symlink, _TEST, "Path.is_symlink", "Path.lstat", "Path.stat", "os.stat"),
        flags=_NOFOLLOW,
        type_=stat.S_IFLNK,
    ),
    "read_bytes": _row(_read_bytes, _READ_BYTES, "Path.read_bytes", "Path.open", "io.open"),
    "read_text": _row(_read_text, _READ_TEXT, "Path.read_text", "Path.open", "io.open"),
    "open": _row(_open, _OPEN, "Path.open", "io.open"),
}
_FUNCTIONS: Final[dict[object, _Row]] = {
    io.open: _row(_open, _OPEN, "io.open"),
    os.stat: _row(_stat, _STATUS, "os.stat"),
    os.lstat: _row(_lstat, _STATUS, "os.lstat", flags=_NOFOLLOW),
}
_PATHLIB: Final[dict[object, _Row]] = {
    method: _METHODS[name] for method, name in PATHLIB.items() if name in _METHODS
}
_TRIO: Final[dict[object, _Row]] = {
    function: _METHODS[name] for function, name in TRIO_PATH.items() if name in _METHODS
}
_TRIO_OPEN: Final = next((function for function, name in TRIO_PATH.items() if name == "open"), None)
_KEYWORDS: Final = {"follow_symlinks", "encoding", "errors", "newline", "mode", "buffering"}
# What the path may be, of a method, of a function of `trio.Path`, and of any other function.
_OF_METHOD: Final[tuple[type, ...]] = (pathlib.PosixPath,)
_OF_TRIO: Final[tuple[type, ...]] = (trio.PosixPath,)
_OF_FUNCTION: Final[tuple[type, ...]] = (str, pathlib.PosixPath, trio.PosixPath)


def _find(function: Any, args: tuple[Any, ...]) -> Callable[[], object] | None:  # noqa: ANN401
    """Return how to call ``function(*args)``, if it may be a quick call."""
    keywords: Mapping[str, Any] = {}
    if type(function) is partial:
        args, keywords, function = (*function.args, *args), function.keywords, function.func
    kinds = _OF_METHOD
    if type(function) is MethodType:
        row, args = _PATHLIB.get(function.__func__), (function.__self__, *args)
    elif type(function) is FunctionType:
        row, kinds = _TRIO.get(function), _OF_TRIO
    elif isinstance(function, BuiltinFunctionType):
        row, kinds = _FUNCTIONS.get(function), _OF_FUNCTION
    else:
        return None
    if row is None or not args or type(args[0]) not in kinds:
        return None
    path = string_of(args[0])
    if "\0" in path or not keywords.keys() <= _KEYWORDS or not row.is_intact:
        return None
    call = partial(row.call, path, *args[1:], **keywords)
    return call if function is not _TRIO_OPEN else partial(_wrapped, call)


def _wrapped(call: Callable[[], object]) -> object:
    file = call()
    return file if file is OTHERWISE else trio.wrap_file(file)


# --- The native engine ----------------------------------------------------------------------


def _rows() -> list[tuple[object, _Row, tuple[type, ...]]]:
    """Return each function that the native engine may call, with its row and kinds of paths."""
    tables = ((_PATHLIB, _OF_METHOD), (_TRIO, _OF_TRIO), (_FUNCTIONS, _OF_FUNCTION))
    return [
        (function, row, kinds)
        for table, kinds in tables
        for function, row in table.items()
        if not (sys.flags.warn_default_encoding and row.what >= _READ_TEXT)
    ]


def _native_row(function: object, row: _Row, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    what = _OPEN_WRAPPED if function is _TRIO_OPEN else row.what
    return (function, what, row.flags, row.type, kinds, row.owners, row.names, row.things)


if not why_no_native:
    slots: Any = vars(pathlib.PurePath)
    native.set_paths(
        tuple(_native_row(*row) for row in _rows()),
        partial,
        slots.get("_str"),
        slots.get("_raw_paths") if CAN_MAKE_PATHS else None,
        os.fstat,
        AsyncIOWrapper,
        INLINE_MAX,
        bool(sys.flags.utf8_mode),
    )
