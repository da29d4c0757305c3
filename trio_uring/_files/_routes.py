"""The route table: which synchronous calls have an equivalent on the ring.

It is used where Trio, or AnyIO's backend, would call a function in a worker thread. Matches are
exact: the function as it was when this module was imported, a path of exactly the class
`pathlib.PosixPath`, a file made by `open_file`. So subclasses, replaced functions and fake file
systems go to threads, and so do calls with unusual or wrong arguments, which the real function
then judges.

Everything else goes to a thread, too. The kernel has no operation for listing a directory (see
`_directories`), ``chmod``, ``readlink``, ``utime`` (so ``touch``) or ``truncate`` by path, or for
looking up ``owner`` and ``group``; ``glob``, ``resolve`` and ``samefile`` consist of these and of
much else.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import trio

from trio_uring._trio_private import trio_path_functions

from . import _paths as paths
from ._bridge import BRIDGE_REFUSED, current_bridge
from ._directories import CAN_MAKE_PATHS, iterdir
from ._methods import FILES, file_call
from ._open import is_plain, open_file, path_has_server
from ._paths import TEXT_MAX, RingPath
from ._stream_file import stream_call

if TYPE_CHECKING:
    from ._bridge import FilesRun

T = TypeVar("T")

_Args = tuple[Any, ...]


def route(
    files: FilesRun, function: Callable[..., T], args: tuple[Any, ...] = ()
) -> Callable[[], Awaitable[T]] | None:
    """Return how to call ``function(*args)`` on the ring, or None if it must go to a thread.

    What is returned is a checkpoint, returns or raises what the call does, checks for cancellation
    before it begins, and counts itself in the statistics. It may be awaited once, or not at all.

    Args:
      files: The current run's.
      function: What would be called in a thread: a function, a bound method, or a
        `functools.partial` of these.
      args: Its positional arguments.
    """
    if BRIDGE_REFUSED:
        return None
    keywords: Mapping[str, Any] = {}
    if type(function) is partial:
        bound = cast("partial[T]", function)
        args = (*bound.args, *args)
        keywords = bound.keywords
        function = bound.func
    kind = type(function)
    # Not by identity: methods such as truncate are of a subclass, in some versions of Python.
    is_builtin = isinstance(function, BuiltinFunctionType)
    if is_builtin or kind is MethodType:
        owner = function.__self__  # type: ignore[attr-defined]
        if type(owner) in FILES:
            call = file_call(files, function, owner, args, keywords)
            return call or stream_call(files, owner, function.__name__, args, keywords)
        if isinstance(owner, io.TextIOWrapper):  # of a subclass
            return stream_call(files, owner, function.__name__, args, keywords)
        if is_builtin:
            return _function_call(files, function, args, keywords)
        name = PATHLIB.get(function.__func__)  # type: ignore[attr-defined]
        if name is not None and type(owner) is pathlib.PosixPath:
            return _path_call(files, name, owner, args, keywords, _as_it_is)
        return _inline_call(files, function.__func__, (owner, *args), keywords)  # type: ignore[attr-defined]
    if kind is FunctionType and args:
        name = TRIO_PATH.get(function)
        if name is not None and type(args[0]) is trio.PosixPath:
            return _path_call(files, name, args[0], args[1:], keywords, _as_trio)
        return _inline_call(files, function, args, keywords)
    return None


# --- Functions ------------------------------------------------------------------------------


def _function_call(
    files: FilesRun, function: Callable[..., Any], args: _Args, keywords: Mapping[str, Any]
) -> Callable[[], Awaitable[Any]] | None:
    row = _FUNCTIONS.get(function)
    if row is None:
        return None
    twin, is_right = row
    if twin is open_file:
        return open_call(files, args, keywords)
    if (
        not is_right(*args)
        or not keywords.keys() <= {"follow_symlinks"}
        or (keywords and (twin is not paths.stat or type(keywords["follow_symlinks"]) is not bool))
    ):
        return None
    return partial(files.call, partial(twin, **keywords) if keywords else twin, args)


def open_call(
    files: FilesRun, args: _Args, keywords: Mapping[str, Any]
) -> Callable[[], Awaitable[Any]] | None:
    if args and type(args[0]) in _PATHS:
        args = (os.fspath(args[0]), *args[1:])
    try:
        if not is_plain(*args, **keywords):
            return None
    except TypeError:  # too many, or unknown ones
        return None
    call = partial(open_file, *args, **keywords)
    opener = keywords.get("opener", args[7] if len(args) > 7 else None)
    file = args[0] if args else keywords.get("file")
    # An opener is the program's own code, which may take long. What has a number may have a server,
    # which is asked as it is opened. The file uses the ring all the same.
    if opener is not None or type(file) is int:
        return partial(files.call_in_thread, call)
    return partial(files.call, call)


_PATHS: Final = frozenset((str, bytes, pathlib.PosixPath, trio.PosixPath))


def _is_path(path: object) -> bool:
    # The error for a path with a zero in it differs by version, so the real function raises it.
    if type(path) is bytes:
        return b"\0" not in path
    return type(path) in _PATHS and "\0" not in str(path)


def _one_path(*args: object) -> bool:
    return len(args) == 1 and _is_path(args[0])


def _two_paths(*args: object) -> bool:
    return len(args) == 2 and _is_path(args[0]) and _is_path(args[1]) and _same_kind(*args)


def _same_kind(first: object, second: object) -> bool:
    return (type(first) is bytes) == (type(second) is bytes)


def _path_or_fd(*args: object) -> bool:
    return _one_path(*args) or _numbers(1)(*args)


def _path_and_mode(*args: object) -> bool:
    return _one_path(*args[:1]) and (len(args) == 1 or _mode(*args[1:]))


def _mode(*args: object) -> bool:
    return len(args) == 1 and type(args[0]) is int and 0 <= args[0] < 1 << 16


def _numbers(count: int) -> Callable[..., bool]:
    def are_numbers(*args: object) -> bool:
        return len(args) == count and all(type(n) is int and 0 <= n < 1 << 31 for n in args)

    return are_numbers


# Compared with calls in threads, with one task and with 32, in benchmarks/bench_files.py. With one
# task, most of the time is spent on the kernel's worker, which these operations need.
_Row = tuple[Callable[..., Any], Callable[..., bool]]
_OS: Final[dict[str, _Row]] = {
    "stat": (paths.stat, _path_or_fd),
    "lstat": (paths.lstat, _one_path),
    "fstat": (paths.stat, _numbers(1)),
    "unlink": (paths.unlink, _one_path),
    "remove": (paths.unlink, _one_path),
    "rmdir": (paths.rmdir, _one_path),
    "mkdir": (paths.mkdir, _path_and_mode),
    "rename": (paths.rename, _two_paths),
    "replace": (paths.rename, _two_paths),
    "symlink": (paths.symlink, _two_paths),
    "link": (paths.link, _two_paths),
    "ftruncate": (paths.ftruncate, _numbers(2)),
    "fsync": (paths.fsync, _numbers(1)),
    "fdatasync": (paths.fdatasync, _numbers(1)),
}
_FUNCTIONS: Final[dict[Callable[..., Any], _Row]] = {
    io.open: (open_file, is_plain),
    **{getattr(os, name): row for name, row in _OS.items() if hasattr(os, name)},
}


# --- Methods of paths -----------------------------------------------------------------------


def _as_it_is(_name: str, result: object) -> object:
    return result


def _as_trio(name: str, result: object) -> object:
    if name == "open":
        return trio.wrap_file(result)
    return trio.PosixPath(result) if isinstance(result, pathlib.PurePath) else result


def _path_call(
    files: FilesRun,
    name: str,
    path: os.PathLike[str],
    args: _Args,
    keywords: Mapping[str, Any],
    convert: Callable[[str, object], object],
) -> Callable[[], Awaitable[Any]] | None:
    try:
        is_right = _is_path(path) and _METHODS[name](*args, **keywords)
    except TypeError:  # too many arguments, or unknown ones
        return None
    if not is_right or not _is_intact():
        return None
    if name == "iterdir":
        # AnyIO's needs paths of pathlib; its iterator is read ahead (see `ReadAhead`).
        return partial(files.call_in_thread, iterdir, (path,)) if convert is _as_trio else None
    twin = _TWINS.get(name)
    if twin is not None:
        return partial(files.call, partial(twin, **keywords), (os.fspath(path), *args))

    def call() -> object:
        bridge = current_bridge()
        if name in _OPENING and bridge is not None and path_has_server(bridge, os.fspath(path)):
            theirs = getattr(pathlib.PosixPath(path), name)
            return convert(name, bridge.call_in_thread(partial(theirs, *args, **keywords)))
        return convert(name, getattr(RingPath(path), name)(*args, **keywords))

    return partial(files.call, call)


def _inline_call(
    files: FilesRun, function: Callable[..., Any], args: _Args, keywords: Mapping[str, Any]
) -> Callable[[], Awaitable[Any]] | None:
    name = _INLINE.get(function)
    if name is None or keywords or len(args) != 1:
        return None
    kind = type(args[0]) if name == "absolute" else args[0]
    if not any(kind is each for each in _PATH_CLASSES):
        return None
    if getattr(pathlib.Path, name) != _INLINE_METHODS[name] or not _is_intact():
        return None
    # Without it, the home directory is looked up in the user database, which may be a server's.
    if name == "home" and "HOME" not in os.environ:
        return None
    return partial(files.call, function, args)


def _is_intact() -> bool:
    """Whether everything that these methods call is still the standard library's."""
    return all(map(is_, map(getattr, _OWNERS, _NAMES), _THINGS))


def _flags(*args: object, **keywords: object) -> bool:
    return all(type(flag) is bool for flag in (*args, *keywords.values()))


def _no_arguments() -> bool:
    return True


def _mkdir(mode: object = 0o777, parents: object = False, exist_ok: object = False) -> bool:  # noqa: FBT002
    return _mode(mode) and _flags(parents, exist_ok)


def _open(*args: object, **keywords: object) -> bool:
    return is_plain("", *args, **keywords) and len(args) <= 5


def _read_text(encoding: object = None, errors: object = None, newline: object = None) -> bool:
    return is_plain("", "r", -1, encoding, errors, newline)


def _write_text(
    data: object, encoding: object = None, errors: object = None, newline: object = None
) -> bool:
    short = type(data) is str and len(data) <= TEXT_MAX
    return short and is_plain("", "w", -1, encoding, errors, newline)


def _symlink_to(target: object, target_is_directory: object = False) -> bool:  # noqa: FBT002
    return _is_target(target) and type(target_is_directory) is bool


def _is_target(target: object) -> bool:
    return _is_path(target) and type(target) is not bytes


def _data(data: object) -> bool:
    return isinstance(data, bytes | bytearray | memoryview)


# By name: a function that says whether a call's arguments are certainly right; and names, of which
# pathlib's method must use one, in this version of Python, for `RingPath` to have an effect.
_ROWS: Final[dict[str, tuple[Callable[..., bool], str]]] = {
    "stat": (_flags, ""),
    "lstat": (_flags, "stat"),
    "exists": (_flags, "stat"),
    "is_dir": (_flags, "stat"),
    "is_file": (_flags, "stat"),
    "is_symlink": (_flags, "lstat"),
    "is_socket": (_flags, "stat"),
    "is_fifo": (_flags, "stat"),
    "is_block_device": (_flags, "stat"),
    "is_char_device": (_flags, "stat"),
    "open": (_open, ""),
    "read_bytes": (_flags, "open"),
    "read_text": (_read_text, "open read_text"),
    # Creating or truncating, and writing, need a kernel worker each. With one task, write_bytes
    # takes a quarter more CPU time than in a thread; with 32 tasks a quarter less, at 1.4 times the
    # rate (benchmarks/bench_linked_files.py).
    "write_bytes": (_data, "open"),
    "write_text": (_write_text, "open write_text"),
    "unlink": (_flags, ""),
    "rmdir": (_flags, ""),
    "mkdir": (_mkdir, ""),
    "rename": (_is_target, ""),
    "replace": (_is_target, ""),
    "symlink_to": (_symlink_to, ""),
    "hardlink_to": (_is_target, ""),
    **({"iterdir": (_no_arguments, "")} if CAN_MAKE_PATHS else {}),
}


def _is_made_of(name: str, parts: str) -> bool:
    method = getattr(pathlib.Path, name, None)
    return isinstance(method, FunctionType) and (
        not parts or not set(parts.split()).isdisjoint(method.__code__.co_names)
    )


_METHODS: Final = {
    name: is_right for name, (is_right, parts) in _ROWS.items() if _is_made_of(name, parts)
}
PATHLIB: Final[dict[object, str]] = {getattr(pathlib.Path, name): name for name in _METHODS}
TRIO_PATH: Final[dict[object, str]] = {
    function: name for function, name in trio_path_functions().items() if name in _METHODS
}
_WATCHED: Final[tuple[tuple[object, str], ...]] = (
    (io, "open"),
    *((os, name) for name in (*_OS, "getcwd", "listdir", "scandir") if hasattr(os, name)),
    *((pathlib.Path, name) for name in _METHODS),
)
_OWNERS: Final = tuple(owner for owner, _ in _WATCHED)
_NAMES: Final = tuple(name for _, name in _WATCHED)
_THINGS: Final = tuple(map(getattr, _OWNERS, _NAMES))

# Methods that at most ask the kernel for the current directory: getcwd(2) never waits.
_INLINE_METHODS: Final[dict[str, Any]] = {
    name: getattr(pathlib.Path, name) for name in ("absolute", "cwd", "home")
}
_INLINE: Final[dict[object, str]] = {
    **{getattr(method, "__func__", method): name for name, method in _INLINE_METHODS.items()},
    **{
        function: name
        for function, name in trio_path_functions().items()
        if name in _INLINE_METHODS
    },
}
_PATH_CLASSES: Final = (pathlib.PosixPath, trio.PosixPath, pathlib.Path, trio.Path)

# Methods that read or write a file whole, as `open` does.
_OPENING: Final = frozenset(("open", "read_text", "write_bytes", "write_text"))

# Methods that need no path object: making one takes longer than some of these calls.
_TWINS: Final[dict[str, Callable[..., object]]] = {
    "stat": paths.stat,
    "lstat": paths.lstat,
    "read_bytes": paths.read_bytes,
}
