"""`fsync` and `fdatasync`: make durable what was written to a file of Trio's or AnyIO's.

They are functions because type checkers know the methods of those files from Trio and AnyIO.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import trio
from trio.lowlevel import enable_ki_protection

from trio_uring._arguments import wrong_type
from trio_uring._engine._file_systems import FileSystem

from ._bridge import BRIDGE_REFUSED, current_files
from ._methods import raw_of
from ._unbuffered import sync

if TYPE_CHECKING:

    class _File(Protocol):
        def flush(self) -> object: ...
        def fileno(self) -> int: ...

    class AsyncFile(Protocol):
        """A file of `trio.open_file` or `anyio.open_file`."""

        @property
        def wrapped(self) -> _File:
            """The synchronous file."""
            raise NotImplementedError


async def fsync(file: AsyncFile, /) -> None:
    """Write all that was written to *file* to the disk, and wait until it is there.

    This flushes Python's buffer and then writes the file's data and metadata to the disk. It works
    in every run. In a run without a ring it uses a thread.

    Args:
      file: An open file, as returned by `trio.open_file`, `trio.Path.open`, `trio.wrap_file` or
        `anyio.open_file`.

    Raises:
      OSError: as ``flush`` and `os.fsync`: ``EIO``, ``ENOSPC``, ``EDQUOT``; ``EINVAL`` for a pipe
        or terminal. It is not known which data were lost, and the next call may succeed
        nevertheless.
      ValueError: the file is closed.

    A checkpoint. If cancelled before it begins, nothing happens. Once begun, it completes. Other
    tasks that use the same file wait meanwhile.

    Source: io_uring_prep_fsync(3), fsync(2).
    """
    await _sync(_wrapped(file), data_only=False)


async def fdatasync(file: AsyncFile, /) -> None:
    """Like `fsync`, but write only the metadata that is needed to read the data back.

    Source: io_uring_prep_fsync(3), fdatasync(2).
    """
    await _sync(_wrapped(file), data_only=True)


def _wrapped(file: AsyncFile) -> _File:
    wrapped = getattr(file, "wrapped", None)
    if not hasattr(wrapped, "fileno"):
        raise wrong_type("file", file, "a file that trio.open_file or anyio.open_file returned")
    return file.wrapped


@enable_ki_protection
async def _sync(file: _File, *, data_only: bool) -> None:
    args = file, data_only
    files = current_files()
    raw = raw_of(file)
    if files is None or raw is None or BRIDGE_REFUSED:
        if files is not None:
            files.in_thread += 1
        await trio.to_thread.run_sync(_flush_and_sync, *args)
    elif raw.file_system is FileSystem.SERVER:
        await files.call_in_thread(_flush_and_sync, args, raw)
    elif file is raw:  # it has no buffer to flush
        await sync(files, raw, data_only=data_only)
    else:
        await files.call(_flush_and_sync, args, raw)


def _flush_and_sync(file: _File, data_only: bool) -> None:  # noqa: FBT001 (threads pass no keywords)
    file.flush()
    raw = raw_of(file)
    if raw is not None:
        raw.sync(data_only=data_only)
    elif data_only:
        os.fdatasync(file.fileno())
    else:
        os.fsync(file.fileno())
