"""`BufferPool`: provided buffers, from which the kernel picks one when it has data.

A receive with a buffer of its own pins that buffer while it waits: 5,000 idle connections with
64 KiB each pin 313 MiB. Receives with provided buffers share one buffer group, and the kernel
picks a buffer at the moment it has data. The bytes are copied and the buffer is returned in the
same loop iteration, so a small pool serves any number of connections. The copy is not an extra
cost: `bytes` are created by copying anyway.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from trio.lowlevel import enable_ki_protection

from trio_uring._errors import ring_error
from trio_uring._kernel import ffi, lib
from trio_uring._kernel.uapi import CQE_BUFFER_SHIFT, CqeFlag
from trio_uring._operations import recv_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_uring._operations import Operation

    from ._ring import Ring

_F_BUFFER: Final = int(CqeFlag.BUFFER)
_F_MORE: Final = int(CqeFlag.MORE)
_MAP_NORESERVE: Final = 0x4000  # from asm-generic/mman.h; in Python since 3.13
_GROUPS_MAX: Final = 1 << 16  # an SQE has 16 bits for the group

# Memory of groups that could not be unregistered. The kernel may still write to it, so it is
# never freed.
_leaked: Final[list[mmap.mmap]] = []

# The buffers that sockets and pipes receive into. 64 KiB is what Trio's streams ask for.
RECEIVE_BUFFER_SIZE: Final = 65536
_FIRST: Final = 8
# Incremental buffers are filled completely by messages of any size. 2 MiB fit into the processor's
# cache.
_FIRST_INCREMENTAL: Final = 32


class BufferPool:
    """A buffer ring of *count* buffers of *size* bytes, registered as *group*.

    The kernel uses the buffers in turn. With many buffers, each has left the processor's cache when
    it is used again, and receiving a stream takes a third longer. So at first the kernel gets only
    *first* buffers (all, if None). Each time that it finds none, it gets one more.

    In an *incremental* pool, a receive takes only the part of a buffer that it fills, and the next
    receive takes the part behind it. Only the native engine tracks these parts, so `take` and
    `view` must not be used with such a pool.

    Raises:
      OSError: the kernel refused; ``EINVAL`` before Linux 5.19, or 6.12 for an incremental pool.

    Source: io_uring_register(2), io_uring_setup_buf_ring(3).
    """

    def __init__(
        self,
        ring: Ring,
        *,
        group: int,
        count: int,
        size: int,
        first: int | None = None,
        incremental: bool = False,
    ) -> None:
        self.group = group
        self.count = count
        self.incremental = incremental
        self.ran_out: int = 0  # how often the kernel found no free buffer
        self._unused = deque(range(count))
        self.size = size
        # Pages that were never used cost no memory. A memoryview of it keeps the mapping open.
        flags = mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, count * size, flags)
        self._ring = ring  # the C structure points to the ring's
        self._pool = ring.open_buffer_ring(
            group,
            count,
            size,
            ffi.from_buffer("char[]", self._memory),
            incremental=incremental,
        )
        self._view = memoryview(self._memory).toreadonly()
        for _ in range(count if first is None else min(first, count)):
            lib.buffer_ring_add(self._pool, self._unused.popleft())

    def addresses(self) -> tuple[int, object, int]:
        """Return the C structure's address, the owner of the buffers, and their address."""
        memory = ffi.from_buffer("char[]", self._memory)
        structure, start = (int(ffi.cast("uintptr_t", it)) for it in (self._pool, memory))
        return structure, (self._memory, memory), start

    def take(self, res: int, flags: int) -> bytes:
        """Copy the *res* bytes of a completion with *flags*, and give its buffer back."""
        if not flags & _F_BUFFER:
            assert res == 0, res  # the end of a stream may have no buffer
            return b""
        buffer_id = flags >> CQE_BUFFER_SHIFT
        start = buffer_id * self.size
        data = self._memory[start : start + res]
        lib.buffer_ring_add(self._pool, buffer_id)
        return data

    def view(self, res: int, flags: int) -> memoryview:
        """Return the *res* bytes of a completion with *flags* without a copy.

        The view is valid until `give_back`.
        """
        start = (flags >> CQE_BUFFER_SHIFT) * self.size
        return self._view[start : start + res]

    def failed(self, res: int, flags: int) -> None:
        """Process a failed completion: return its buffer; if the kernel found none, add one."""
        self.give_back(flags)
        if -res == errno.ENOBUFS:
            self.ran_out += 1
            if self._unused:
                lib.buffer_ring_add(self._pool, self._unused.popleft())

    def give_back(self, flags: int) -> None:
        """Return the buffer of a completion with *flags* to the kernel, if it has one."""
        if flags & _F_BUFFER:
            lib.buffer_ring_add(self._pool, flags >> CQE_BUFFER_SHIFT)

    def close(self) -> None:
        """Unregister the buffers. No operation that selects from them may be in flight.

        The memory is freed when no memoryview uses it any more.
        """
        result = lib.buffer_ring_close(self._pool)
        if result < 0:
            _leaked.append(self._memory)
            raise ring_error(result)
        del self._pool, self._memory, self._view


class BufferPools:
    """The pools of a ring, one of which all sockets and pipes of the run share.

    The shared pool has *receive_count* buffers. It is opened when a socket or pipe first receives.
    """

    def __init__(self, ring: Ring, receive_count: int) -> None:
        self._ring = ring
        self._receive_count = receive_count
        self._open: dict[int, BufferPool] = {}
        self._free_groups: list[int] = []
        self._closed_ran_out = 0
        self.receive: BufferPool | None = None
        self.refused: str = ""  # why there is no shared pool
        self._for_streams: BufferPool | None = None
        self._for_native: BufferPool | None = None
        self._streams_refused = False

    @enable_ki_protection
    def open_receive(self) -> BufferPool | None:
        """Open and return the shared pool; None if the kernel refuses or has refused it."""
        if not self.refused:
            try:
                self.receive = self.open(self._receive_count, RECEIVE_BUFFER_SIZE, _FIRST)
            except OSError as exc:  # EINVAL before Linux 5.19; ENOMEM
                self.refused = f"PBUF_RING: {exc}"
        return self.receive

    def for_streams(
        self, perform_now: Callable[[Operation[bytes]], tuple[int, int]]
    ) -> BufferPool | None:
        """Return the shared pool, if `recv_once` works with it; otherwise None.

        *perform_now* performs an operation that does not block, and returns ``res`` and ``flags``.
        """
        global _recv_once_works
        if self._for_streams is None and not self._streams_refused:
            pool = self.receive or self.open_receive()
            error = None if _recv_once_works or pool is None else _try_recv_once(pool, perform_now)
            if pool is None or error is not None:
                self._streams_refused = True
            else:
                _recv_once_works = True
                self._for_streams = pool
            if error is not None:
                self._ring.note_refused("RECV with a limit", error)
        return self._for_streams

    @enable_ki_protection
    def for_native_engine(self, shared: BufferPool) -> BufferPool:
        """Return the pool that the native engine receives into.

        That is an incremental pool, in which one buffer holds hundreds of small messages. Before
        Linux 6.12, which has no such pools, it is *shared*.
        """
        if self._for_native is None:
            try:
                self._for_native = self.open(
                    self._receive_count, RECEIVE_BUFFER_SIZE, _FIRST_INCREMENTAL, incremental=True
                )
            except OSError as exc:
                self._ring.note_refused("PBUF_RING, incremental", exc)
                self._for_native = shared
        return self._for_native

    def failed(self, res: int, flags: int) -> None:
        """Process a failed receive of the native engine; see `BufferPool.failed`."""
        if self._for_native is not None:
            self._for_native.failed(res, flags)

    def open(
        self, count: int, size: int, first: int | None = None, *, incremental: bool = False
    ) -> BufferPool:
        """Open a pool. It must be closed with `close` or `close_all`.

        Raises:
          OSError: as `BufferPool`; ``ENOSPC`` if there are 65536 already.
        """
        if len(self._open) == _GROUPS_MAX:
            raise OSError(errno.ENOSPC, "all buffer groups are in use")
        group = self._free_groups.pop() if self._free_groups else len(self._open)
        try:
            self._open[group] = pool = BufferPool(
                self._ring,
                group=group,
                count=count,
                size=size,
                first=first,
                incremental=incremental,
            )
        except BaseException:
            self._free_groups.append(group)
            raise
        return pool

    def ran_out(self) -> int:
        """Return how often the kernel found no free buffer."""
        return self._closed_ran_out + sum(pool.ran_out for pool in tuple(self._open.values()))

    def close(self, pool: BufferPool) -> None:
        """Close *pool*; see `BufferPool.close`."""
        try:
            pool.close()
        except OSError:
            # The kernel refuses (a seccomp filter was installed). The pool stays registered until
            # the ring is closed, and its group number stays in use.
            return
        self._closed_ran_out += pool.ran_out
        del self._open[pool.group]
        self._free_groups.append(pool.group)

    def close_all(self) -> None:
        """Close all open pools."""
        for pool in list(self._open.values()):
            self.close(pool)


_recv_once_works = False  # tested once per process


def _try_recv_once(
    pool: BufferPool, perform_now: Callable[[Operation[bytes]], tuple[int, int]]
) -> OSError | None:
    """Test `recv_once` on a socket pair; return its error: ``EINVAL`` before Linux 6.17."""
    left, right = socket.socketpair()
    with left, right:
        right.send(b"xx")
        res, flags = perform_now(recv_once(left.fileno(), pool, 2))
        if res < 0:
            pool.failed(res, flags)
            return OSError(-res, os.strerror(-res))
        if pool.take(res, flags) != b"xx" or flags & _F_MORE:
            return OSError(errno.EINVAL, "the limit is not kept")
    return None
