"""`Limiter`: limits the number of operations in flight; serves waiters in FIFO order.

`trio.CapacityLimiter` cannot be used: the task that acquired a token must release it. Here the
completion of an operation releases its token, outside of any task, and a batch takes many at once.
"""

from __future__ import annotations

import trio
from trio.lowlevel import ParkingLot


class Limiter:
    """A number of tokens, and the tasks that wait for one of them."""

    def __init__(self, available_tokens: int) -> None:
        self.available_tokens: int = available_tokens
        self.waiters: ParkingLot = ParkingLot()
        self._many = trio.StrictFIFOLock()

    async def acquire(self) -> None:
        """Take a token. If cancelled, no token was taken."""
        if not self.try_acquire():
            await self.waiters.park()  # release() passes its token to this task

    def try_acquire(self) -> bool:
        """Take a token if there is one; return whether there was."""
        if not self.available_tokens:
            return False
        self.available_tokens -= 1
        return True

    async def acquire_shielded(self) -> None:
        """Take a token. Cancellation is ignored."""
        if not self.try_acquire():
            with trio.CancelScope(shield=True):
                await self.waiters.park()

    async def acquire_many(self, count: int) -> None:
        """Take *count* tokens, which must not exceed the limiter's total.

        They are taken one by one, each in FIFO order with all other waiters. Only one task at a
        time takes many tokens. Otherwise two of them could deadlock, each holding tokens that the
        other needs. If cancelled, no token was taken.
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
        """Pass a token to the first waiter, or return it if there is none."""
        if self.waiters:
            self.waiters.unpark()
        else:
            self.available_tokens += 1

    def release_many(self, count: int) -> None:
        """Release *count* tokens."""
        if self.waiters:
            for _ in range(count):
                self.release()
        else:
            self.available_tokens += count
