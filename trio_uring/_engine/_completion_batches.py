"""`CompletionBatch`: operations that end by themselves, whose completions come as one.

The C core counts the CQEs of a batch, keeps their results, and hands Python one completion when
the last has come (batch.c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from trio.lowlevel import Abort

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio.lowlevel import RaiseCancelT, Task

    from trio_uring._operations import OperationArray

    from ._ring import Ring


@attrs.define(eq=False)
class CompletionBatch:
    """The operations *start* to *end* of *array*, and the task that waits for all of them."""

    array: OperationArray[object]
    start: int
    end: int
    opcodes: Mapping[int, int]  # how many of each
    tokens: int  # of the limiter of file operations
    task: Task
    results: Sequence[tuple[int, int]] = ()  # res and flags of each, once it is done
    raise_cancel: RaiseCancelT | None = None

    def abort(self, raise_cancel: RaiseCancelT) -> Abort:
        """Remember that the task was cancelled; the operations end by themselves."""
        self.raise_cancel = raise_cancel
        return Abort.FAILED

    def unwrap(self) -> None:
        """As `InFlight.unwrap`."""

    def discard(self) -> None:
        """Drop the results, which no task will see; close the fds among them."""
        operations = self.array.operations[self.start : self.end]
        for operation, (res, _) in zip(operations, self.results, strict=False):
            if res >= 0 and operation.discard is not None:
                operation.discard(res)
        self.array.release()


class CompletionBatches(dict[int, CompletionBatch]):
    """The batches in flight, by the number that the ring gave each."""

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self._ring = ring

    def open(self, batch: CompletionBatch) -> int:
        """Add *batch*; returns the user_data of its first operation."""
        number, user_data = self._ring.open_batch(batch.end - batch.start)
        self[number] = batch
        return user_data

    def close(self, number: int) -> CompletionBatch:
        """Remove a batch that is done; returns it with its results."""
        batch = self.pop(number)
        batch.results = self._ring.close_batch(number, batch.end - batch.start)
        return batch

    def operations(self) -> int:
        """Return how many operations are in flight in batches."""
        return sum(batch.end - batch.start for batch in self.values())
