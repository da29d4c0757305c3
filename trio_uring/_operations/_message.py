"""``struct msghdr`` and ancillary data, for sendmsg and recvmsg."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Generic, TypeVar

import attrs

from trio_uring._kernel import CData, ffi
from trio_uring._kernel.sockets import SCM_RIGHTS, SOL_SOCKET

from ._operation import NO_ADDRESS, pin_of_several, pins_of
from ._sockaddr import SOCKADDR_SIZE, Address, decode_sockaddr

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

T = TypeVar("T")

Ancillary = list[tuple[int, int, bytes]]

# struct cmsghdr; the data follows it, and the next header is aligned to size_t.
_HEADER = struct.Struct("@Nii")
_ALIGN = struct.calcsize("@N")
_FD = struct.Struct("@i")


@attrs.frozen
class Message(Generic[T]):
    """A message that recvmsg received.

    Args:
      data: The bytes, or their number if the caller supplied the buffers.
      ancillary: ``(level, type, data)`` for each control message.
      flags: ``msg_flags``, for example `socket.MSG_TRUNC`.
      address: The address of the sender; None for a connected stream.
    """

    data: T
    ancillary: Ancillary
    flags: int
    address: Address


class MessageHeader:
    """A ``struct msghdr`` and the memory it points to, kept in place by ``pins``."""

    def __init__(self, vectors: Sequence[tuple[CData, int]], name: CData, name_len: int) -> None:
        iov = ffi.new("struct iovec[]", len(vectors))
        for index, (base, size) in enumerate(vectors):
            iov[index].iov_base = base
            iov[index].iov_len = size
        self.header = ffi.new("struct msghdr *")
        self.header.msg_iov = iov
        self.header.msg_iovlen = len(vectors)
        self.header.msg_name = name
        self.header.msg_namelen = name_len
        self._name = name
        self._control = NO_ADDRESS
        self.pins: list[object] = [self.header, iov]

    def set_control(self, control: CData, size: int) -> None:
        """Use *control*, of *size* bytes, for ancillary data."""
        self._control = control
        self.header.msg_control = control
        self.header.msg_controllen = size
        self.pins.append(control)

    def received(self, data: T) -> Message[T]:
        """Return the message with *data* and what the kernel wrote into the header."""
        header = self.header
        # msg_namelen is the full length of the address, even if the kernel truncated it.
        name_len = min(header.msg_namelen, SOCKADDR_SIZE)
        name = ffi.buffer(self._name, name_len)[:]
        return Message(data, self._ancillary(), header.msg_flags, decode_sockaddr(name))

    def _ancillary(self) -> Ancillary:
        size = self.header.msg_controllen
        return decode_ancillary(ffi.buffer(self._control, size)[:]) if size else []

    def discard(self, _res: int) -> None:
        """Close the fds of a message that no task receives."""
        for level, kind, data in self._ancillary():
            if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
                for (fd,) in _FD.iter_unpack(data[: len(data) // _FD.size * _FD.size]):
                    os.close(fd)


def header_to_receive(vectors: Sequence[tuple[CData, int]], ancillary_size: int) -> MessageHeader:
    """Return a header for recvmsg into *vectors*, with room for address and ancillary data."""
    name = ffi.new("char[]", SOCKADDR_SIZE)
    message = MessageHeader(vectors, name, SOCKADDR_SIZE)
    message.pins.append(name)
    if ancillary_size:
        message.set_control(ffi.new("char[]", ancillary_size), ancillary_size)
    return message


def header_to_send(
    buffers: Iterable[Buffer], ancillary: Iterable[tuple[int, int, Buffer]], address: bytes
) -> MessageHeader:
    """Return a header for sendmsg of *buffers*, to *address* unless that is empty.

    Raises:
      TypeError, ValueError, BufferError: the kernel or the standard library refuses an argument.
    """
    pins = pins_of(buffers, pin_of_several)
    name = ffi.new("char[]", address) if address else NO_ADDRESS
    message = MessageHeader([(pin, len(pin)) for pin in pins], name, len(address))
    message.pins.extend(pins)
    if address:
        message.pins.append(name)
    control = b"".join(_encode_ancillary(*item) for item in ancillary)
    if control:
        message.set_control(ffi.new("char[]", control), len(control))
    return message


def _encode_ancillary(level: int, kind: int, data: Buffer) -> bytes:
    view = memoryview(data)
    if not view.c_contiguous:
        raise BufferError("ancillary data is not C-contiguous")
    content = bytes(view)
    padding = b"\0" * (-len(content) % _ALIGN)
    try:
        header = _HEADER.pack(_HEADER.size + len(content), level, kind)
    except struct.error as exc:
        raise ValueError(f"bad level or type of ancillary data: {exc}") from None
    return header + content + padding


def decode_ancillary(control: bytes) -> Ancillary:
    """Return each control message of *control* as ``(level, type, data)``."""
    items: Ancillary = []
    offset = 0
    while offset + _HEADER.size <= len(control):
        size, level, kind = _HEADER.unpack_from(control, offset)
        if size < _HEADER.size:
            break
        items.append((level, kind, control[offset + _HEADER.size : offset + size]))
        offset += (size + _ALIGN - 1) & -_ALIGN
    return items
