"""`RegisteredBuffers`: a pool of aligned buffers, registered with the ring and lent out.

For each read or write the kernel looks up and pins the pages of the buffer, and unpins them
afterwards. For registered buffers it does so once, when they are registered. That pays where an
operation costs little else: direct I/O on fast disks.

A ring has one table of registered buffers. The first pool registers it, empty, and each pool fills
one index of it. So pools can be opened and closed while operations are in flight.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

import trio
from trio.lowlevel import (
    ParkingLot,
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    current_trio_token,
    enable_ki_protection,
)

from trio_uring._arguments import check_int
from trio_uring._engine._io_manager import current_ring
from trio_uring._engine._registered_tables import RegisteredTable
from trio_uring._engine._run_state import RunResource
from trio_uring._kernel.uapi import RegisterOpcode
from trio_uring._lease import Lease
from trio_uring._operations._operation import address_of, pin_writable

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer, Self

    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._engine._ring import Ring
    from trio_uring._operations import Operation

    class FixedKind(Protocol):
        """`read_fixed` or `write_fixed`."""

        def __call__(
            self,
            fd: int,
            buffer: Buffer,
            offset: int,
            buf_index: int,
            /,
            *,
            cancellable: bool,
            in_worker: bool,
        ) -> Operation[int]: ...


# Each buffer begins at a multiple of this: the largest logical block that disks have.
_STRIDE: Final = 4096

# The largest buffer that the table can hold (SZ_1G in rsrc.c of the kernel).
_POOL_SIZE_MAX: Final = 1 << 30

# Registered pools of one run at the same time. Each costs the kernel 8 bytes. Later pools work
# unregistered.
_POOLS_MAX: Final = 64

# struct iovec and io_uring_rsrc_update2 of uapi.h.
_IOVEC = struct.Struct("@PN")
_UPDATE = struct.Struct("=IIQQII")


class RegisteredBuffers:
    """A pool of *count* buffers of *size* bytes each, for direct I/O; registered where possible.

    Registered memory counts against ``RLIMIT_MEMLOCK`` of unprivileged users. Where registering is
    refused (``ENOMEM``; before Linux 5.19; in a run without a ring), the buffers work too, a little
    slower: see *registered*, and ``refused`` in the run's statistics.

    Make it in the run that uses it, and close it, or use ``with``.

    Args:
      count: 1 or more.
      size: In bytes, 1 or more. Each buffer begins at a multiple of 4096. All buffers together,
        padded to that, are at most 1 GiB.

    Raises:
      ValueError: out of range.
      RuntimeError: outside a run.

    Source: io_uring_register(2), io_uring_register_buffers(3).
    """

    def __init__(self, count: int, size: int) -> None:
        check_int("count", count, 1, _POOL_SIZE_MAX // _STRIDE)
        check_int("size", size, 1, _POOL_SIZE_MAX, " bytes")
        stride = -(-size // _STRIDE) * _STRIDE
        if count * stride > _POOL_SIZE_MAX:
            raise ValueError(
                f"count times size must be at most 1 GiB, not {count} times {stride} bytes"
            )
        manager = current_ring("files")
        self.size = size
        self._memory = mmap.mmap(-1, count * stride, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._free = list(range(0, count * stride, stride))  # where each buffer begins
        self._count = count
        self._waiters = ParkingLot()
        self._token = current_trio_token()
        self._handed: deque[int] = deque()
        self._closed = False
        self._manager: UringIOManager | None = None
        self._index = -1
        if manager is not None:
            self._register(manager)

    def _register(self, manager: UringIOManager) -> None:
        try:
            self._index = _table_of(manager).register(self._memory)
            self._manager = manager
        except OSError as exc:
            manager.ring.note_refused(f"REGISTER_BUFFERS, {len(self._memory)} bytes", exc)

    @property
    def registered(self) -> bool:
        """Whether the buffers are registered with the run's ring."""
        return self._manager is not None

    @property
    def leased(self) -> int:
        """How many are lent out."""
        return self._count - len(self._free) - len(self._handed)

    def index_in(self, manager: UringIOManager) -> int:
        """Return the index in *manager*'s table of registered buffers; -1 if there is none."""
        return self._index if self._manager is manager else -1

    @enable_ki_protection
    async def lease(self) -> BufferLease:
        """Borrow a buffer; if all are lent out, wait for one, first come first served.

        Raises:
          trio.ClosedResourceError: the pool is closed, or closes while we wait.

        If cancelled, no buffer was taken.
        """
        await checkpoint_if_cancelled()
        self._check()
        if self._free:
            lease = self._lease(self._free.pop())
            await cancel_shielded_checkpoint()
            return lease
        await self._waiters.park()
        self._check()
        return self._lease(self._handed.popleft())

    def lease_nowait(self) -> BufferLease:
        """Borrow a buffer without waiting.

        Raises:
          trio.WouldBlock: all are lent out.
          trio.ClosedResourceError: the pool is closed.
        """
        self._check()
        if not self._free:
            raise trio.WouldBlock
        return self._lease(self._free.pop())

    def _lease(self, start: int) -> BufferLease:
        # Not a slice of a view that all leases share: `Lease` counts the views of this buffer.
        with memoryview(self._memory) as whole:
            return BufferLease(self, whole[start : start + self.size], start)

    def give_back(self, start: int) -> None:
        """Take a buffer back. Called by `BufferLease`."""
        if self._waiters and not self._closed:
            self._handed.append(start)
            self._waiters.unpark()
            return
        self._free.append(start)
        if self._closed and len(self._free) == self._count:
            self._unregister()

    def give_back_soon(self, start: int) -> None:
        """Take a buffer back in the next loop iteration. Called by finalizers, in any thread."""
        try:
            self._token.run_sync_soon(self.give_back, start)
        except trio.RunFinishedError:  # nobody waits for it
            self.give_back(start)

    def close(self) -> None:
        """Lend no more buffers, and unregister them once all were given back."""
        if not self._closed:
            self._closed = True
            self._waiters.unpark_all()
            # A buffer that was handed to a task which has not run since is not lent out yet.
            self._free += self._handed
            self._handed.clear()
            if len(self._free) == self._count:
                self._unregister()

    def _unregister(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            # The run may have ended, and closed its ring.
            with suppress(OSError, RuntimeError):
                _table_of(manager).unregister(self._index)

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the buffers are closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class BufferLease(Lease):
    """A buffer of `RegisteredBuffers`, yours until you `release` it; use ``with``.

    It may still contain what an earlier borrower wrote.
    """

    __slots__ = ("_key", "_operation", "_start", "pool", "users")

    def __init__(self, pool: RegisteredBuffers, memory: memoryview, start: int) -> None:
        super().__init__(memory)
        self.pool: RegisteredBuffers = pool
        self.users: int = 0  # operations in flight on it
        self._start = start
        self._key: object = None
        self._operation: Operation[int] | None = None

    def operation(
        self,
        kind: FixedKind,
        manager: UringIOManager,
        fd: int,
        offset: int,
        size: int,
        *,
        in_worker: bool,
    ) -> Operation[int] | None:
        """Return an operation of *kind* on *size* bytes of the buffer, to be performed at once.

        The caller has counted itself as one of the *users*. It reuses the last operation with
        another offset where it can: describing a new one takes longer than everything else that
        Python does for a read (benchmarks/bench_direct.py).

        Returns:
          The operation; None if the buffer is not registered with *manager*'s ring.
        """
        index = self.pool.index_in(manager)
        if index < 0:
            return None
        key = (kind, fd, index, size)
        operation = self._operation
        if self.users > 1 or operation is None or key != self._key:
            operation = kind(
                fd, self.memory[:size], offset, index, cancellable=False, in_worker=in_worker
            )
            if self.users > 1:
                return operation
            operation.pins = ()  # or they would be released after its first use
            self._key, self._operation = key, operation
        else:
            operation.begin_at(offset)
        return operation

    def _check_unused(self) -> None:
        if self.users:
            raise BufferError("an operation is using this buffer")

    def _give_back(self) -> None:
        self._operation = None
        self.pool.give_back(self._start)

    def _forgotten(self, views: int) -> None:
        pinned = self._operation is not None  # it has a slice
        self._operation = None
        if views <= pinned:
            self.pool.give_back_soon(self._start)


# ---- The ring's table ------------------------------------------------------------------------


class _BufferTable(RunResource):
    """A ring's table of registered buffers: one index for each pool."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._free = RegisteredTable(ring, RegisterOpcode.BUFFERS2, _POOLS_MAX).free

    def register(self, memory: mmap.mmap) -> int:
        if not self._free:
            raise OSError(errno.ENOSPC, f"{_POOLS_MAX} pools are registered already")
        pin = pin_writable(memory)
        self._update(self._free[-1], _IOVEC.pack(address_of(pin), len(memory)))
        return self._free.pop()

    def unregister(self, index: int) -> None:
        self._update(index, _IOVEC.pack(0, 0))
        self._free.append(index)

    def _update(self, index: int, vector: bytes) -> None:
        pin = pin_writable(bytearray(vector))
        argument = _UPDATE.pack(index, 0, address_of(pin), 0, 1, 0)
        self._ring.register(RegisterOpcode.BUFFERS_UPDATE, argument, len(argument))


def _table_of(manager: UringIOManager) -> _BufferTable:
    return manager.run_state.get(_BufferTable, manager.ring)
