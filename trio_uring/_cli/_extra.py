"""Imports what needs the packages of the extra ``cli``, and says so where they are missing."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import ModuleType

_PACKAGES: Final = ("matplotlib", "rich")


def import_extra(module: str) -> ModuleType:
    """Import *module* of this package. Exit with a sentence if a package is missing."""
    try:
        return import_module(module, __package__)
    except ModuleNotFoundError as exc:
        package = f"{exc.name}".partition(".")[0]
        if package not in _PACKAGES:
            raise
        sys.exit(
            f"trio-uring: this command needs {package}: install it with "
            "pip install 'trio-uring[cli]'"
        )
