"""`read_many`: many parts of a file in one call.

The C core tries all of them without waiting, in one call, which costs less than as many calls of
`os.pread`. What is not in the page cache is then read by operations that are submitted together.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import cancel_shielded_checkpoint

from trio_uring import _operations as operations
from trio_uring._batch import perform_many
from trio_uring._engine._file_calls import read_many_cached

from ._bridge import INLINE_MAX, current_files
from ._raw import IN_WORKER_MIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from ._bridge import FilesRun

    Part = tuple[int, int]  # its size and its offset

# The most parts that are tried in one call, so that none takes long, however small they are.
_TRIED_MAX: Final = 256


def _bytearrays(parts: Sequence[Part]) -> Sequence[Buffer]:
    return [bytearray(size) for size, _ in parts]


async def read_many(
    fd: int,
    parts: Sequence[Part],
    *,
    nowait: bool,
    in_worker: bool,
    buffers_for: Callable[[Sequence[Part]], Sequence[Buffer]] = _bytearrays,
) -> list[bytes]:
    """Read *parts* of a file. Ignores cancellation.

    Args:
      fd: An open file.
      parts: The size and the offset of each part.
      nowait: Whether to try first without waiting.
      in_worker: Whether kernel workers read what must be waited for, as they do large parts.
      buffers_for: Returns the memory to read it into.

    Raises:
      OSError: as pread(2).
    """
    files = current_files()
    with trio.CancelScope(shield=True):
        if files is None:
            return await trio.to_thread.run_sync(_read_synchronously, fd, parts, buffers_for)
        found: list[bytes | None] = [None] * len(parts)
        if nowait:
            for start, end in _groups(parts):
                found[start:end] = _read_cached(fd, parts[start:end])
                if not files.manager.turn_budget.skip_schedule_point():
                    await cancel_shielded_checkpoint()
        missing = [index for index, data in enumerate(found) if data is None]
        files.inline += len(parts) - len(missing)
        if missing or not parts:
            rest = [parts[index] for index in missing]
            read = await _read_on_ring(files, fd, rest, buffers_for(rest), in_worker=in_worker)
            for index, data in zip(missing, read, strict=True):
                found[index] = data
        return [data for data in found if data is not None]
    raise AssertionError("a shielded scope swallows no exception")


def _groups(parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of *parts* that may be tried together, without blocking the loop."""
    start = total = 0
    for index, (size, _) in enumerate(parts):
        if index > start and (total + size > INLINE_MAX or index - start == _TRIED_MAX):
            yield start, index
            start, total = index, 0
        total += size
        if size > INLINE_MAX:  # by itself: it is not tried
            start, total = index + 1, 0
    if start < len(parts):
        yield start, len(parts)


def _read_cached(fd: int, parts: Sequence[Part]) -> list[bytes | None]:
    """Read *parts* without waiting; None for those that are not in the page cache as a whole."""
    memory = bytearray(sum([size for size, _ in parts]))
    counts = read_many_cached(fd, memory, parts)
    found: list[bytes | None] = []
    start = 0
    with memoryview(memory) as view:
        for (size, _), count in zip(parts, counts, strict=True):
            # Shorter: at the end of the file, or the rest is not in the page cache.
            is_whole = count in (size, 0)
            found.append(bytes(view[start : start + count]) if is_whole else None)
            start += size
    return found


async def _read_on_ring(
    files: FilesRun, fd: int, parts: Sequence[Part], buffers: Sequence[Buffer], *, in_worker: bool
) -> list[bytes]:
    outcomes = await perform_many(
        operations.read(
            fd, buffer, offset, cancellable=False, in_worker=in_worker or size > IN_WORKER_MIN
        )
        for buffer, (size, offset) in zip(buffers, parts, strict=True)
    )
    files.on_ring += len(parts)
    counts = [outcome.unwrap() for outcome in outcomes]
    return [
        bytes(memoryview(buffer)[:count]) for buffer, count in zip(buffers, counts, strict=True)
    ]


def _read_synchronously(
    fd: int, parts: Sequence[Part], buffers_for: Callable[[Sequence[Part]], Sequence[Buffer]]
) -> list[bytes]:
    return [
        bytes(memoryview(buffer)[: os.preadv(fd, [buffer], offset)])
        for buffer, (_, offset) in zip(buffers_for(parts), parts, strict=True)
    ]
