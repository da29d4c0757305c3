"""A finder that gives AnyIO our backends when it imports its own. It does not import AnyIO.

Why a finder is needed
----------------------

Facts. AnyIO has no registry of backends: for the name ``x`` it imports ``anyio._backends._x``,
takes its ``backend_class``, and stores that in ``loaded_backends``. Inside a run the name comes
from sniffio, and must be ``"trio"``: httpcore and others accept no other name.

What does this mean for us? A backend ``trio_uring`` would be used only to start a run, and not
inside it. So we replace the ``backend_class`` of ``anyio._backends._trio`` too. Ours checks the
current run, and behaves as AnyIO's in a run without a ring.

When it looks for AnyIO again
-----------------------------

Facts. A finder isn't asked for a module that an earlier finder finds, and pytest inserts its own
finder at the front. With ``TRIO_URING`` set, this package may be imported while AnyIO's module for
Trio is being imported, as that module imports Trio.

What does this mean for us? Until AnyIO's module for Trio has been loaded, the finder moves to the
front again: whenever it is asked for a module, and when a run gets a ring. Each such run also
checks whether the module was loaded without us.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Final

from ._anyio_versions import why_incompatible
from ._engine._io_manager import UringIOManager
from ._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from types import ModuleType
else:
    Loader = object  # importing it takes 2 ms, and Python needs only the methods below

ANYIO_TRIO: Final = "anyio._backends._trio"
ANYIO_TRIO_URING: Final = "anyio._backends._trio_uring"
BACKENDS: Final = "trio_uring.anyio_backend"

_warned: Final[set[str]] = set()


def install() -> None:
    """Let AnyIO find our backends, now and later."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    adopt()


def before_ring_run() -> None:
    """Look for AnyIO's module again, at the start of a run that gets a ring."""
    _finder.return_to_front()
    adopt(wanted=True)


def adopt(*, wanted: bool = False) -> None:
    """Replace AnyIO's backend for Trio with ours, if it is loaded.

    An AnyIO of an unsupported version is not changed, and its calls on files use threads. This
    warns only if a ring was asked for: if *wanted* is true, or this thread's run has a ring.
    """
    module = sys.modules.get(ANYIO_TRIO)
    if module is None or "backend_class" not in vars(module):  # still being imported
        return
    try:
        register = vars(_backends(module)).get("register")
        if register is not None:  # otherwise it is still being imported, and registers itself
            register()
    except RuntimeError as exc:
        if (wanted or _on_ring()) and str(exc) not in _warned:
            _warned.add(str(exc))
            warnings.warn(f"AnyIO's files stay in threads: {exc}", RuntimeWarning, stacklevel=2)


def _on_ring() -> bool:
    try:
        return isinstance(current_io_manager(), UringIOManager)
    except RuntimeError:
        return False


def _backends(anyio_trio: ModuleType | None) -> ModuleType:
    """Import our backends, which register themselves.

    Raises:
      RuntimeError: this version of AnyIO is not supported.
    """
    if reason := why_incompatible():
        # AnyIO turns an ImportError into "No such backend", which would be misleading.
        raise RuntimeError(reason)
    ours = sys.modules.get(BACKENDS)
    # A test may have removed AnyIO from sys.modules and imported it again. Then our module belongs
    # to the old one.
    if ours is not None and vars(ours).get("anyio_trio", anyio_trio) is not anyio_trio:
        del sys.modules[BACKENDS]
    # This returns the unfinished module if it is the one that imports AnyIO's module.
    return import_module(BACKENDS)


class Finder:
    """Finds AnyIO's module for Trio by the other finders, and its module for our backend."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find one of these two modules."""
        if name == ANYIO_TRIO_URING:
            return ModuleSpec(name, _NewModule())
        self.return_to_front()
        if name == ANYIO_TRIO:
            for finder in sys.meta_path:
                if not _is_ours(finder) and (spec := finder.find_spec(name, path, target)):
                    if spec.loader is not None:
                        spec.loader = _AdoptingLoader(spec.loader)
                    return spec
        return None

    def return_to_front(self) -> None:
        """Move to the front of sys.meta_path, unless AnyIO's module for Trio is loaded."""
        # Insert before deleting: another thread that iterates over the list may see a finder twice,
        # but misses none.
        if ANYIO_TRIO not in sys.modules and self in sys.meta_path[1:]:
            sys.meta_path.insert(0, self)
            del sys.meta_path[sys.meta_path.index(self, 1)]


def _is_ours(finder: object) -> bool:
    # There is a second finder if this package was imported twice.
    return type(finder).__module__ == __name__


_finder: Final = Finder()


class _NewModule(Loader):
    """Loads ``anyio._backends._trio_uring``, which has no file."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Set ``backend_class``, which AnyIO reads there."""
        anyio_trio = import_module(ANYIO_TRIO) if not why_incompatible() else None
        vars(module)["backend_class"] = vars(_backends(anyio_trio))["backend_class"]


class _AdoptingLoader(Loader):
    """Loads AnyIO's module for Trio with its own loader, then replaces its backend."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Call the module's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own loader, execute it, and replace its backend."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        adopt()

    def __getattr__(self, name: str) -> object:
        # Programs use the loader of a spec to read source and data.
        return getattr(self._loader, name)
