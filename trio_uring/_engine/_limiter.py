"""`Limiter`: at most so many operations at once, first come, first served.

Trio's `trio.CapacityLimiter` belongs to tasks and releases in the task that acquired. Here the
completion of an operation gives its token back, in no task, and a batch takes many at once.
"""

from __future__ import annotations

import attrs
import trio
from trio.lowlevel import ParkingLot


@attrs.define(eq=False)
class Limiter:
    """A number of tokens, and the tasks that wait for one."""

    available_tokens: int
    waiters: ParkingLot = attrs.Factory(ParkingLot)
    _many: trio.StrictFIFOLock = attrs.Factory(trio.StrictFIFOLock)

    async def acquire(self) -> None:
        """Take a token. If cancelled while waiting, none was taken."""
        if self.available_tokens:
            self.available_tokens -= 1
        else:
            await self.waiters.park()  # release() hands its token over

    async def acquire_shielded(self) -> None:
        """Take a token; the wait for it cannot be cancelled."""
        if self.available_tokens:
            self.available_tokens -= 1
        else:
            with trio.CancelScope(shield=True):
                await self.waiters.park()

    async def acquire_many(self, count: int) -> None:
        """Take *count* tokens; no more than there are altogether.

        They are taken one by one, in line with all other waiters. Two tasks that take many at the
        same time could each hold what the other waits for, so only one does, and then the next.
        If cancelled, none was taken.
        """
        if self.available_tokens >= count:
            self.available_tokens -= count
            return
        async with self._many:
            taken = 0
            try:
                while taken < count:
                    await self.acquire()
                    taken += 1
            except BaseException:
                self.release_many(taken)
                raise

    def release(self) -> None:
        """Give a token to the first waiter, if there is one."""
        if self.waiters:
            self.waiters.unpark()
        else:
            self.available_tokens += 1

    def release_many(self, count: int) -> None:
        """Give *count* tokens back."""
        if self.waiters:
            for _ in range(count):
                self.release()
        else:
            self.available_tokens += count
