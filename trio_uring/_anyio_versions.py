"""Which releases of AnyIO `trio_uring.anyio_backend` was written for."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

# Newer releases of the same major version are tried, and their signatures looked at.
OLDEST_ANYIO: Final = (4, 10)
TOO_NEW_ANYIO: Final = (5, 0)


def why_incompatible() -> str:
    """Return what is wrong with the installed AnyIO, in a sentence; empty if nothing is."""
    try:
        installed = version("anyio")
    except PackageNotFoundError:  # its files may be there all the same
        return ""
    release = tuple(map(int, re.findall(r"\d+", installed)[:2]))
    if OLDEST_ANYIO <= release < TOO_NEW_ANYIO:
        return ""
    oldest = ".".join(map(str, OLDEST_ANYIO))
    return (
        f"AnyIO {installed} is installed, and trio_uring's backend for it needs at least {oldest} "
        f"and less than {TOO_NEW_ANYIO[0]}: pip install 'anyio>={oldest},<{TOO_NEW_ANYIO[0]}'"
    )
