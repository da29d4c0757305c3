"""`TurnBudget`: how long tasks may run in one loop iteration without a schedule point.

A call that need not wait still executes a schedule point, which lets other tasks run. That takes
longer than accepting a connection or reading a cached file. Trio promises a schedule point, but
lets the scheduler decide whether to switch tasks ("Checkpoints" in Trio's reference). Here it does
not switch while the loop iteration is within its budget. The cancel point remains.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trio_uring._trio_private import count_schedule_point, counts_steps

if TYPE_CHECKING:
    from trio_uring._kernel._native import Loop


class TurnBudget:
    """The budget of each loop iteration of one run.

    Args:
      seconds: The budget of one iteration; 0 to always have schedule points.

    Attributes:
      end: When this iteration's budget ends, by `time.perf_counter`. Each iteration sets it to 0,
        and the first call of `skip_schedule_point` starts the budget.
      native: The native engine's loop, if it is in use. It counts for both, then.
    """

    __slots__ = ("_seconds", "end", "native")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.end: float = 0.0
        self.native: Loop | None = None

    def skip_schedule_point(self) -> bool:
        """Whether the current task may continue without a schedule point; if so, count one.

        If it returns False, the caller must execute a schedule point.
        """
        if not self._seconds or counts_steps() or not self._is_within():
            return False
        count_schedule_point()
        return True

    def _is_within(self) -> bool:
        if self.native is not None:
            return self.native.within_budget()
        now = time.perf_counter()
        if not self.end:
            self.end = now + self._seconds
        return now < self.end
