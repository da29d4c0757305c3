"""Installs trio_uring in a process that has TRIO_URING set, as soon as it imports Trio.

``trio_uring.pth`` runs this file at the start of every such Python, before the program and
without importing the package: a process that never imports Trio must not pay for it.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Why two modules are watched
# ---------------------------
#
# Facts. A program may import `trio` first, or `trio_uring`, which then imports `trio` while it
# is itself half done and has no `install` yet.
#
# What does this mean for us? When `trio` has been executed it may be too early. We act when no
# import of the two is going on any more, and `trio` is there.
WATCHED = frozenset({"trio", "trio_uring"})


def start() -> None:
    """Install trio_uring now if Trio is imported already, or else as soon as it is."""
    # Python runs the .pth files of a virtual environment twice, each time giving us a new
    # module, and so a new class (its site.py adds that directory in two places).
    if any(f"{type(other)}" == f"{Finder}" for other in sys.meta_path):
        return
    finder = Finder()
    sys.meta_path.insert(0, finder)
    finder.install_if_ready()


class Finder:
    """Finds what the other finders find, and learns when a watched module is executed.

    The spec and its loader are those that were found: programs ask both for source and data.
    """

    def __init__(self) -> None:
        self._executing: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a watched module as the others would, and watch it."""
        self._move_to_front()
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                self._watch(spec)
                return spec
        return None

    def install_if_ready(self) -> None:
        """Install trio_uring, if Trio is there and no watched module is half done."""
        if self._executing or "trio" not in sys.modules:
            return
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        setting = os.environ.get("TRIO_URING", "").strip().lower()
        if setting in {"", "0", "off"}:  # the program has changed it since it started
            return
        try:
            importlib.import_module("trio_uring").install()
        except Exception as exc:
            if setting == "require":
                sys.meta_path.insert(0, self)  # a second try to import Trio must fail, too
                raise
            message = f"TRIO_URING={setting} has no effect: {type(exc).__name__}: {exc}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def execute(self, watched: _Watched, module: ModuleType) -> None:
        """Execute a watched module, then see whether it was the last to wait for."""
        name = module.__name__
        self._executing.add(name)
        try:
            watched.execute(module)
        finally:
            self._executing.discard(name)
        self.install_if_ready()

    def _watch(self, spec: ModuleSpec) -> None:
        loader: object = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None or isinstance(loader, type) or not hasattr(loader, "__dict__"):
            # A class as its own loader is Python's, for what is built into the interpreter.
            message = f"TRIO_URING has no effect: {loader!r}, which loads {spec.name}, is odd"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return
        # Programs may look for a module more than once before they import it.
        if isinstance(execute, _Watched):
            execute = execute.execute
        vars(loader)["exec_module"] = _Watched(self, spec, execute)

    def _move_to_front(self) -> None:
        # pytest and others put finders before ours, which would find our modules unwatched.
        # Another thread may be going through the list: put in first, so that it sees some
        # finder twice, not one too few.
        if self in sys.meta_path[1:]:
            sys.meta_path.insert(0, self)
            del sys.meta_path[sys.meta_path.index(self, 1)]


class _Watched:
    """Stands in for a loader's ``exec_module``, for one module and one time."""

    def __init__(
        self, finder: Finder, spec: ModuleSpec, execute: Callable[[ModuleType], None]
    ) -> None:
        self._finder = finder
        self._spec = spec
        self.execute = execute

    def __call__(self, module: ModuleType) -> None:
        # One loader may serve many modules, as pytest's does.
        if module.__spec__ is self._spec:
            vars(self._spec.loader).pop("exec_module", None)
            self._finder.execute(self, module)
        else:
            self.execute(module)
