"""`RegisteredTable`: a ring's table of fixed files, or of registered buffers.

A ring has one table of each kind. It is registered with empty slots, which are filled and emptied
one by one while operations are in flight.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from trio_uring._kernel.uapi import RSRC_REGISTER_SPARSE

if TYPE_CHECKING:
    from trio_uring._kernel.uapi import RegisterOpcode

    from ._ring import Ring

# struct io_uring_rsrc_register of uapi.h.
_REGISTER = struct.Struct("=IIQQQ")


class RegisteredTable:
    """A table of *size* empty slots, registered with *ring*.

    Args:
      ring: A ring without such a table.
      opcode: ``FILES2`` or ``BUFFERS2``.
      size: The number of slots.

    Raises:
      OSError: ``EINVAL`` before Linux 5.19.

    Source: io_uring_register(2), ``IORING_RSRC_REGISTER_SPARSE``.
    """

    def __init__(self, ring: Ring, opcode: RegisterOpcode, size: int) -> None:
        argument = _REGISTER.pack(size, RSRC_REGISTER_SPARSE, 0, 0, 0)
        ring.register(opcode, argument, len(argument))
        self.free: list[int] = list(range(size))
