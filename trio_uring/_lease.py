"""`Lease`: what the leases of received data and of registered buffers have in common."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class Lease:
    """Memory that is yours until you `release` it; use ``with``.

    A lease that is forgotten gives its buffer back, if nothing uses the memory or a slice of it.
    """

    __slots__ = ("_memory",)

    def __init__(self, memory: memoryview) -> None:
        self._memory: memoryview | None = memory

    @property
    def memory(self) -> memoryview:
        """The memory. Slices of it must not be used after `release`.

        Raises:
          RuntimeError: the buffer was given back.
        """
        if self._memory is None:
            raise RuntimeError("this buffer was given back")
        return self._memory

    def release(self) -> None:
        """Give the buffer back. Does nothing if it was given back already.

        Raises:
          BufferError: something still uses the memory, such as an array or an operation. The buffer
            was not given back.
        """
        memory = self._memory
        if memory is not None:
            self._check_unused()
            memory.release()
            self._memory = None
            self._give_back()

    def _check_unused(self) -> None:
        """Raise `BufferError` if something uses the memory that its exports do not tell of."""

    def _give_back(self) -> None:
        """Give the buffer back to its owner."""

    def _forgotten(self, views: int) -> None:
        """Give the buffer back soon, unless some of the *views* of its memory are of this lease.

        Called by the finalizer, at any time in any thread.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            name = type(self).__name__
            warnings.warn(f"a {name} was not released", ResourceWarning, stacklevel=2)
            if _CAN_COUNT:
                # All views of a buffer refer to one object, and the program may still read from
                # one: the memory itself, or a slice of it.
                [shared] = gc.get_referents(memory)
                del memory
                self._forgotten(sys.getrefcount(shared) - _NO_VIEWS)


def _references_without_views() -> int:
    memory = memoryview(b"")
    [shared] = gc.get_referents(memory)
    del memory
    return sys.getrefcount(shared)


# Elsewhere a buffer that was forgotten stays lent.
_CAN_COUNT: Final = sys.implementation.name == "cpython"
_NO_VIEWS: Final = _references_without_views() if _CAN_COUNT else 0
