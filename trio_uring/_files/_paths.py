"""The functions of `os` and the methods of `pathlib.Path` that run on a bridge.

The first half has each function of `os` for which there is an operation. Each raises the same audit
event as in `os`, before its operation. The second half has `RingPath`, a path whose basic methods
call these functions. The methods that `pathlib` builds on those (``exists``, ``is_file``,
``read_text``) are `pathlib`'s own code.
"""

from __future__ import annotations

import errno
import io
import os
import pathlib
import sys
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast

from trio_uring import _operations as operations
from trio_uring._engine._ring import find_cached, is_in_unknown_mount, is_missing
from trio_uring._errors import operation_error

from ._bridge import current_bridge
from ._open import learn_mount, open_file, open_on_ring, path_has_server
from ._raw import RingFileIO

if TYPE_CHECKING:
    from typing_extensions import Self

    from trio_uring._operations import Operation

    from ._bridge import GreenletBridge

T = TypeVar("T")

# Encoding this many characters, or decoding this many bytes, takes about a millisecond. More is
# done in a thread.
TEXT_MAX: Final = 1024 * 1024

_Path = str | bytes | os.PathLike[str]
_NO_DIR_FD: Final = -1  # the value that audit events have


def _bridge() -> GreenletBridge:
    bridge = current_bridge()
    assert bridge is not None
    return bridge


def _perform(operation: Operation[T]) -> T:
    return _bridge().perform(operation)


# --- os -------------------------------------------------------------------------------------


def stat(path: _Path | int, *, follow_symlinks: bool = True) -> os.stat_result:
    """See `os.stat`."""
    if isinstance(path, int):
        return _perform(operations.statx(path))
    # The kernel hands every STATX to a worker: 60 microseconds, while stat(2) takes 2.
    status = stat_known(path, follow_symlinks=follow_symlinks)
    if status is not None:
        return status
    return _perform(operations.statx(path, follow_symlinks=follow_symlinks))


def stat_known(path: _Path, *, follow_symlinks: bool = True) -> os.stat_result | None:
    """Return what `os.stat` does, or raise what it does, if the kernel's cache knows it."""
    encoded, flags = os.fsencode(path), 0 if follow_symlinks else os.O_NOFOLLOW
    fd = find_cached(encoded, flags)
    if is_in_unknown_mount(fd) and learn_mount(encoded, flags):
        fd = find_cached(encoded, flags)
    if is_missing(fd):
        raise operation_error(fd, os.fspath(path))
    if fd < 0:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def lstat(path: _Path) -> os.stat_result:
    """See `os.lstat`."""
    return stat(path, follow_symlinks=False)


def unlink(path: _Path) -> None:
    """See `os.unlink` and `os.remove`."""
    sys.audit("os.remove", os.fspath(path), _NO_DIR_FD)
    _perform(operations.unlinkat(path))


def rmdir(path: _Path) -> None:
    """See `os.rmdir`."""
    sys.audit("os.rmdir", os.fspath(path), _NO_DIR_FD)
    _perform(operations.unlinkat(path, directory=True))


def mkdir(path: _Path, mode: int = 0o777) -> None:
    """See `os.mkdir`."""
    sys.audit("os.mkdir", os.fspath(path), mode, _NO_DIR_FD)
    _perform(operations.mkdirat(path, mode))


def rename(source: _Path, target: _Path) -> None:
    """See `os.rename` and `os.replace`."""
    sys.audit("os.rename", os.fspath(source), os.fspath(target), _NO_DIR_FD, _NO_DIR_FD)
    _perform(operations.renameat(source, target))


def symlink(source: _Path, target: _Path, target_is_directory: bool = False) -> None:  # noqa: FBT001, FBT002
    """See `os.symlink`."""
    sys.audit("os.symlink", os.fspath(source), os.fspath(target), _NO_DIR_FD)
    _perform(operations.symlinkat(source, target))


def link(source: _Path, target: _Path) -> None:
    """See `os.link`."""
    sys.audit("os.link", os.fspath(source), os.fspath(target), _NO_DIR_FD, _NO_DIR_FD)
    # Like link(2), which os.link calls by default: a symbolic link is not followed.
    _perform(operations.linkat(source, target))


def ftruncate(fd: int, size: int) -> None:
    """See `os.ftruncate`."""
    sys.audit("os.truncate", fd, size)
    try:
        _perform(operations.ftruncate(fd, size))
    except OSError as exc:
        if exc.errno != errno.EFBIG:
            raise
        # SIGXFSZ is delivered to the kernel worker, and lost. A thread's is not.
        _bridge().call_in_thread(partial(os.ftruncate, fd, size))


def fsync(fd: int) -> None:
    """See `os.fsync`."""
    _perform(operations.fsync(fd))


def fdatasync(fd: int) -> None:
    """See `os.fdatasync`."""
    _perform(operations.fsync(fd, data_only=True))


# --- pathlib --------------------------------------------------------------------------------


def read_bytes(path: str) -> bytes:
    """See `pathlib.Path.read_bytes`. Needs no buffered layer, as the file is read as a whole."""
    if path_has_server(_bridge(), path):
        return _bridge().call_in_thread(pathlib.PosixPath(path).read_bytes)
    with RingFileIO(path, "r", True, open_on_ring) as raw:  # noqa: FBT003 (FileIO's signature)
        raw.set_private()
        return cast("bytes", raw.readall())  # not None: it was opened without O_NONBLOCK


class RingPath(pathlib.PosixPath):
    """A path whose methods use the ring, on a bridge.

    It overrides those methods of `pathlib.Path` that call `os` themselves.
    """

    # Set by read_text, for `open`. A RingPath is made for one call.
    _text_max: int | None = None

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """See `pathlib.Path.stat`."""
        return stat(self, follow_symlinks=follow_symlinks)

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """See `pathlib.Path.open`."""
        if "b" not in mode:
            encoding = io.text_encoding(encoding)  # type: ignore[attr-defined]  # 3.10
        file = open_file(os.fspath(self), mode, buffering, encoding, errors, newline)
        if self._text_max is not None and file.buffer.raw.size_left() > self._text_max:  # type: ignore[attr-defined]
            return _LargeText(file)  # type: ignore[return-value]  # all that read_text needs
        return file

    def read_text(self, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401 (they differ by version)
        """See `pathlib.Path.read_text`."""
        self._text_max = TEXT_MAX
        return super().read_text(*args, **kwargs)

    def unlink(self, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        """See `pathlib.Path.unlink`."""
        try:
            unlink(self)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        """See `pathlib.Path.rmdir`."""
        rmdir(self)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        """See `pathlib.Path.mkdir`."""
        try:
            mkdir(self, mode)
        except FileNotFoundError:
            if not parents or self.parent == self:
                raise
            self.parent.mkdir(parents=True, exist_ok=True)
            self.mkdir(mode, parents=False, exist_ok=exist_ok)
        except OSError:
            # As in pathlib: the kind of the error does not matter if the directory exists.
            if not exist_ok or not self.is_dir():
                raise

    def rename(self, target: str | os.PathLike[str]) -> pathlib.Path:  # type: ignore[override]
        """See `pathlib.Path.rename`."""
        rename(self, target)
        return pathlib.PosixPath(target)

    def replace(self, target: str | os.PathLike[str]) -> pathlib.Path:  # type: ignore[override]
        """See `pathlib.Path.replace`."""
        rename(self, target)
        return pathlib.PosixPath(target)

    def symlink_to(self, target: _Path, target_is_directory: bool = False) -> None:  # type: ignore[override]  # noqa: FBT001, FBT002
        """See `pathlib.Path.symlink_to`."""
        symlink(target, self)

    def hardlink_to(self, target: _Path) -> None:  # type: ignore[override]
        """See `pathlib.Path.hardlink_to`."""
        link(target, self)


class _LargeText:
    """What `RingPath.open` returns to read_text for a large file. Decodes in a thread."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()

    def read(self) -> str:
        """Return all the text."""
        return _bridge().call_in_thread(self._file.read)
