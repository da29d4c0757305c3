"""The low-level API: perform any io_uring operation in a Trio task."""

from __future__ import annotations

from typing import TypeVar

from . import _operations as operations
from ._arguments import wrong_type
from ._engine._io_manager import UringIOManager, no_ring_error
from ._operation_times import OperationTimes as OperationTimes
from ._operations import Operation as Operation
from ._statistics import (
    FallbackStatistics as FallbackStatistics,
    RingStatistics as RingStatistics,
)
from ._trio_private import current_io_manager

__all__ = [
    "FallbackStatistics",
    "Operation",
    "OperationTimes",
    "RingStatistics",
    "on_ring",
    "operations",
    "perform",
]

T = TypeVar("T")


def on_ring() -> bool:
    """Return whether the current run is on io_uring.

    Raises:
      RuntimeError: outside a run.
    """
    return isinstance(current_io_manager(), UringIOManager)


async def perform(operation: Operation[T]) -> T:
    """Submit an operation of `trio_uring.lowlevel.operations`, and wait for its completion.

    Always a checkpoint. The operation pins its buffers until the kernel no longer uses them.

    Args:
      operation: The operation. If it has a buffer, it can be performed only once, so make a new one
        for each call.

    Returns:
      The result that the operation's docstring describes.

    Raises:
      OSError: the operation failed. The error is the one that the standard library would raise.
      UnsupportedOpcodeError: the running kernel does not support the operation.
      trio.BusyResourceError: another task waits for the same thing on the same fd.
      trio.ClosedResourceError: `trio.lowlevel.notify_closing` was called for its fd.
      TypeError: *operation* is not an operation.
      RuntimeError: outside a run, or the run is not on io_uring. Or the operation has a buffer, and
        was performed already.

    If cancelled, it asks the kernel to stop the operation, and waits for the completion. If the
    operation completed first, its result is returned. `trio.Cancelled` means that the operation did
    nothing.
    """
    manager = current_io_manager()
    if not isinstance(manager, UringIOManager):
        raise no_ring_error()
    if not isinstance(operation, Operation):
        raise _wrong_operation(operation)
    return await manager.perform(operation)


def _wrong_operation(operation: object) -> TypeError:
    name = getattr(operation, "__name__", "")
    if name and getattr(operations, name, None) is operation:
        return TypeError(f"operation must be an Operation: call the function, as in {name}(...)")
    if isinstance(operation, list | tuple | operations.Linked | operations.OperationArray):
        what = type(operation).__name__
        return TypeError(f"operation must be one Operation, not {what}: use perform_many")
    return wrong_type("operation", operation, "an Operation, which a function of operations makes")
