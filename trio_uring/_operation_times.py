"""`OperationTimes`: a Trio instrument that measures how long operations on the ring take."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import trio

from ._operations import Operation
from ._statistics import opcode_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.lowlevel import Task


class OperationTimes(trio.abc.Instrument):
    """Measures for how long tasks wait for operations on the ring.

    Pass it to `trio_uring.run`, or add it to a run and remove it again
    (`trio.lowlevel.add_instrument`). It counts from the end of the step in which a task began to
    wait until the task is rescheduled. It does not see what needs no wait, such as a read of a
    cached file, nor what several operations do for one task, as those of
    `trio_uring.perform_many`.

    While a run has an instrument, Trio's own loop runs its tasks and the Python engine performs its
    operations. So everything takes longer then: measure for a while, or a part of the processes.

    Args:
      observe: Called with the opcode and the seconds of each operation, such as
        ``observe("RECV", 0.002)``, to make histograms of them.
    """

    def __init__(self, observe: Callable[[str, float], object] | None = None) -> None:
        self._observe = observe
        self._waiting: dict[Task, tuple[str, float]] = {}
        self.counts: Counter[str] = Counter()
        """The number of operations, by opcode."""
        self.seconds: dict[str, float] = defaultdict(float)
        """How long they took together, by opcode."""

    def after_task_step(self, task: Task) -> None:
        """Note for which operation *task* waits now, if it does."""
        operation = getattr(task.custom_sleep_data, "operation", None)
        if isinstance(operation, Operation):
            self._waiting[task] = (opcode_name(operation.opcode), time.perf_counter())

    def task_scheduled(self, task: Task) -> None:
        """Count the operation that *task* has waited for, if it has."""
        waited = self._waiting.pop(task, None)
        if waited is not None:
            opcode, begin = waited
            seconds = time.perf_counter() - begin
            self.counts[opcode] += 1
            self.seconds[opcode] += seconds
            if self._observe is not None:
                self._observe(opcode, seconds)

    def after_run(self) -> None:
        """Forget the tasks of the run."""
        self._waiting.clear()
