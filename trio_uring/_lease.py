"""`Lease`: what the leases of received data and of registered buffers have in common."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class Lease:
    """Memory that is yours until you `release` it; use ``with``."""

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
        if self._memory is not None:
            name = type(self).__name__
            warnings.warn(f"a {name} was not released", ResourceWarning, stacklevel=2)
