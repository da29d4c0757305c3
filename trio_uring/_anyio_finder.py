"""Hands AnyIO our backends when it looks for them; imports no AnyIO.

Why it takes a finder
---------------------

Facts. AnyIO has no registry of backends: for the name ``x`` it imports ``anyio._backends._x``,
takes its ``backend_class``, and remembers that in ``loaded_backends``. Inside a run the name is
what sniffio says, and that must stay ``"trio"``: httpcore and others refuse any other.

What does this mean for us? A backend ``trio_uring`` alone would be asked to start a run, and
never again. So ``anyio._backends._trio`` gets a ``backend_class`` of ours as well, which asks
the current run: without a ring, it is AnyIO's own.

When it has to look again
-------------------------

Facts. A finder sees no module that an earlier finder finds, and pytest puts its own in front of
what is there. With ``TRIO_URING`` set, this package may be imported while AnyIO's module is
half done: it is the one that imports Trio.

What does this mean for us? Until AnyIO's module has come by, the finder returns to the front,
whenever it is asked for anything and when a run gets a ring. And each such run looks at what was
loaded without us.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Final

from ._engine._io_manager import UringIOManager
from ._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from types import ModuleType
else:
    Loader = object  # importing it takes 2 ms, and all that Python asks for is below

ANYIO_TRIO: Final = "anyio._backends._trio"
ANYIO_TRIO_URING: Final = "anyio._backends._trio_uring"
BACKENDS: Final = "trio_uring.anyio_backend"
VERSIONS: Final = "trio_uring._anyio_versions"

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
    """Put our backend in the place of AnyIO's for Trio, if that is loaded.

    An AnyIO that we do not know stays as it is, and the files of its users in threads. Only
    those who asked for a ring are told: *wanted*, or this thread's run has one.
    """
    module = sys.modules.get(ANYIO_TRIO)
    if module is None or "backend_class" not in vars(module):  # half done
        return
    try:
        register = vars(_backends(module)).get("register")
        if register is not None:  # else its import is going on, and ends with that
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


def _why_incompatible() -> str:
    # Only where AnyIO is in use: to import what knows the versions of packages takes 6 ms.
    return str(vars(import_module(VERSIONS))["why_incompatible"]())


def _backends(anyio_trio: ModuleType | None) -> ModuleType:
    """Import our backends, which register themselves.

    Raises:
      RuntimeError: for this AnyIO there are none.
    """
    if reason := _why_incompatible():
        # AnyIO turns an ImportError into "No such backend", which would be misleading.
        raise RuntimeError(reason)
    ours = sys.modules.get(BACKENDS)
    # A test may have made Python forget AnyIO, and then import it anew: ours was for the old.
    if ours is not None and vars(ours).get("anyio_trio", anyio_trio) is not anyio_trio:
        del sys.modules[BACKENDS]
    # If that import is going on already, it is what made Python load AnyIO's module.
    return import_module(BACKENDS)


class Finder:
    """Finds AnyIO's module for Trio as the other finders do, and AnyIO's module for us."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find one of the two modules."""
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
        """Be the first to be asked, until AnyIO's module for Trio is loaded."""
        # Another thread may be going through the list: put in first, so that it sees some
        # finder twice, not one too few.
        if ANYIO_TRIO not in sys.modules and self in sys.meta_path[1:]:
            sys.meta_path.insert(0, self)
            del sys.meta_path[sys.meta_path.index(self, 1)]


def _is_ours(finder: object) -> bool:
    # There is another one where this package was imported twice.
    return type(finder).__module__ == __name__


_finder: Final = Finder()


class _NewModule(Loader):
    """Loads ``anyio._backends._trio_uring``, which nobody has written."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make an empty one."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill it with what AnyIO looks for there."""
        anyio_trio = import_module(ANYIO_TRIO) if not _why_incompatible() else None
        vars(module)["backend_class"] = vars(_backends(anyio_trio))["backend_class"]


class _AdoptingLoader(Loader):
    """Loads AnyIO's module for Trio with the loader that was found, then adopts it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Do as the other loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module with its own loader, and execute it."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        adopt()

    def __getattr__(self, name: str) -> object:
        # Programs ask a spec's loader for source and data.
        return getattr(self._loader, name)
