"""`CompletionBatch`: operations whose completions are reported as one.

The C core counts the CQEs of a batch and stores their results. It reports one completion to Python
when the last CQE has arrived (batch.c). The operations must end without being cancelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio.lowlevel import Abort

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio.lowlevel import RaiseCancelT, Task

    from trio_uring._operations import OperationArray

    from ._ring import Ring


class CompletionBatch:
    """The operations *start* to *end* of *array*, and the task that waits for all of them."""

    def __init__(
        self,
        array: OperationArray[object],
        start: int,
        end: int,
        opcodes: Mapping[int, int],
        tokens: int,
        task: Task,
    ) -> None:
        self.array = array
        self.start = start
        self.end = end
        self.opcodes = opcodes  # the number of operations by opcode
        self.tokens = tokens  # taken from the limiter of file operations
        self.task = task
        # res and flags of each operation, when all are done
        self.results: Sequence[tuple[int, int]] = ()
        self.raise_cancel: RaiseCancelT | None = None

    def abort(self, raise_cancel: RaiseCancelT) -> Abort:
        """Record that the task was cancelled. The operations end without being cancelled."""
        self.raise_cancel = raise_cancel
        return Abort.FAILED

    def unwrap(self) -> None:
        """Return None, as `InFlight.unwrap`."""

    def discard(self) -> None:
        """Discard the results, which no task will get; close the fds among them."""
        operations = self.array.operations[self.start : self.end]
        for operation, (res, _) in zip(operations, self.results, strict=False):
            if res >= 0 and operation.discard is not None:
                operation.discard(res)
        self.array.release()


class CompletionBatches(dict[int, CompletionBatch]):
    """The batches in flight. The keys are the ring's numbers for them."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def open(self, batch: CompletionBatch) -> int:
        """Add *batch* and return the user_data of its first operation."""
        number, user_data = self._ring.open_batch(batch.end - batch.start)
        self[number] = batch
        return user_data

    def close(self, number: int) -> CompletionBatch:
        """Remove a batch that is done, and return it with its results."""
        batch = self.pop(number)
        batch.results = self._ring.close_batch(number, batch.end - batch.start)
        return batch

    def operations(self) -> int:
        """Return the number of operations of the batches in flight."""
        return sum(batch.end - batch.start for batch in self.values())
