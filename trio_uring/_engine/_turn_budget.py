"""`TurnBudget`: how long one turn of the loop may go on without a schedule point.

A call of Trio's that need not wait lets other tasks run all the same (a schedule point). That costs
more than accepting a connection or reading a cached file does. Trio promises a schedule point, and
leaves to the scheduler whether it then switches tasks ("Checkpoints" in Trio's reference): here it
does not while the turn is young. The cancel point stays.
"""

from __future__ import annotations

import time

from trio_uring._trio_private import count_schedule_point, counts_steps


class TurnBudget:
    """The budget of one run's turns.

    Args:
      seconds: For one turn; 0 for none.

    Attributes:
      end: When this turn's budget ends, by `time.perf_counter`; 0 until the first call of the turn
        that asks, from which on it counts.
    """

    __slots__ = ("_seconds", "end")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.end = 0.0

    def skip_schedule_point(self) -> bool:
        """Whether the current task may go on without a schedule point, which then counts as passed.

        Where it may not, the caller has to pass one.
        """
        if not self._seconds or counts_steps():
            return False
        now = time.perf_counter()
        if not self.end:
            self.end = now + self._seconds
        if now >= self.end:
            return False
        count_schedule_point()
        return True
