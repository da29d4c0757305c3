"""Linked chains of operations, and arrays of SQEs for many operations."""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import attrs

from trio_uring._arguments import check_several, wrong_type
from trio_uring._kernel import CData, ffi
from trio_uring._kernel.uapi import Opcode, SqeFlag

from ._operation import IO_MAX, Operation, address_of, count as result, pin_writable, signed_64_bits

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from typing_extensions import Buffer

T_co = TypeVar("T_co", covariant=True)

_LINK: Final = int(SqeFlag.IO_LINK)
_ASYNC: Final = int(SqeFlag.ASYNC)

# struct sqe_fields of the C core: six words of 64 bits. read_many changes the two below.
_FIELDS: Final = struct.Struct("=BBHiQQIIHxxiQ")
_WORDS: Final = _FIELDS.size // 8
_OFF, _ADDR = 1, 2


@attrs.frozen(eq=False)
class Linked(Generic[T_co]):
    """A linked chain of operations, made by `trio_uring.linked`.

    They run in order, each only if the one before it succeeded.
    """

    operations: tuple[Operation[T_co], ...]


def linked(operations: Iterable[Operation[T_co]]) -> Linked[T_co]:
    """Link *operations* to a chain for `trio_uring.perform_many`, which performs them in order.

    Each begins when the one before it has succeeded. If one fails, those behind it do nothing, and
    their outcome is a `trio_uring.OperationCancelledError`. A read or write of fewer bytes than
    requested, for example at the end of a file, also ends the chain. Its own outcome is the number
    of bytes.

    The kernel looks up the fd of an operation when the operation begins. So do not close any of the
    fds until the whole chain has completed.

    Args:
      operations: At least one, and no more than ``RingConfig.entries``.

    Raises:
      ValueError: *operations* is empty.
      TypeError: it contains something that is not an operation, such as another chain.

    Source: io_uring_enter(2), ``IOSQE_IO_LINK``.
    """
    if not hasattr(type(operations), "__iter__"):
        raise wrong_type("operations", operations, "a list of operations")
    chain = tuple(operations)
    if not chain:
        raise ValueError("operations must have at least one operation, and is empty")
    for operation in chain:
        if not isinstance(operation, Operation):
            raise wrong_type("each of operations", operation, "an operation, such as nop()")
    return Linked(chain)


@attrs.define(eq=False)
class OperationArray(Generic[T_co]):
    """Operations in the form that the C core takes: an array with the fields of all SQEs.

    Args:
      fields: ``struct sqe_fields[]``.
      count: The number of operations.
      opcodes: The number of operations by opcode.
      limited: How many of them count against ``RingConfig.max_file_operations``.
      model: One of *operations*, or if the array was made by `read_many`, one that is like them.
      operations: The operations of which the array was made; empty if `read_many` made it.
      pins: What keeps their memory in place, apart from the pins of *operations*.
      spent: As in `trio_uring.lowlevel.Operation`.
    """

    fields: CData
    count: int
    opcodes: Mapping[int, int]
    limited: int
    model: Operation[T_co]
    operations: Sequence[Operation[T_co]] = ()
    pins: tuple[CData, ...] = ()
    spent: bool = False

    def use(self) -> None:
        """Note that it is about to be performed.

        Raises:
          RuntimeError: it was performed already.
        """
        if self.spent:
            raise RuntimeError(
                "these reads were performed already, and their buffer may be in use elsewhere: "
                "call read_many for each time"
            )
        self.spent = True

    def release(self) -> None:
        """Release all pinned buffers."""
        for pin in self.pins:
            ffi.release(pin)
        self.pins = ()
        for operation in self.operations:
            operation.release()


def array_of(
    operations: Sequence[Operation[T_co]], with_next: Container[int] = ()
) -> OperationArray[T_co]:
    """Make an array of *operations*, at least one.

    The operations at the indexes *with_next* are linked to the next one.

    Raises:
      OverflowError: a number does not fit in its field.
    """
    fields = []
    for index, operation in enumerate(operations):
        sqe = operation.sqe
        if index in with_next:
            sqe = (sqe[0], sqe[1] | _LINK, *sqe[2:])
        if type(sqe[5]) is bytes:
            # The memory of a bytes object does not move while the operation holds it.
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
    """Read *size* bytes from a file at each of *offsets*, into consecutive parts of *buffer*.

    For `trio_uring.perform_many`, which returns an outcome for each read. Making all reads at once
    costs a fraction of making as many `read` operations. The first read goes to the first *size*
    bytes of *buffer*, the second to the next *size* bytes, and so on.

    *flags*: the ``RWF_*`` of preadv2(2). With *in_worker*, kernel workers perform the reads.

    Completes with: for each read, the number of bytes: fewer than *size* only at the end of the
      file.
    Fails with: for each read, as `read`. This function itself raises ``ValueError`` if *buffer* is
      too small, and ``OverflowError`` if an offset is negative or has more than 63 bits.
    If cancelled: the reads still complete.
    Since: Linux 5.6. Source: io_uring_prep_read(3), preadv2(2).
    """
    check_several("offsets", offsets, "ints")
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
