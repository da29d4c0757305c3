"""What a call on a pipe, socket or terminal must find in memory, so that it does not block."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# The size of a read, in bytes, if the call does not say how much it needs: that of CPython's
# buffered files, so that no more is taken from a pipe that is shared with other processes.
READ_SIZE: Final = 8192
_READ_MAX: Final = 65536

_EVERYTHING: Final = 1 << 63


class Need:
    """How many bytes a call needs, or what they must end with.

    Args:
      size: In bytes, at most.
      is_line: Whether the end of a line is enough.
      is_once: Whether one read is enough, whatever it gets.
    """

    __slots__ = ("is_line", "is_once", "size")

    def __init__(self, size: int, *, is_line: bool = False, is_once: bool = False) -> None:
        self.size = size
        self.is_line = is_line
        self.is_once = is_once

    def end(self, ahead: bytearray, start: int, *, ended: bool) -> int | None:
        """Return how many bytes of *ahead* the call gets; None if it must wait for more.

        Args:
          ahead: The bytes that have arrived.
          start: Where to begin to look for the end of a line.
          ended: Whether nothing follows them.
        """
        if self.is_line:
            found = ahead.find(b"\n", start) + 1
            if found:
                return min(found, self.size)
        if ended or len(ahead) >= self.size or (self.is_once and ahead):
            return min(len(ahead), self.size)
        return None

    def next_read(self, count: int) -> int:
        """Return how much to read next, in bytes, if *count* bytes have arrived."""
        if self.is_line or (self.is_once and self.size == _EVERYTHING):
            return READ_SIZE
        if self.is_once:  # not more, as the file may be unbuffered
            return min(self.size, _READ_MAX)
        return min(max(self.size - count, READ_SIZE), _READ_MAX)


def need_of(kind: type, name: str, args: tuple[Any, ...]) -> Need | None:
    """Return what the method *name* of a file of class *kind* needs; None if that is not known."""
    row = _NEEDS.get((kind, name))
    return None if row is None or len(args) > 1 else row(*args)


def _size_of(size: object) -> int | None:
    """Return a method's argument *size* as a number; None if it is none of the usual."""
    if size is None or size == -1:
        return _EVERYTHING
    return size if type(size) is int and size >= 0 else None


def _count(size: object = -1) -> Need | None:
    number = _size_of(size)
    return None if number is None else Need(number)


def _once(size: object = -1) -> Need | None:
    number = _size_of(size)
    return None if number is None else Need(number, is_once=True)


def _raw(size: object = -1) -> Need | None:
    return _count() if size is None or size == -1 else _once(size)


def _line(size: object = -1) -> Need | None:
    number = _size_of(size)
    return None if number is None else Need(number, is_line=True)


def _all(size: object = -1) -> Need | None:
    return Need(_EVERYTHING) if size is None or size == -1 else None


def _text_line(size: object = -1) -> Need | None:
    return Need(_EVERYTHING, is_line=True) if size == -1 else None


def _peek(_size: object = 0) -> Need | None:
    return Need(_EVERYTHING, is_once=True)


def _into(buffer: object = None) -> Need | None:
    return Need(memoryview(buffer).nbytes) if type(buffer) in _BUFFERS else None  # type: ignore[arg-type]


def _into_once(buffer: object = None) -> Need | None:
    need = _into(buffer)
    return None if need is None else Need(need.size, is_once=True)


_BUFFERS: Final = frozenset((bytearray, memoryview))

_NEEDS: Final[dict[tuple[type, str], Callable[..., Need | None]]] = {
    (io.TextIOWrapper, "read"): _all,
    (io.TextIOWrapper, "readline"): _text_line,
    (io.TextIOWrapper, "readlines"): _all,
    (io.BufferedReader, "peek"): _peek,
    (io.BufferedReader, "read"): _count,
    (io.BufferedReader, "read1"): _once,
    (io.BufferedReader, "readinto"): _into,
    (io.BufferedReader, "readinto1"): _into_once,
    (io.BufferedReader, "readline"): _line,
    (io.BufferedReader, "readlines"): _all,
    (io.FileIO, "read"): _raw,
    (io.FileIO, "readall"): _all,
    (io.FileIO, "readinto"): _into_once,
    (io.FileIO, "readlines"): _all,
}
