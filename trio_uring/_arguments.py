"""Checks of arguments. Each error is one sentence that names the argument, and says what to write.

Where every call counts, the caller first checks what is usual itself, such as ``type(fd) is int``.
"""

from __future__ import annotations

import io
import operator
import os
from typing import TYPE_CHECKING, Final, SupportsIndex, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_BUFFERS: Final = (bytes, bytearray, memoryview)


def wrong_type(name: str, value: object, expected: str) -> TypeError:
    """Return the error for an argument *name* that is not what is *expected*."""
    if isinstance(value, type):
        return TypeError(f"{name} must be {expected}, not the class {value.__name__}")
    return TypeError(f"{name} must be {expected}, not {type(value).__name__}")


def check_type(name: str, value: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raise `TypeError` if *value* is of none of *types*. A bool is no number."""
    if not isinstance(value, types) or (type(value) is bool and types is not bool):
        raise wrong_type(name, value, expected)


def check_int(name: str, value: int, low: int, high: int, unit: str = "") -> None:
    """Raise if *value* is no int, or not between *low* and *high*."""
    check_type(name, value, int, "an int")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}{unit}, not {value}")


def check_count(name: str, value: SupportsIndex) -> None:
    """Raise if *value* is no int, or negative."""
    if check_index(name, value) < 0:
        raise ValueError(f"{name} must be 0 or more, not {value}")


def check_index(name: str, value: SupportsIndex) -> int:
    """Return *value* as an int, which it must be, or something like it, such as NumPy's."""
    try:
        return operator.index(value)
    except TypeError:
        raise wrong_type(name, value, "an int") from None


def check_path(name: str, path: Path) -> str | bytes:
    """Return *path* as `os.fspath` does."""
    try:
        return os.fspath(path)
    except TypeError:
        raise wrong_type(name, path, "a path: a str, bytes or pathlib.Path") from None


def fd_of(name: str, file: object) -> int:
    """Return the fd of *file*, which is an fd or has a ``fileno`` method."""
    if isinstance(file, int):
        return file
    if isinstance(file, str | bytes | os.PathLike):
        raise TypeError(f"{name} must be an open file, not the path {file!r}: open it first")
    try:
        fd: object = file.fileno()  # type: ignore[attr-defined]
    except (AttributeError, io.UnsupportedOperation):
        raise wrong_type(name, file, "an open file with an fd, or its fd") from None
    except ValueError:  # I/O operation on closed file
        raise ValueError(f"{name} must be an open file, and this one is closed") from None
    check_fd(name, fd)
    assert isinstance(fd, int)
    return fd


def check_fd(name: str, fd: object) -> None:
    """Raise `TypeError` if *fd* is no file descriptor."""
    if not isinstance(fd, int):
        raise wrong_type(name, fd, "a file descriptor: an int, as fileno() returns")


# ---- Buffers -------------------------------------------------------------------------------


def wrong_buffer(name: str, value: object) -> TypeError:
    """Return the error for an argument that should be a buffer to read from."""
    if isinstance(value, str):
        return TypeError(f"{name} must be bytes or another buffer, not str: encode the text first")
    return wrong_type(name, value, "bytes or another buffer")


def wrong_target(name: str, value: object) -> TypeError:
    """Return the error for an argument that should be a buffer to write to."""
    if isinstance(value, int):
        return TypeError(f"{name} must be a writable buffer, not a size: pass bytearray({value})")
    return wrong_type(name, value, "a writable buffer, such as a bytearray")


def is_buffer(value: object) -> bool:
    """Return whether *value* is a buffer, contiguous or not."""
    try:
        memoryview(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def check_readable(name: str, buffer: Buffer) -> None:
    """Raise if *buffer* is no contiguous buffer."""
    if type(buffer) not in _BUFFERS and not is_buffer(buffer):
        raise wrong_buffer(name, buffer)


def check_writable(name: str, buffer: Buffer) -> None:
    """Raise if *buffer* is no buffer that can be written to."""
    if type(buffer) is bytearray:
        return
    if not is_buffer(buffer) or memoryview(buffer).readonly:
        raise wrong_target(name, buffer)


def check_several(name: str, values: object, of: str) -> None:
    """Raise if *values* is a single buffer, and not several of them."""
    if isinstance(values, _BUFFERS) or not hasattr(type(values), "__iter__"):
        raise wrong_type(name, values, f"a list of {of}")
