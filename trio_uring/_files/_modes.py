"""The modes in which the package's own functions open files: those of `open`, without text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_W: Final = os.O_CREAT | os.O_TRUNC
_X: Final = os.O_CREAT | os.O_EXCL
_A: Final = os.O_CREAT | os.O_APPEND

# The flags of open(2) for each mode, as in `io.FileIO`.
MODES: Final[Mapping[str, int]] = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY | _W,
    "w+": os.O_RDWR | _W,
    "x": os.O_WRONLY | _X,
    "x+": os.O_RDWR | _X,
    "a": os.O_WRONLY | _A,
    "a+": os.O_RDWR | _A,
}
# Those that only write, to a file that is created or replaced.
WRITE_MODES: Final[Mapping[str, int]] = {mode: MODES[mode] for mode in ("w", "x")}

_O_ACCMODE: Final = os.O_RDONLY | os.O_WRONLY | os.O_RDWR
_O_CLOEXEC: Final = getattr(os, "O_CLOEXEC", 0)


def flags_of(mode: str, flags: int, modes: Mapping[str, int] = MODES) -> int:
    """Return the flags of open(2) for *mode* and the caller's additional *flags*.

    Raises:
      TypeError: *mode* is not a string.
      ValueError: *mode* is none of *modes*, or *flags* contradict it.
    """
    if not isinstance(mode, str):
        raise TypeError(
            f"mode must be a string such as 'r', as for open, not {mode!r}: "
            "pass the flags of os.open as flags="
        )
    found = modes.get(mode.replace("b", "", 1))
    if found is None:
        names = ", ".join(map(repr, modes))
        raise ValueError(f"mode must be one of {names}, not {mode!r}: files are always binary here")
    if flags & _O_ACCMODE:
        raise ValueError(
            "flags must not include os.O_WRONLY or os.O_RDWR: "
            "use mode to say whether to read or write"
        )
    return found | flags | _O_CLOEXEC
