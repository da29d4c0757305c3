"""`SpareBuffers`: aligned buffers for direct reads that return bytes.

Mapping memory for each read, and unmapping it, takes longer than everything else that a small read
costs (benchmarks/bench_direct.py).
"""

from __future__ import annotations

from typing import Final

from trio_uring._engine._io_manager import current_run_state
from trio_uring._engine._run_state import RunResource

from ._registered_buffers import BufferLease, RegisteredBuffers

# In bytes. For larger reads, a mapping costs little in comparison.
SPARE_SIZE: Final = 65536

# How many are reserved together: 1 MiB. At half, 32 tasks that read at once need two pools.
_POOL_COUNT: Final = 16


class SpareBuffers(RunResource):
    """The run's spare buffers: as many as were needed at once."""

    def __init__(self) -> None:
        self._free: list[BufferLease] = []

    def take(self) -> BufferLease:
        """Take a buffer, of `SPARE_SIZE`."""
        if not self._free:
            pool = RegisteredBuffers(_POOL_COUNT, SPARE_SIZE)
            self._free = [pool.lease_nowait() for _ in range(_POOL_COUNT)]
        return self._free.pop()

    def put_back(self, lease: BufferLease) -> None:
        """Give a buffer back, which is not used any more."""
        self._free.append(lease)

    def close(self, *, drained: bool) -> None:
        """Give the buffers back to their pools."""
        while self._free:
            self._free.pop().release()


def spare_buffers() -> SpareBuffers:
    """Return the spare buffers of the current run."""
    return current_run_state().get(SpareBuffers)
