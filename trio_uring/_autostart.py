"""Installs trio_uring in a process that has TRIO_URING set, when the process imports Trio.

``trio_uring.pth`` runs this file when such a Python process starts, before the program. It does not
import the package, so that a process that never imports Trio doesn't spend time on it.
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
# Facts. A program may import `trio` first, or `trio_uring`. The latter imports `trio` while it is
# still being imported, and has no `install` yet.
#
# What does this mean for us? The end of the import of `trio` may be too early. We install when
# `trio` has been imported and no import of either module is in progress.
WATCHED = frozenset({"trio", "trio_uring"})


def start() -> None:
    """Install trio_uring now if Trio is imported already, otherwise when it is imported."""
    # Python runs the .pth files of a virtual environment twice, because site.py adds their
    # directory in two places. Each time this is a new module, with a new class.
    if any(f"{type(other)}" == f"{Finder}" for other in sys.meta_path):
        return
    finder = Finder()
    sys.meta_path.insert(0, finder)
    finder.install_if_ready()


class Finder:
    """Finds watched modules by the other finders, and notices when they are executed.

    The spec and its loader stay those that were found, because programs use them to read source and
    data.
    """

    def __init__(self) -> None:
        self._executing: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a watched module by the other finders, and watch it."""
        self._move_to_front()
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                self._watch(spec)
                return spec
        return None

    def install_if_ready(self) -> None:
        """Install trio_uring, if Trio is imported and no watched module is being imported."""
        if self._executing or "trio" not in sys.modules:
            return
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        setting = os.environ.get("TRIO_URING", "").strip().lower()
        if setting in {"", "0", "off"}:  # changed by the program since it started
            return
        try:
            importlib.import_module("trio_uring").install()
        except Exception as exc:
            if setting not in {"1", "on"}:  # "require", or a word that install() does not know
                sys.meta_path.insert(0, self)  # a second attempt to import Trio must fail too
                raise
            message = f"TRIO_URING={setting} has no effect: {type(exc).__name__}: {exc}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def execute(self, watched: _Watched, module: ModuleType) -> None:
        """Execute a watched module, then install trio_uring if it was the last one."""
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
            # Python's loaders of built-in and frozen modules are classes. Ours are not among them.
            message = f"TRIO_URING has no effect: {loader!r}, which loads {spec.name}, is odd"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return
        # Programs may look up the spec of a module more than once before they import it.
        if isinstance(execute, _Watched):
            execute = execute.execute
        vars(loader)["exec_module"] = _Watched(self, spec, execute)

    def _move_to_front(self) -> None:
        # pytest and others insert finders before ours, which would find the modules unwatched.
        # Insert before deleting: another thread that iterates over the list may see a finder twice,
        # but misses none.
        if self in sys.meta_path[1:]:
            sys.meta_path.insert(0, self)
            del sys.meta_path[sys.meta_path.index(self, 1)]


class _Watched:
    """Replaces a loader's ``exec_module``, for one module and one call."""

    def __init__(
        self, finder: Finder, spec: ModuleSpec, execute: Callable[[ModuleType], None]
    ) -> None:
        self._finder = finder
        self._spec = spec
        self.execute = execute

    def __call__(self, module: ModuleType) -> None:
        # A loader may load several modules, as pytest's does.
        if module.__spec__ is self._spec:
            vars(self._spec.loader).pop("exec_module", None)
            self._finder.execute(self, module)
        else:
            self.execute(module)
