"""The memory that a ring and the simulated kernel share, as the kernel sees it: queues, buffers.

Each class checks what a kernel relies on, and overwrites what belongs to the kernel.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from trio_uring._engine._buffer_pool import RECEIVE_BUFFER_SIZE
from trio_uring._kernel.uapi import CQE_BUFFER_SHIFT, CqeFlag, SqFlag

if TYPE_CHECKING:
    from collections.abc import Iterator

GARBAGE: Final = 0xA5
OFF_SQES: Final = 0x10000000
INCREMENTAL: Final = 1 << 1  # IOU_PBUF_RING_INC

_SQE: Final = struct.Struct("=BBHiQQIIQHHiQQ")
_CQE: Final = struct.Struct("=QiI")
_FREE_CQE: Final = bytes([GARBAGE]) * _CQE.size
_BUFFER: Final = struct.Struct("=QIH")
_BUFFER_SIZE: Final = 16
_TAIL: Final = 14  # of a buffer ring, in its first entry

_F_BUFFER: Final = int(CqeFlag.BUFFER)
_F_BUF_MORE: Final = int(CqeFlag.BUF_MORE)


class BrokenError(Exception):
    """What runs on the simulated kernel made an error that a kernel does not forgive."""


def check(condition: object, what: str) -> None:
    if not condition:
        raise BrokenError(what)


@dataclass(eq=False)
class Sqe:
    """An SQE, with the fields of io_uring.h."""

    opcode: int
    flags: int
    ioprio: int
    fd: int
    off: int
    addr: int
    len: int
    op_flags: int
    user_data: int
    buf_index: int
    personality: int
    splice_fd_in: int
    addr3: int
    pad: int


class Queues:
    """The SQ, the CQ, and the completions for which the CQ had no room."""

    # Indexes of words. The kernel chooses where they are, and tells.
    SQ_HEAD, SQ_TAIL, SQ_MASK, SQ_ENTRIES, SQ_FLAGS = range(5)
    CQ_HEAD, CQ_TAIL, CQ_MASK, CQ_ENTRIES, CQ_OVERFLOW, CQ_FLAGS = range(16, 22)
    CQES: Final = 128

    def __init__(self, sq_entries: int, cq_entries: int) -> None:
        self.sq_entries, self.cq_entries = sq_entries, cq_entries
        self.array = self.CQES + cq_entries * _CQE.size
        self.fd = os.memfd_create("simulated io_uring", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, OFF_SQES + sq_entries * _SQE.size)
        self._rings = mmap.mmap(self.fd, self.array + 4 * sq_entries)
        self._sqes = mmap.mmap(self.fd, sq_entries * _SQE.size, offset=OFF_SQES)
        self._words = memoryview(self._rings)[: self.CQES].cast("I")
        self._words[self.SQ_MASK] = sq_entries - 1
        self._words[self.SQ_ENTRIES] = sq_entries
        self._words[self.CQ_MASK] = cq_entries - 1
        self._words[self.CQ_ENTRIES] = cq_entries
        self.overflow: deque[tuple[int, int, int]] = deque()
        self._cq_head = 0  # as it was last seen

    def offsets(self) -> bytes:
        """Return the end of struct io_uring_params."""
        sq = (self.SQ_HEAD, self.SQ_TAIL, self.SQ_MASK, self.SQ_ENTRIES, self.SQ_FLAGS, 5)
        cq = (self.CQ_HEAD, self.CQ_TAIL, self.CQ_MASK, self.CQ_ENTRIES, self.CQ_OVERFLOW)
        return struct.pack("=6IIIQ", *(4 * word for word in sq), self.array, 0, 0) + struct.pack(
            "=5IIIIQ", *(4 * word for word in cq), self.CQES, 4 * self.CQ_FLAGS, 0, 0
        )

    def close(self) -> None:
        """Unmap. The C core has closed the fd, which belonged to it."""
        self._words.release()
        self._rings.close()
        self._sqes.close()

    def set_flag(self, flag: SqFlag, on: object) -> None:
        flags = self._words[self.SQ_FLAGS]
        self._words[self.SQ_FLAGS] = flags | flag if on else flags & ~int(flag)

    # ---- The SQ ----------------------------------------------------------------------------

    def take(self, count: int) -> Iterator[Sqe]:
        """Take at most *count* SQEs, each of which is the ring's again once it was taken."""
        words = self._words
        unsubmitted = (words[self.SQ_TAIL] - words[self.SQ_HEAD]) & 0xFFFFFFFF
        check(unsubmitted <= self.sq_entries, f"{unsubmitted} SQEs in an SQ of {self.sq_entries}")
        for _ in range(min(count, unsubmitted)):
            head = words[self.SQ_HEAD]
            place = head & (self.sq_entries - 1)
            (index,) = struct.unpack_from("=I", self._rings, self.array + 4 * place)
            check(index == place, f"the SQ array has {index} at {place}")
            sqe = Sqe(*_SQE.unpack_from(self._sqes, index * _SQE.size))
            check(sqe.personality == sqe.pad == 0, "fields that are not used must be 0")
            # Of what was taken, no copy may be needed: only the ring fills it, and only anew.
            self._sqes[index * _SQE.size : (index + 1) * _SQE.size] = bytes([GARBAGE]) * _SQE.size
            words[self.SQ_HEAD] = (head + 1) & 0xFFFFFFFF
            yield sqe

    # ---- The CQ ----------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """How many completions the ring has not fetched."""
        head, tail = self._words[self.CQ_HEAD], self._words[self.CQ_TAIL]
        ready = (tail - head) & 0xFFFFFFFF
        check(ready <= self.cq_entries, f"{ready} completions in a CQ of {self.cq_entries}")
        return ready

    @property
    def room(self) -> int:
        return 0 if self.overflow else self.cq_entries - self.ready

    def post(self, completion: tuple[int, int, int]) -> None:
        if not self.room:
            self.overflow.append(completion)
            self.set_flag(SqFlag.CQ_OVERFLOW, on=True)
            return
        tail = self._words[self.CQ_TAIL]
        place = self.CQES + (tail & (self.cq_entries - 1)) * _CQE.size
        _CQE.pack_into(self._rings, place, *completion)
        self._words[self.CQ_TAIL] = (tail + 1) & 0xFFFFFFFF

    def flush_overflow(self) -> None:
        waiting, self.overflow = self.overflow, deque()
        while waiting and self.room:
            self.post(waiting.popleft())
        self.overflow = waiting
        self.set_flag(SqFlag.CQ_OVERFLOW, on=waiting)

    def overwrite_fetched(self) -> None:
        """Overwrite the entries that the ring has given back since the last call."""
        head = self._words[self.CQ_HEAD]
        count = (head - self._cq_head) & 0xFFFFFFFF
        check(count <= self.cq_entries, "the CQ's head is beyond its tail, or went back")
        for index in range(self._cq_head, self._cq_head + count):
            place = self.CQES + (index & (self.cq_entries - 1)) * _CQE.size
            self._rings[place : place + _CQE.size] = _FREE_CQE
        self._cq_head = head


class BufferGroup:
    """A ring of provided buffers. *address* is that of its entries."""

    def __init__(self, address: int, entries: int, flags: int) -> None:
        self._address = address
        self._entries = entries
        self._incremental = bool(flags & INCREMENTAL)
        self._head = 0
        self._seen = 0  # the tail up to which entries were looked at
        self._owned: set[int] = set()
        self._known: set[int] = set()
        self._size = 0

    def _at(self, index: int) -> int:
        return self._address + _BUFFER_SIZE * (index & (self._entries - 1))

    def _entry(self, index: int) -> tuple[int, int, int]:
        return _BUFFER.unpack(ctypes.string_at(self._at(index), _BUFFER.size))

    def available(self) -> int:
        """Look at what was provided; return how many buffers there are."""
        (tail,) = struct.unpack("=H", ctypes.string_at(self._address + _TAIL, 2))
        count = (tail - self._head) & 0xFFFF
        check(count <= self._entries, f"{count} buffers in a ring of {self._entries}")
        while self._seen != tail:
            address, size, buffer_id = self._entry(self._seen)
            check(buffer_id not in self._owned, f"buffer {buffer_id} was provided twice")
            self._owned.add(buffer_id)
            self._known.add(buffer_id)
            self._size = size
            ctypes.memset(address, GARBAGE, min(size, 64))  # nobody may still read from it
            self._seen = (self._seen + 1) & 0xFFFF
        return count

    def check_all_are_here(self) -> None:
        """Fail if a buffer was not given back, except of a pool that one stream had to itself."""
        self.available()
        if self._size == RECEIVE_BUFFER_SIZE:
            check(self._owned == self._known, f"not given back: {self._known - self._owned}")

    def first(self) -> tuple[int, int]:
        """Return the address and size of what the next transfer may fill."""
        address, size, _ = self._entry(self._head)
        return address, size

    def use(self, size: int) -> int:
        """Use *size* bytes of the first buffer, and return the flags of the completion."""
        address, left, buffer_id = self._entry(self._head)
        flags = _F_BUFFER | buffer_id << CQE_BUFFER_SHIFT
        if self._incremental and size < left:
            changed = struct.pack("=QI", address + size, left - size)
            ctypes.memmove(self._at(self._head), changed, len(changed))
            return flags | _F_BUF_MORE
        self._owned.remove(buffer_id)
        self._head = (self._head + 1) & 0xFFFF
        return flags
