"""Counters of rounds, bytes, fds and steps, to check that what went in has come out."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Rounds:
    """How the rounds of a race ended.

    *cancelled*: the operation did nothing. *completed*: it had its result before the cancellation
    was requested. *late*: the cancellation was requested, but the result came first.
    """

    ENDINGS = ("cancelled", "completed", "late")

    def __init__(self) -> None:
        self._endings: Counter[str] = Counter()

    def add(self, ending: str) -> None:
        """Count one round."""
        assert ending in self.ENDINGS, ending
        self._endings[ending] += 1

    def check(self) -> None:
        """Fail if one of the endings never occurred, as that race was then not tested."""
        assert all(self._endings[ending] for ending in self.ENDINGS), str(self)

    def __getitem__(self, ending: str) -> int:
        return self._endings[ending]

    def __str__(self) -> str:
        counts = ", ".join(f"{self._endings[ending]} {ending}" for ending in self.ENDINGS)
        return f"{self._endings.total()} rounds, {counts}"


def open_fds() -> dict[int, str]:
    """Return the open fds of this process, and the file that each refers to."""
    fds: dict[int, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the directory itself, while it was read
            fds[int(entry.name)] = str(entry.readlink())
    return fds


class ByteLedger:
    """A stream of numbered bytes, each of which must arrive once and in order."""

    def __init__(self) -> None:
        self._sent = 0
        self._received = 0

    def take(self, size: int) -> bytes:
        """Return the next *size* bytes to send."""
        data = _numbered(self._sent, size)
        self._sent += size
        return data

    def take_back(self, size: int) -> None:
        """Note that the last *size* bytes taken were not sent."""
        self._sent -= size

    def received(self, data: bytes | bytearray | memoryview) -> None:
        """Check bytes that arrived."""
        assert bytes(data) == _numbered(self._received, len(data))
        self._received += len(data)

    @property
    def missing(self) -> int:
        """The number of bytes that were sent and have not arrived."""
        return self._sent - self._received


# 251 is prime, so that no buffer size hides a shift.
_PATTERN = bytes(range(251))


def _numbered(start: int, size: int) -> bytes:
    first = start % len(_PATTERN)
    repeats = (first + size) // len(_PATTERN) + 1
    return (_PATTERN * repeats)[first : first + size]


async def steps_beside(call: Callable[[], Awaitable[object]], times: int) -> int:
    """Return how often another task ran while *call* was awaited a number of *times*.

    If each call lets others run, this is at least once for all but the first.
    """
    steps = 0

    async def count() -> None:
        nonlocal steps
        while True:
            steps += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        before = steps
        for _ in range(times):
            await call()
        after = steps
        nursery.cancel_scope.cancel()
    return after - before
