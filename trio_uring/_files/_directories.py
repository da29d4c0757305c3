"""Directories. The kernel has no operation that lists one, so a thread does it.

Facts. Handing a call to a thread and waiting for it takes 100 microseconds, reading one entry takes
less than one, and making one path of it takes two (Python 3.13). Trio hands over a whole
``iterdir``, makes a `pathlib.Path` of each entry there, and a `trio.Path` of each of those. AnyIO
hands over each entry.

What does this mean for us? The thread returns names, of which the `trio.Path` objects are made
directly. For AnyIO it reads ahead. The file tree can change meanwhile, so it reads ahead for a
short time only.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

# The limits of one batch. At half, a directory of 1000 entries needs twice as many hops. At double,
# a program that changes the tree while it looks through it notices more often that it read ahead.
AHEAD_MAX: Final = 256
_AHEAD_SECONDS: Final = 0.001


def iterdir(path: trio.PosixPath) -> Iterator[trio.PosixPath]:
    """Like `trio.Path.iterdir`. For a worker thread. Needs `CAN_MAKE_PATHS`."""
    directory = str(path)
    if sys.version_info >= (3, 13):
        with os.scandir(directory) as entries:  # as pathlib does, for its audit event and errors
            names = [entry.name for entry in entries]
    else:
        names = os.listdir(pathlib.PosixPath(path))  # noqa: PTH208 (it would make paths)
    if directory == ".":
        directory = ""
    elif not directory.endswith("/"):
        directory += "/"
    return map(_path, [directory + name for name in names])


def _path(string: str) -> trio.PosixPath:
    new = object.__new__(trio.PosixPath)
    new._raw_paths = [string]  # type: ignore[attr-defined]
    return new


def _attributes(path: trio.PosixPath) -> dict[str, object]:
    names = pathlib.PurePath.__slots__
    return {name: getattr(path, name) for name in names if hasattr(path, name)}


# Since Python 3.12, a new path has only the strings that it was made of. Making one takes half of
# the time of ``iterdir``, and `_path` takes a third of that. Where it is not so, our ``iterdir``
# gains nothing.
CAN_MAKE_PATHS: Final = _attributes(trio.PosixPath("a/b")) == {"_raw_paths": ["a/b"]}


def string_of(path: Any) -> str:  # noqa: ANN401 (a string or path)
    """Return ``str(path)``. For a new path, parsing its string takes longer than a status does."""
    if CAN_MAKE_PATHS and type(path) is not str:
        parts = path._raw_paths  # noqa: SLF001
        if len(parts) == 1 and type(parts[0]) is str and _is_normal(parts[0]):
            return parts[0]
    return str(path)


def _is_normal(string: str) -> bool:
    """Whether parsing the string of a path certainly changes nothing."""
    return (
        string != ""
        and string[-1] not in "/."
        and string[:2] != "./"
        and "//" not in string
        and "/./" not in string
    )


class ReadAhead(Generic[T]):
    """An iterator whose `read` gets several items at once, in a worker thread.

    It yields what *iterator* yields, and raises what it raises, after the same items.

    Args:
      iterator: Where the items come from.
    """

    def __init__(self, iterator: Iterator[T]) -> None:
        self._iterator = iterator
        self._items: deque[T] = deque()
        self._failure: BaseException | None = None
        self._ended = False

    @property
    def is_ready(self) -> bool:
        """Whether the next item, error or end is known, so that ``next`` does not wait."""
        return bool(self._items) or self._failure is not None or self._ended

    def read(self) -> None:
        """Read items until one of the limits is reached."""
        end = time.monotonic() + _AHEAD_SECONDS
        try:
            while True:
                self._items.append(next(self._iterator))
                if len(self._items) >= AHEAD_MAX or time.monotonic() > end:
                    break
        except StopIteration:
            self._ended = True
        except BaseException as exc:  # noqa: BLE001 (raised when its turn comes)
            self._failure = exc

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._items:
            return self._items.popleft()
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # or there would be a reference cycle
        return next(self._iterator)
