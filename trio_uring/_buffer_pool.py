"""`BufferPool`: buffers that the kernel chooses from when data is there.

A receive that waits with a buffer of its own pins that buffer for as long as the peer is
silent: 5,000 idle connections with 64 KiB each hold 313 MiB. Here the waiting receives share
one group of buffers, and the kernel takes one at the moment it has data. The bytes are copied
out and the buffer is given back in the same turn of the loop, so a small pool serves any
number of connections. The copy costs nothing extra: `bytes` are made by copying anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from trio.lowlevel import enable_ki_protection

from ._errors import ring_error
from ._kernel import ffi, lib
from ._kernel.uapi import CQE_BUFFER_SHIFT, CqeFlag

if TYPE_CHECKING:
    from ._ring import Ring

_F_BUFFER: Final = int(CqeFlag.BUFFER)

# The buffers that sockets and pipes receive into. 64 KiB is what Trio's streams ask for.
RECEIVE_BUFFER_SIZE: Final = 65536
_RECEIVE_GROUP: Final = 0


class BufferPool:
    """A buffer ring of *count* buffers of *size* bytes, registered as *group*.

    Raises:
      OSError: the kernel refused; ``EINVAL`` before Linux 5.19.

    Source: io_uring_register(2), io_uring_setup_buf_ring(3).
    """

    def __init__(self, ring: Ring, *, group: int, count: int, size: int) -> None:
        self._ring = ring  # the C side reaches into it
        self.group = group
        self.size = size
        self._pool = ring.open_buffer_ring(group, count, size)
        # Slicing this is the copy into a bytes object.
        self._memory = ffi.buffer(lib.buffer_ring_buffers(self._pool), count * size)

    def take(self, res: int, flags: int) -> bytes:
        """Copy out the *res* bytes of a completion with *flags*, and give its buffer back."""
        if not flags & _F_BUFFER:
            assert res == 0, res  # the end of a stream may come without a buffer
            return b""
        buffer_id = flags >> CQE_BUFFER_SHIFT
        start = buffer_id * self.size
        data = self._memory[start : start + res]
        lib.buffer_ring_add(self._pool, buffer_id)
        return data

    def give_back(self, flags: int) -> None:
        """Give back the buffer, if there is one, of a completion with *flags* that failed."""
        if flags & _F_BUFFER:
            lib.buffer_ring_add(self._pool, flags >> CQE_BUFFER_SHIFT)

    def close(self) -> None:
        """Unregister and free. No operation that selects from it may be in flight."""
        result = lib.buffer_ring_close(self._pool)
        if result < 0:
            raise ring_error(result)
        del self._pool, self._memory  # both are freed


class ReceiveBuffers:
    """The *count* buffers that the sockets and pipes of a run share: a pool, if there can be one.

    It is made when the first of them receives.
    """

    def __init__(self, ring: Ring, count: int) -> None:
        self._ring = ring
        self._count = count
        self.pool: BufferPool | None = None
        self.refused: str = ""

    @enable_ki_protection
    def open(self) -> BufferPool | None:
        """Make the pool; None where the kernel refuses it, now or before."""
        if not self.refused:
            try:
                self.pool = BufferPool(
                    self._ring, group=_RECEIVE_GROUP, count=self._count, size=RECEIVE_BUFFER_SIZE
                )
            except OSError as exc:  # EINVAL before Linux 5.19; ENOMEM
                self.refused = f"PBUF_RING: {exc}"
        return self.pool

    def close(self) -> None:
        """Free the pool. No operation that selects from it may be in flight."""
        if self.pool is not None:
            self.pool.close()
