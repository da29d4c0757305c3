"""`SpareBuffers`: aligned buffers for direct reads that return bytes.

Mapping memory for each read, and unmapping it, takes longer than everything else that a small read
costs (benchmarks/bench_direct.py).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from trio_uring._engine._io_manager import current_ring, current_run_state
from trio_uring._engine._run_state import RunResource

from ._registered_buffers import BufferLease, RegisteredBuffers

# In bytes. For larger reads, a mapping costs little in comparison.
SPARE_SIZE: Final = 65536

# How many are reserved together: 1 MiB. At half, 32 tasks that read at once need two pools.
_POOL_COUNT: Final = 16

# Pools whose memory the kernel may still write to: leaked on purpose.
_leaked: Final[list[object]] = []


class SpareBuffers(RunResource):
    """The run's spare buffers: as many as were needed at once."""

    def __init__(self) -> None:
        self._free: list[BufferLease] = []
        self._pools: list[RegisteredBuffers] = []
        self._ring = current_ring("files")

    def take(self) -> BufferLease:
        """Take a buffer, of `SPARE_SIZE`."""
        self._forget_if_lost()
        if not self._free:
            pool = RegisteredBuffers(_POOL_COUNT, SPARE_SIZE)
            self._pools.append(pool)
            self._free = [pool.lease_nowait() for _ in range(_POOL_COUNT)]
        return self._free.pop()

    def put_back(self, lease: BufferLease) -> None:
        """Give a buffer back, which is not used any more."""
        self._forget_if_lost()
        if lease.pool in self._pools:
            self._free.append(lease)
        else:
            with suppress(BufferError):  # the operation that failed still has a view of it
                lease.release()

    def _forget_if_lost(self) -> None:
        """Forget all buffers if the run has lost its ring: the kernel may still write to some."""
        if self._ring is None or not self._ring.fallback_reason:
            return
        _leaked.append(self._pools)
        self.close(drained=False)
        self._pools, self._ring = [], None

    def close(self, *, drained: bool) -> None:
        """Give the buffers back to their pools."""
        while self._free:
            self._free.pop().release()


def spare_buffers() -> SpareBuffers:
    """Return the spare buffers of the current run."""
    return current_run_state().get(SpareBuffers)
