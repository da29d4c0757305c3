"""Which releases of AnyIO `trio_uring.anyio_backend` was written for."""

from __future__ import annotations

import os
import re
import sys
from typing import Final

# Newer releases of the same major version are tried, and their signatures looked at.
OLDEST_ANYIO: Final = (4, 10)
TOO_NEW_ANYIO: Final = (5, 0)

_METADATA: Final = re.compile(r"anyio-(\d.*)\.(dist|egg)-info")


def why_incompatible() -> str:
    """Return what is wrong with the imported AnyIO, in a sentence; empty if nothing is."""
    installed = _installed()
    release = tuple(map(int, re.findall(r"\d+", installed)[:2]))
    if not installed or OLDEST_ANYIO <= release < TOO_NEW_ANYIO:
        return ""
    oldest = ".".join(map(str, OLDEST_ANYIO))
    return (
        f"AnyIO {installed} is installed, and trio_uring's backend for it needs at least {oldest} "
        f"and less than {TOO_NEW_ANYIO[0]}: pip install 'anyio>={oldest},<{TOO_NEW_ANYIO[0]}'"
    )


def _installed() -> str:
    """Return the version in the name of AnyIO's metadata; empty if there is none beside it.

    AnyIO itself does not say it, and importing `importlib.metadata` takes 6 ms.
    """
    file = getattr(sys.modules.get("anyio"), "__file__", None)
    if file is None:
        return ""
    try:
        names = os.listdir(os.path.dirname(os.path.dirname(file)))  # noqa: PTH120, PTH208 (faster)
    except OSError:  # in a zip file
        return ""
    return next((match[1] for match in map(_METADATA.fullmatch, names) if match), "")
