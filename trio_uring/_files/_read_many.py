"""`read_many`: many parts of a file in one call.

The native engine reads all that is in the page cache in one call of C, straight into the result.
What is not there is then read by operations that are submitted together.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio

from trio_uring import _operations as operations
from trio_uring._batch import perform_many
from trio_uring._kernel import native
from trio_uring._operations._operation import IO_MAX
from trio_uring._trio_private import schedule_point

from ._bridge import INLINE_MAX
from ._raw import IN_WORKER_MIN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from ._bridge import FilesRun

    Part = tuple[int, int]  # its size and its offset

RWF_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 8)

# What each part counts besides its size, so that no turn takes long, however small the parts are.
_EACH: Final = 64


def buffers_of(parts: Sequence[Part]) -> Sequence[Buffer]:
    """Return memory for each of *parts*."""
    return [bytearray(size) for size, _ in parts]


async def read_cached(
    files: FilesRun, fd: int, parts: list[Part]
) -> tuple[list[bytes | None], int]:
    """Read *parts* of a file without waiting, except for other tasks that want to run.

    Returns:
      The bytes of each part; None for those that are not in the page cache as a whole, and how many
      these are. A part may be shorter only at the end of the file.
    """
    found: list[bytes | None] = []
    missing = 0
    while True:
        if files.manager.native is not None:
            missing += native.read_many_cached(fd, parts, found)
        else:
            missing += _read_many_cached(files, fd, parts, found)
        if not files.manager.turn_budget.skip_schedule_point():
            await schedule_point()
        if len(found) == len(parts):
            files.inline += len(found) - missing
            return found, missing


def _read_many_cached(
    files: FilesRun, fd: int, parts: list[Part], found: list[bytes | None]
) -> int:
    """Append what is cached to *found*; return how many parts are not. It is the engine's twin."""
    scratch, left, missing = files.scratch, INLINE_MAX, 0
    for size, offset in parts[len(found) :]:
        data = None
        if 0 <= size < len(scratch) and offset >= 0:
            data = _read_part(fd, scratch[:size], offset)
        found.append(data)
        missing += data is None
        left -= _EACH + (size if data is not None else 0)
        if left <= 0:
            break
    return missing


def _read_part(fd: int, buffer: memoryview, offset: int) -> bytes | None:
    try:
        count = os.preadv(fd, [buffer], offset, RWF_NOWAIT)
    except (OSError, OverflowError):
        return None
    return bytes(buffer[:count]) if count in (len(buffer), 0) else None


async def read_missing(
    files: FilesRun,
    fd: int,
    parts: Sequence[Part],
    found: list[bytes | None],
    buffers: Callable[[Sequence[Part]], Sequence[Buffer]],
    *,
    in_worker: bool,
) -> list[bytes]:
    """Read those of *parts* that are None in *found*; return all. Ignores cancellation.

    Args:
      files: The state of the run's files.
      fd: An open file.
      parts: The size and the offset of each part.
      found: What was read before.
      buffers: Returns the memory to read parts into.
      in_worker: Whether kernel workers read them, as they do large parts.

    Raises:
      OSError: as pread(2).
    """
    missing = [part for part, data in zip(parts, found, strict=True) if data is None]
    targets = buffers(missing)
    with trio.CancelScope(shield=True):
        outcomes = await perform_many(
            operations.read(
                fd, buffer, offset, cancellable=False, in_worker=in_worker or size > IN_WORKER_MIN
            )
            for buffer, (size, offset) in zip(targets, missing, strict=True)
        )
        files.on_ring += len(missing)
        counts = [outcome.unwrap() for outcome in outcomes]
        rest = iter(
            [bytes(memoryview(buffer)[:n]) for buffer, n in zip(targets, counts, strict=True)]
        )
        return [next(rest) if data is None else data for data in found]
    raise AssertionError("a shielded scope swallows no exception")


def read_blocking(
    fd: int, parts: Sequence[Part], buffers: Callable[[Sequence[Part]], Sequence[Buffer]]
) -> list[bytes]:
    """Read *parts* of a file, in a thread."""
    return [
        bytes(memoryview(buffer)[: os.preadv(fd, [buffer], offset)])
        for buffer, (_, offset) in zip(buffers(parts), parts, strict=True)
    ]


def check_parts(parts: Sequence[Part]) -> None:
    """Raise `ValueError` if one of *parts* is not a size and an offset."""
    for size, offset in parts:
        if not 0 <= size <= IO_MAX or offset < 0:
            raise ValueError(f"each of requests must be a size and an offset, not {size, offset}")
