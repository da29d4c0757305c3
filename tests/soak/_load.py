"""`Load`: what the workloads of a soak share. It cancels, hashes, counts and measures."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

T = TypeVar("T")

# A round takes milliseconds. One that has not ended after so many ticks waits for what does not
# come. A tick is a turn of the loop, and at least TICK_SECONDS: five minutes for all of them, or as
# much more as the loop gets less of the machine.
ROUND_TICKS: Final = 15_000
TICK_SECONDS: Final = 0.02

CANCELLED_SHARE: Final = 0.3

# Small and large: to be done at once, and to wait for room.
SIZES: Final = (1, 10, 500, 5_000, 60_000)
TOTALS: Final = (0, 1, 100, 5_000, 200_000)


class LostError(Exception):
    """Bytes, an fd or a task were lost."""


class Load:
    """What a workload asks: whether to go on, whom to cancel, where to write down.

    Args:
      seed: Of all that is random.
      seconds: How long to go on, or None.
      rounds: How many rounds each workload does, or None.
    """

    def __init__(self, seed: int, seconds: float | None, rounds: int | None) -> None:
        self.random = random.Random(seed)
        self.end = None if seconds is None else time.monotonic() + seconds
        self.rounds_max = rounds
        self.rounds = Counter[str]()
        self.cancelled = Counter[str]()
        self.bytes = 0
        self.latencies: dict[str, list[float]] = {"echo": [], "timer": []}
        self._ticks = 0
        self._started: dict[trio.CancelScope, int] = {}  # rounds, and in which tick

    def goes_on(self, workload: str) -> bool:
        """Return whether *workload* has another round to do, and count it."""
        if self.rounds_max is not None and self.rounds[workload] >= self.rounds_max:
            return False
        if self.end is not None and time.monotonic() >= self.end:
            return False
        self.rounds[workload] += 1
        return True

    async def tick_repeatedly(self) -> None:
        """Cancel the rounds that hang."""
        while True:
            await trio.sleep(TICK_SECONDS)
            self._ticks += 1
            for scope, tick in self._started.items():
                if self._ticks - tick > ROUND_TICKS:
                    scope.cancel()

    @contextmanager
    def round(self, workload: str) -> Iterator[None]:
        """Fail if a round does not come to its end."""
        with trio.CancelScope() as scope:
            self._started[scope] = self._ticks
            try:
                yield
            finally:
                del self._started[scope]
        if scope.cancelled_caught:
            raise LostError(f"a round of {workload} hung")

    async def perhaps(self, kind: str, operation: Callable[[], Awaitable[T]]) -> T | None:
        """Return what *operation* returns, or None if it was cancelled, as some are."""
        if self.random.random() >= CANCELLED_SHARE:
            return await operation()
        with self.cancelling():
            return await operation()
        self.cancelled[kind] += 1
        return None

    def cancelling(self) -> trio.CancelScope:
        """Return a scope that is cancelled at once, or after some of the loop's turns."""
        return trio.move_on_after(self.random.choice((0, 0, 0.0001, 0.0005, 0.002)))

    def size(self) -> int:
        return self.random.randrange(1, self.random.choice(SIZES) + 1)

    def data(self) -> bytes:
        return self.random.randbytes(self.random.choice(TOTALS))


class Received:
    """A hash of what has arrived, to be compared with what was sent."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._hash = hashlib.blake2b()
        self.count = 0

    def add(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)
        self.count += len(data)
        self._load.bytes += len(data)

    def check(self, sent: bytes, *, whole: bool) -> None:
        """Fail unless what arrived is *sent*, or if not *whole*, the first part of it."""
        if self.count > len(sent) or (whole and self.count != len(sent)):
            raise LostError(f"{self.count} bytes arrived of {len(sent)}")
        if self._hash.digest() != hashlib.blake2b(sent[: self.count]).digest():
            raise LostError(f"the {self.count} bytes that arrived are not those that were sent")
