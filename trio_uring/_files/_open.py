"""`open_file`: like `io.open`, with a `RingFileIO` as the raw file.

`is_plain` says whether it supports the arguments of a call. For all other arguments, `io.open`
itself is called in a thread, and raises its own errors.

Why a whole file is not read in one linked submission
-----------------------------------------------------

Facts. A linked chain of open, read and close on a fixed file takes the kernel 10 microseconds for
one cached file of 4 KiB, and 5 for each file in a batch of 32. The system calls that are made here
(openat2 for cached paths, fcntl, fstat, lseek, two preadv2, close) take 11 and 10 (in C, Linux
6.18). Making three operations takes Python longer than that: with 32 tasks, a chain reads 4 KiB in
42 microseconds of CPU and 64 KiB in 48, and ``Path.read_bytes`` in 34 and 39
(benchmarks/bench_linked_files.py). A chain is also built before the file's size is known, or
whether it is a FIFO.

What does this mean for us? A chain would gain nothing for reading. Files are opened and read by
direct system calls if the kernel has everything in its cache, and on the ring otherwise. A chain
does gain something for writing: see `trio_uring.write_file`.
"""

from __future__ import annotations

import codecs
import errno
import io
import itertools
import os
import select
import stat
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import IO, TYPE_CHECKING, Any, Final, cast

import trio

from trio_uring import _operations as operations
from trio_uring._engine._file_systems import FileSystem, note_file_system
from trio_uring._engine._ring import (
    mode_cached,
    open_at_once,
    open_cached,
    path_is_without_server,
)
from trio_uring._errors import operation_error

from ._bridge import current_bridge
from ._raw import RingFileIO

if TYPE_CHECKING:
    from trio_uring._engine._io_manager import UringIOManager

    from ._bridge import FilesRun, GreenletBridge

_Path = str | bytes

_Buffered = Callable[[RingFileIO, int], io.BufferedReader | io.BufferedWriter | io.BufferedRandom]


# The mode of the raw file, whether the file is binary, and the class of the buffered file.
_Mode = tuple[str, bool, _Buffered]


def _mode(base: str, plus: str, kind: str) -> _Mode:
    buffered: object = io.BufferedReader if base == "r" else io.BufferedWriter
    if plus:
        buffered = io.BufferedRandom
    return base + plus, kind == "b", cast("_Buffered", buffered)


# The letters of a mode can be in any order: "rb+", "+br", ...
_MODES: Final = {
    "".join(letters): _mode(base, plus, kind)
    for base in "rwxa"
    for plus in ("", "+")
    for kind in ("", "b", "t")
    for letters in itertools.permutations(base + plus + kind)
}

# With these, each byte "\n" of a text file ends a line. Others may end at "\r".
_SPLIT_AT_LF: Final = (None, "", "\n")
_ASCII_CODECS: Final = ("utf-8", "iso8859-1", "ascii")

# The modes of files that are only read.
READING: Final = frozenset(letters for letters, mode in _MODES.items() if mode[0] == "r")

_NEWLINES: Final = ("", "\n", "\r", "\r\n")

# Python's own error handlers, which are written in C. Those of the program may be slow.
_ERRORS: Final = frozenset(
    (
        None,
        "strict",
        "ignore",
        "replace",
        "surrogateescape",
        "surrogatepass",
        "xmlcharrefreplace",
        "backslashreplace",
        "namereplace",
    )
)
# The codecs of the standard library that are written in pure Python, and therefore slow.
_SLOW_CODECS: Final = frozenset(("encodings.idna", "encodings.punycode"))

_CREATES: Final = os.O_CREAT | os.O_TRUNC
_O_PATH: Final = getattr(os, "O_PATH", 0)  # opens a path without access to the file's contents

OPEN_FILES: Final = "/proc/self/fd"

# The permissions of a new file, before the umask is applied. The same as in `io.FileIO`.
_MODE: Final = 0o666


def is_plain(
    file: object,
    mode: object = "r",
    buffering: object = -1,
    encoding: object = None,
    errors: object = None,
    newline: object = None,
    closefd: object = True,  # noqa: FBT002 (open's signature)
    opener: object = None,
) -> bool:
    """Return whether `open_file` supports these arguments, which are those of `io.open`."""
    return (
        (type(file) is int or isinstance(file, _Path))
        and type(mode) is str
        and mode in _MODES
        and type(buffering) is int
        and (encoding is None or type(encoding) is str)
        and (errors is None or type(errors) is str)
        and (newline is None or (type(newline) is str and newline in _NEWLINES))
        and type(closefd) is bool
        and (
            encoding is errors is newline is None
            if "b" in mode
            else buffering != 0 and errors in _ERRORS and is_fast_codec(encoding)
        )
        and (opener is None or callable(opener))
    )


@cache
def is_fast_codec(encoding: str | None) -> bool:
    """Return whether *encoding* is one of Python's fast codecs, safe to use in the event loop."""
    if encoding is None or encoding == "locale":
        return True
    try:
        decoder = codecs.lookup(encoding).incrementaldecoder
    except (LookupError, UnicodeError, ValueError):
        return False
    module = getattr(decoder, "__module__", "")
    return module.startswith("encodings.") and module not in _SLOW_CODECS


def open_file(
    file: _Path | int,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,  # noqa: FBT001, FBT002 (open's signature)
    opener: Callable[[Any, int], int] | None = None,
) -> IO[Any]:
    """Open *file* like `io.open`: on the ring in a greenlet bridge, otherwise blocking.

    Raises:
      OSError: as `io.open`, with its ``filename``.
    """
    raw_mode, binary, open_buffered = _MODES[mode]
    if binary and buffering == 1:
        warnings.warn(
            "line buffering (buffering=1) isn't supported in binary mode, the default buffer"
            " size will be used",
            RuntimeWarning,
            stacklevel=2,
        )
        buffering = -1
    bridge = current_bridge()
    if opener is None and not isinstance(file, int) and bridge is not None:
        if path_has_server(bridge, file):
            arguments = (mode, buffering, encoding, errors, newline, closefd)
            return bridge.call_in_thread(partial(open_file, file, *arguments))
        opener = open_on_ring
    raw = RingFileIO(file, raw_mode, closefd, opener)
    is_private = opener is open_on_ring or opener is open_now
    if is_private:
        raw.set_private(is_regular=opener is open_now)
    result: io.RawIOBase | io.BufferedIOBase | io.TextIOWrapper = raw
    try:
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else _buffer_size(raw)
        result = buffered = open_buffered(raw, size)
        if binary:
            return buffered
        line_buffering = buffering == 1 or (buffering < 0 and raw.isatty())
        result = text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering)
        text.mode = mode  # type: ignore[misc]  # read-only in typeshed
        raw.counts_lines = newline in _SPLIT_AT_LF and has_ascii_line_ends(text.encoding)
        if is_private:
            raw.set_private()  # Python 3.10 called fileno() to find the encoding
    except BaseException:
        result.close()
        raise
    return text


@cache
def has_ascii_line_ends(encoding: str) -> bool:
    """Return whether each byte 10 of a text in *encoding* is a line feed."""
    return codecs.lookup(encoding).name in _ASCII_CODECS


def _buffer_size(raw: RingFileIO) -> int:
    size: int = raw._blksize  # type: ignore[attr-defined]  # noqa: SLF001 (io.open reads it too)
    if sys.version_info >= (3, 14):
        return max(min(size, 8192 * 1024), io.DEFAULT_BUFFER_SIZE)
    return size


# --- The fd ---------------------------------------------------------------------------------


def path_has_server(bridge: GreenletBridge, path: _Path) -> bool:
    """Return whether opening *path*, or creating it, asks a server. This call asks none."""
    encoded = os.fsencode(path)
    if b"\0" in encoded or path_is_without_server(encoded):
        return False
    return bridge.wait_for(_look_for_server(bridge.files.manager, encoded))


def learn_mount(path: bytes, flags: int) -> bool:
    """Note the mount of what is at *path*; return whether that is in the cache and has no server.

    Of the *flags* of open(2), only `os.O_NOFOLLOW` is used. Asks no server.
    """
    fd = open_cached(path, flags & os.O_NOFOLLOW | _O_PATH)
    if fd is None:
        return False
    try:
        return note_file_system(fd) is not FileSystem.SERVER
    finally:
        os.close(fd)


async def _look_for_server(manager: UringIOManager, path: bytes) -> bool:
    # Try the file itself, then the directory in which it would be created. Errors of the path are
    # reported when it is opened.
    for place in (path, path[: path.rfind(b"/") + 1] or b"."):
        try:
            fd = await manager.perform_shielded(operations.openat(place, _O_PATH))
        except OSError:
            continue
        kind = note_file_system(fd)
        os.close(fd)
        return kind is FileSystem.SERVER
    return False


async def open_fd(manager: UringIOManager, path: _Path, flags: int, mode: int) -> int:
    """Open *path* like open(2), without a bridge. If cancelled, the file is opened nevertheless."""
    encoded = os.fsencode(path)
    in_worker = bool(flags & _CREATES)  # as the kernel does by itself for these flags
    if not in_worker and b"\0" not in encoded:
        if path_is_without_server(encoded):
            fd = open_cached(encoded, flags)
            if fd is not None:
                return fd
        else:
            in_worker = await _look_for_server(manager, encoded)
    return await manager.perform_shielded(operations.openat(path, flags, mode, wait=in_worker))


# How FIFOs are opened
# --------------------
#
# Facts. open(2) of a FIFO waits until the other end is opened. IORING_OP_OPENAT tries a
# non-blocking open first: for reading, it succeeds immediately, with or without a writer; for
# writing, it fails with ENXIO if nobody reads. With O_CREAT or O_TRUNC the kernel opens in a
# worker, and waits there. An open that waits can be cancelled, and occupies a kernel worker. If
# opens occupy all the workers, no other operation on files makes progress.
#
# What does this mean for us? Open without waiting, check whether it is a FIFO, and only then open
# it again and wait. If the open may create a file, check for a FIFO first. At most half of the
# workers may wait in opens. Beyond that, an open waits in a thread, as in Trio.


def open_now(path: _Path, flags: int) -> int:
    """Open the regular file at *path* without a bridge. The kernel's cache has the path.

    This is an opener. If the cache has just lost it, this waits for a disk.
    """
    fd = open_at_once(os.fsencode(path), flags)
    if fd < 0:
        raise operation_error(fd, path)
    return fd


def open_on_ring(path: _Path, flags: int) -> int:
    """Open *path* like open(2). This is the opener that `RingFileIO` calls on a bridge."""
    bridge = current_bridge()
    assert bridge is not None
    if flags & _CREATES:
        return _create(bridge, path, flags)
    fd = open_cached(os.fsencode(path), flags)
    if fd is None:
        return _open_slowly(bridge, path, flags)
    return _wait_if_fifo(bridge, path, flags, fd)


def _create(bridge: GreenletBridge, path: _Path, flags: int) -> int:
    if flags & os.O_ACCMODE == os.O_WRONLY:
        mode = mode_cached(os.fsencode(path), 0)
        if mode >= 0 and stat.S_ISFIFO(mode):
            return bridge.wait_for(_open_waiting(bridge.files, path, flags))
    # Cancellable, because it may be a FIFO that was not cached. Cancellation loses no fd.
    return bridge.perform_cancellable(operations.openat(path, flags, _MODE))


def _open_slowly(bridge: GreenletBridge, path: _Path, flags: int) -> int:
    try:
        fd = bridge.perform(operations.openat(path, flags, _MODE))
    except OSError as exc:
        if exc.errno != errno.ENXIO or not bridge.wait_for(_is_fifo(bridge.files, path)):
            raise
        return bridge.wait_for(_open_waiting(bridge.files, path, flags))
    return _wait_if_fifo(bridge, path, flags, fd)


def _wait_if_fifo(bridge: GreenletBridge, path: _Path, flags: int, fd: int) -> int:
    try:
        # Fails for a FIFO, and is much faster than fstat.
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        if flags & os.O_ACCMODE == os.O_RDONLY and stat.S_ISFIFO(os.fstat(fd).st_mode):
            return bridge.wait_for(_open_to_read(bridge.files, path, flags, fd))
    return fd


async def _is_fifo(files: FilesRun, path: _Path) -> bool:
    status = await files.manager.perform_shielded(operations.statx(path))
    return stat.S_ISFIFO(status.st_mode)


async def _open_to_read(files: FilesRun, path: _Path, flags: int, fd: int) -> int:
    """Wait until the FIFO that *fd* reads from has or had a writer, and return *fd*."""
    manager = files.manager
    scope, watch = trio.CancelScope(), trio.CancelScope()

    async def look_for_traces() -> None:
        # A writer may have opened and closed the FIFO before the second open began to wait. Then
        # the FIFO is readable: it has data, or is at the end of the file.
        with watch, suppress(OSError, trio.ClosedResourceError):
            await manager.perform(operations.poll_add(fd, select.POLLIN))
            scope.cancel()

    # Not in a nursery, which would wrap exceptions in groups.
    trio.lowlevel.spawn_system_task(look_for_traces)
    try:
        with scope:
            os.close(await _open_again(files, path, flags, fd))
    except BaseException as exc:
        manager.notify_closing(fd)
        os.close(fd)
        if isinstance(exc, OSError):
            exc.filename = path
        raise
    finally:
        watch.cancel()
    return fd


async def _open_again(files: FilesRun, path: _Path, flags: int, fd: int) -> int:
    """Open the FIFO that *fd* reads from once more, as open(2) does."""
    try:
        return await _open_waiting(files, f"{OPEN_FILES}/{fd}", flags)
    except FileNotFoundError:  # no /proc; the path is the FIFO's, unless it was just renamed
        return await _open_waiting(files, path, flags)


async def _open_waiting(files: FilesRun, path: _Path, flags: int) -> int:
    """Open a FIFO like open(2). Can be cancelled, unless too many opens wait already."""
    if files.waiting_opens >= files.manager.config.bounded_workers // 2:
        return await trio.to_thread.run_sync(os.open, path, flags, _MODE)
    files.waiting_opens += 1
    try:
        return await files.manager.perform(operations.openat(path, flags, _MODE, wait=True))
    finally:
        files.waiting_opens -= 1
