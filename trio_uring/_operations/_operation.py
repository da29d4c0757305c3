"""`Operation`: the description of one io_uring operation, which becomes one SQE.

An operation owns the memory that the kernel may access while it is in flight: its *pins* keep
buffers, addresses and paths in place until the last CQE. `Operation` itself knows no opcodes. The
functions in the other files of this package do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, Literal, Protocol, TypeVar

from trio_uring._arguments import (
    check_fd,
    check_index,
    check_several,
    is_buffer,
    wrong_buffer,
    wrong_target,
)
from trio_uring._kernel import NULL, CData, ffi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

T_co = TypeVar("T_co", covariant=True)
Pin = TypeVar("Pin")

# The addr of an SQE is NULL, memory that a pin holds, or an immutable bytes object, its own pin.
NO_ADDRESS: Final = NULL

# The maximum number of bytes in one read, write, send or receive (MAX_RW_COUNT, see read(2)).
IO_MAX: Final = 0x7FFFF000

Exclusive = Literal["read", "write"]


class ProvidedBuffers(Protocol):
    """A buffer group, from which the kernel chooses a buffer when it has data."""

    @property
    def group(self) -> int:
        """The number under which the group is registered."""
        ...

    def take(self, res: int, flags: int, /) -> bytes:
        """Return a copy of the data of a completion, and return its buffer to the kernel."""
        ...

    def failed(self, res: int, flags: int, /) -> None:
        """Note a failed completion, and return its buffer to the kernel, if it has one."""
        ...


# The fields of an SQE, in the order in which the C core takes them.
SQE_FIELDS: Final = (
    "opcode",
    "sqe_flags",
    "ioprio",
    "fd",
    "off",
    "addr",
    "len",
    "op_flags",
    "buf_index",
    "splice_fd_in",
    "addr3",
)
Sqe = tuple[int, int, int, int, int, "CData | bytes", int, int, int, int, int]


class Operation(Generic[T_co]):
    """One operation: the fields of its SQE, and how to decode its result.

    The functions of `trio_uring.lowlevel.operations` make operations. The arguments from *opcode*
    to *addr3* are fields of ``struct io_uring_sqe``.

    Args:
      opcode: The kind of the operation.
      decode: Called with ``res`` (0 or more) and ``flags`` of the CQE, and returns the result.
      fd: The fd on which the operation acts.
      addr: Memory that a pin holds, or an immutable bytes object, which is its own pin.
      len: Mostly a number of bytes.
      op_flags: The flags of this opcode.
      off: An offset in bytes, or another field that shares its place.
      sqe_flags: ``IOSQE_*``.
      ioprio: More flags of this opcode.
      buf_index: A registered buffer, or a buffer group.
      splice_fd_in: An fd, or another field that shares its place.
      addr3: A second address.
      pins: Objects that keep the memory of *addr*, and the memory that it points to, in place.
      cancellable: Whether cancelling asks the kernel to stop the operation. False if the operation
        ends by itself, such as a read of a regular file.
      exclusive: ``"read"`` or ``"write"`` if only one task at a time may wait in this way on *fd*.
        A second one gets `trio.BusyResourceError`.
      limited: Whether it counts against ``RingConfig.max_file_operations``.
      on_cqe_more: For multishot operations. Called with ``res`` and ``flags`` of each CQE that is
        not the last.
      discard: Called with a result that no task will receive, for example to close an fd.
      filename: For the `OSError`, as in the standard library.
      filename2: The second file of a rename or link, for the `OSError`.
      etime_is_success: Whether ``ETIME`` is a success rather than an error.
      acts_on_fd: Whether *fd* is a file descriptor, whose closing ends the operation. False if the
        field has another number.
      second_fd: Another file descriptor whose closing ends the operation.
      buffers: The buffer group from which the kernel chooses a buffer.

    An operation with pins can be performed only once: afterwards its memory may be anybody's. One
    without pins can be performed again, also by several tasks at once.
    """

    # Written without attrs, because operations are made often: attrs cannot make the one tuple that
    # the C core takes, and reading eleven attributes for each push costs as much as the push.
    __slots__ = (
        "acts_on_fd",
        "buffers",
        "cancellable",
        "decode",
        "discard",
        "etime_is_success",
        "exclusive",
        "fd",
        "filename",
        "filename2",
        "for_device",
        "limited",
        "on_cqe_more",
        "opcode",
        "pins",
        "second_fd",
        "spent",
        "sqe",
    )

    def __init__(
        self,
        opcode: int,
        decode: Callable[[int, int], T_co],
        fd: int = -1,
        addr: CData | bytes = NO_ADDRESS,
        len: int = 0,
        op_flags: int = 0,
        off: int = 0,
        sqe_flags: int = 0,
        ioprio: int = 0,
        buf_index: int = 0,
        splice_fd_in: int = 0,
        addr3: int = 0,
        *,
        pins: tuple[object, ...] = (),
        cancellable: bool = True,
        exclusive: Exclusive | None = None,
        limited: bool = False,
        on_cqe_more: Callable[[int, int], None] | None = None,
        discard: Callable[[int], object] | None = None,
        filename: str | bytes | None = None,
        filename2: str | bytes | None = None,
        etime_is_success: bool = False,
        acts_on_fd: bool = True,
        second_fd: int = -1,
        buffers: ProvidedBuffers | None = None,
    ) -> None:
        if type(fd) is not int:
            check_fd("fd", fd)
        self.sqe: Sqe = (
            opcode, sqe_flags, ioprio, fd, off, addr, len, op_flags, buf_index, splice_fd_in, addr3
        )  # fmt: skip
        self.opcode: int = opcode
        self.decode: Callable[[int, int], T_co] = decode
        self.fd: int = fd
        self.pins: tuple[object, ...] = pins
        self.spent: bool = False  # whether it has or had pins, and is or was in use
        self.cancellable: bool = cancellable
        self.exclusive: Exclusive | None = exclusive
        self.limited: bool = limited
        self.for_device: bool = False  # whether a device begins as soon as it is submitted
        self.on_cqe_more: Callable[[int, int], None] | None = on_cqe_more
        self.discard: Callable[[int], object] | None = discard
        self.filename: str | bytes | None = filename
        self.filename2: str | bytes | None = filename2
        self.etime_is_success: bool = etime_is_success
        self.acts_on_fd: bool = acts_on_fd
        self.second_fd: int = second_fd
        self.buffers: ProvidedBuffers | None = buffers

    def begin_at(self, off: int) -> None:
        """Make it begin at offset *off*, 0 or more, when it is performed again.

        Raises:
          OverflowError: *off* has more than 63 bits.
        """
        sqe = self.sqe
        self.sqe = (*sqe[:4], signed_64_bits(off), *sqe[5:])

    def use(self) -> None:
        """Note that it is about to be performed.

        Raises:
          RuntimeError: it has pins, or had some, and was performed or released already.
        """
        if self.spent:
            raise RuntimeError(
                "this operation was performed already, and its buffers may be in use elsewhere: "
                "make a new one for each time"
            )
        self.spent = bool(self.pins)

    def release(self) -> None:
        """Release the pinned buffers, so that their owner may resize or release them."""
        if self.pins:
            self.spent = True
            for pin in self.pins:
                if isinstance(pin, CData):
                    ffi.release(pin)
            self.pins = ()


def pin_readable(data: Buffer) -> CData | bytes:
    """Return *data*'s memory for the kernel to read. The result holds its export.

    Raises:
      TypeError: not a buffer.
      BufferError, ValueError: not contiguous.
    """
    return data if type(data) is bytes else pin_export("data", data)


def pin_export(name: str, data: Buffer) -> CData:
    """Return the memory of *data*, the argument *name*, for the kernel to read.

    Raises:
      TypeError: not a buffer.
      BufferError, ValueError: not contiguous.
    """
    try:
        return ffi.from_buffer("char[]", data)
    except TypeError:
        if is_buffer(data):
            raise
        raise wrong_buffer(name, data) from None


def pin_writable(buffer: Buffer) -> CData:
    """Return *buffer*'s memory for the kernel to write. The result holds its export.

    Resizing a `bytearray` raises `BufferError` while its export is held.

    Raises:
      TypeError, BufferError: not a buffer, read-only, or not contiguous.
    """
    try:
        return ffi.from_buffer("char[]", buffer, require_writable=True)
    except TypeError:
        if is_buffer(buffer):
            raise
        raise wrong_target("buffer", buffer) from None
    except BufferError:
        if is_buffer(buffer) and memoryview(buffer).readonly:
            raise BufferError(f"{wrong_target('buffer', buffer)}") from None
        raise


def pins_of(buffers: Iterable[Buffer], pin: Callable[[Buffer], Pin]) -> list[Pin]:
    """Return what *pin* returns for each of *buffers*, which must be several."""
    check_several("buffers", buffers, "buffers")
    return [pin(buffer) for buffer in buffers]


def pin_of_several(buffer: Buffer) -> CData:
    """Return the memory of one of several buffers for the kernel to read."""
    return pin_export("each of buffers", buffer)


def size_of(pin: CData | bytes) -> int:
    """Return the size of pinned memory in bytes, at most `IO_MAX`."""
    size = len(pin)
    return size if size < IO_MAX else IO_MAX  # noqa: FURB136 (min() takes twice as long)


def address_of(memory: CData) -> int:
    """Return the address of *memory*, for the SQE fields that are plain numbers."""
    return int(ffi.cast("uintptr_t", memory))


def signed_64_bits(number: int, name: str = "offset") -> int:
    """Return *number*, the argument *name*, as the value of an unsigned field of an SQE.

    Raises:
      TypeError: it is no int.
      OverflowError: it has more than 64 bits. (The kernel refuses negative numbers other than -1.)
    """
    if type(number) is not int:
        number = check_index(name, number)
    if not -1 << 63 <= number < 1 << 63:
        raise OverflowError(f"{number} does not fit in a signed 64-bit integer")
    return number & 0xFFFFFFFFFFFFFFFF


def address_of_buffer(buffer: Buffer) -> int:
    """Return the address of *buffer*, which may change while it is not pinned.

    Raises:
      TypeError, BufferError, ValueError: not a buffer, or not contiguous.
    """
    pin = ffi.from_buffer("char[]", buffer)
    address = address_of(pin)
    ffi.release(pin)
    return address


def as_address(number: int) -> CData:
    """Return *number* as an SQE's addr, for operations in which addr is a number."""
    return ffi.cast("void *", number)


def nothing(_res: int, _flags: int) -> None:
    """Decode a result without a value."""


def count(res: int, _flags: int) -> int:
    """Decode a result that is a number, mostly of bytes."""
    return res
