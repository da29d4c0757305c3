"""The second public door: perform any io_uring operation from a Trio task."""

from __future__ import annotations

from typing import TypeVar

from . import _operations as operations
from ._engine._io_manager import UringIOManager
from ._fallback import FallbackStatistics as FallbackStatistics
from ._operations import Operation as Operation
from ._statistics import RingStatistics as RingStatistics
from ._trio_private import current_io_manager

__all__ = [
    "FallbackStatistics",
    "Operation",
    "RingStatistics",
    "on_ring",
    "operations",
    "perform",
]

T = TypeVar("T")


def on_ring() -> bool:
    """Whether the current run is on io_uring.

    Raises:
      RuntimeError: outside a run.
    """
    return isinstance(current_io_manager(), UringIOManager)


async def perform(operation: Operation[T]) -> T:
    """Submit an operation of `trio_uring.lowlevel.operations`, and wait until it is done.

    A checkpoint, always. The memory that the operation points to stays pinned until the
    kernel is done with it.

    Args:
      operation: To be performed once; make a new one for each call.

    Returns:
      What the operation's docstring says.

    Raises:
      OSError: the kernel's answer, as the standard library would raise it.
      UnsupportedOpcodeError: the running kernel does not know the operation.
      trio.BusyResourceError: another task waits for the same thing on the same fd.
      trio.ClosedResourceError: `trio.lowlevel.notify_closing` was called for its fd.
      RuntimeError: outside a run, or the run is not on io_uring.

    If cancelled, the kernel is asked to stop the operation, and it decides: a result that
    came first is returned; `trio.Cancelled` means that nothing was done.
    """
    manager = current_io_manager()
    if not isinstance(manager, UringIOManager):
        raise RuntimeError(
            "this Trio run is not on io_uring: start it with trio_uring.run, or see "
            "trio.lowlevel.current_statistics().io_statistics for why it fell back"
        )
    return await manager.perform(operation)
