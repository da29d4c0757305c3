"""Calls on unbuffered files that are one operation each, and so need no bridge.

A log that appends 4 KiB and calls `fdatasync` takes a fifth less time in Python than with bridges
(benchmarks/bench_files.py append-16).
"""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from trio_uring import _operations as operations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio_uring._operations import Operation

    from ._bridge import FilesRun
    from ._raw import RingFileIO

T = TypeVar("T")

_HERE: Final = -1  # as an offset: the file's position
_fileno: Final = io.FileIO.fileno  # RingFileIO's would make the file shared


class _SharedError(Exception):
    """Others may move the file's position, which needs write(2)."""


def write(
    raw: RingFileIO, files: FilesRun, method: Callable[..., T], args: tuple[Any, ...]
) -> Awaitable[T]:
    """Call *method*, which is ``raw.write``, with *args*: without a bridge if it appends bytes."""
    # What it is, is known only after the first write.
    if len(args) == 1 and type(args[0]) is bytes and args[0] and _appends_on_ring(raw):
        return cast("Awaitable[T]", _append(files, method, args[0], raw))
    return files.call(method, args, raw, True)  # noqa: FBT003 (as in `call`)


def _appends_on_ring(raw: RingFileIO) -> bool:
    return bool(raw.appends and not (raw.nowait_write or raw.is_shared or raw.is_stream))


async def _append(
    files: FilesRun, method: Callable[..., object], data: bytes, raw: RingFileIO
) -> object:
    def operation() -> Operation[int]:
        if raw.is_shared:  # since the call began to wait for its turn
            raise _SharedError
        return operations.write(_fileno(raw), data, _HERE, cancellable=False, in_worker=True)

    def finish(count: int) -> None:
        raw.written += count
        if count < len(data):
            io.FileIO.seek(raw, 0, os.SEEK_END)

    try:
        return await files.perform(operation, raw, finish)
    except _SharedError:
        pass
    except OSError as exc:
        if exc.errno != errno.EFBIG:
            raise
        # SIGXFSZ was delivered to the kernel worker, and lost. A thread's is not.
    return await files.call_in_thread(method, (data,), raw)


async def sync(files: FilesRun, raw: RingFileIO, *, data_only: bool) -> None:
    """Call `os.fsync`, or `os.fdatasync` if *data_only*."""

    def operation() -> Operation[None]:
        return operations.fsync(_fileno(raw), data_only=data_only)

    await files.perform(operation, raw)
