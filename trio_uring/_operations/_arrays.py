"""Many operations as one array of SQEs, and chains of them."""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import attrs

from trio_uring._kernel import CData, ffi
from trio_uring._kernel.uapi import Opcode, SqeFlag

from ._operation import IO_MAX, Operation, address_of, count as result, pin_writable, signed_64_bits

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from typing_extensions import Buffer

T_co = TypeVar("T_co", covariant=True)

_LINK: Final = int(SqeFlag.IO_LINK)
_ASYNC: Final = int(SqeFlag.ASYNC)

# struct sqe_fields of the C core: six words of 64 bits, of which these two change.
_FIELDS: Final = struct.Struct("=BBHiQQIIHxxiQ")
_WORDS: Final = _FIELDS.size // 8
_OFF, _ADDR = 1, 2


@attrs.frozen(eq=False)
class Linked(Generic[T_co]):
    """Operations that run one after the other, each only if the one before it succeeded.

    Made by `trio_uring.linked`.
    """

    operations: tuple[Operation[T_co], ...]


def linked(operations: Iterable[Operation[T_co]]) -> Linked[T_co]:
    """Chain *operations* for `trio_uring.perform_many`: each begins when the last has succeeded.

    If one fails, those behind it do nothing; their outcome is a
    `trio_uring.OperationCancelledError`. A read or write that moves fewer bytes than it was
    asked to (at the end of a file, for example) counts as failed here, although its own
    outcome is its number of bytes.

    The fds that a later operation names are looked up when it begins, not before: do not close
    them until the whole chain is done.

    Args:
      operations: At least one, and no more than the ring has entries.

    Raises:
      ValueError: *operations* is empty.
      TypeError: it contains something that is no operation, such as another chain.

    Source: io_uring_enter(2), ``IOSQE_IO_LINK``.
    """
    chain = tuple(operations)
    if not chain:
        raise ValueError("a chain needs at least one operation")
    for operation in chain:
        if not isinstance(operation, Operation):
            raise TypeError(f"a chain consists of operations, not {type(operation).__name__}")
    return Linked(chain)


@attrs.define(eq=False)
class OperationArray(Generic[T_co]):
    """Operations as the C core takes them: all SQEs in one array.

    Args:
      fields: ``struct sqe_fields[]``.
      count: How many there are.
      opcodes: How many there are of each opcode.
      limited: How many of them count against ``RingConfig.max_file_operations``.
      model: One of them, or if it was described as a whole, one like them.
      operations: What it was made of; empty if it was described as a whole.
      pins: What keeps their memory in place, apart from the pins of *operations*.
    """

    fields: CData
    count: int
    opcodes: Mapping[int, int]
    limited: int
    model: Operation[T_co]
    operations: Sequence[Operation[T_co]] = ()
    pins: tuple[CData, ...] = ()

    def release(self) -> None:
        """Let go of all pinned buffers."""
        for pin in self.pins:
            ffi.release(pin)
        self.pins = ()
        for operation in self.operations:
            operation.release()


def array_of(
    operations: Sequence[Operation[T_co]], with_next: Container[int] = ()
) -> OperationArray[T_co]:
    """Describe *operations*, at least one, as an array.

    Those at the indexes *with_next* are linked to the next.

    Raises:
      OverflowError: a number does not fit in its field.
    """
    fields = []
    for index, operation in enumerate(operations):
        sqe = operation.sqe
        if index in with_next:
            sqe = (sqe[0], sqe[1] | _LINK, *sqe[2:])
        if type(sqe[5]) is bytes:
            # Its memory stays where it is for as long as the operation exists.
            sqe = (*sqe[:5], ffi.from_buffer("char[]", sqe[5]), *sqe[6:])
        fields.append(sqe)
    return OperationArray(
        ffi.new("struct sqe_fields[]", fields),
        len(fields),
        Counter([operation.opcode for operation in operations]),
        sum([operation.limited for operation in operations]),
        operations[0],
        operations,
    )


def read_many(
    fd: int,
    buffer: Buffer,
    offsets: Sequence[int],
    size: int,
    flags: int = 0,
    *,
    in_worker: bool = False,
) -> OperationArray[int]:
    """Read from a file at each of *offsets*, *size* bytes each, into *buffer*, one after another.

    For `trio_uring.perform_many`, which gives an outcome for each. Described all at once, they
    cost a fraction of what that many `read` operations do. The first read goes to the first
    *size* bytes of *buffer*, the second to the next, and so on.

    *flags*: the ``RWF_*`` of preadv2(2). With *in_worker* kernel workers do it all.

    Completes with: the number of bytes of each, fewer than *size* at the end of the file only.
    Fails with: each as `read`. At once, ``ValueError`` if *buffer* is too small, and
      ``OverflowError`` if an offset is negative or has more than 63 bits.
    If cancelled: they still complete.
    Since: Linux 5.6. Source: io_uring_prep_read(3), preadv2(2).
    """
    starts = array("Q", offsets)
    count = len(starts)
    signed_64_bits(max(starts, default=0))
    if not 0 < size <= IO_MAX:
        raise ValueError(f"size must be between 1 and {IO_MAX}, not {size}")
    pin = pin_writable(buffer)
    if len(pin) < count * size:
        room = len(pin)
        ffi.release(pin)
        raise ValueError(f"{count} reads of {size} bytes do not fit in a buffer of {room}")
    sqe_flags = _ASYNC if in_worker else 0
    template = _FIELDS.pack(Opcode.READ, sqe_flags, 0, fd, 0, 0, size, flags, 0, 0, 0)
    words = array("Q", template * count)
    address = address_of(pin)
    words[_OFF::_WORDS] = starts
    words[_ADDR::_WORDS] = array("Q", range(address, address + count * size, size))
    fields = ffi.from_buffer("struct sqe_fields[]", words)
    model = Operation(Opcode.READ, result, fd, cancellable=False, limited=True)
    return OperationArray(fields, count, {Opcode.READ: count}, count, model, pins=(pin,))
