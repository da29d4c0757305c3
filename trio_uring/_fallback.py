"""Trio's own I/O manager, for runs that asked for a ring and got none."""

from __future__ import annotations

import attrs

from ._trio_private import EpollIOManager


@attrs.frozen(eq=False)
class FallbackStatistics:
    """`trio.lowlevel.RunStatistics.io_statistics` of a run that asked for a ring and got none.

    Args:
      tasks_waiting_read: As in Trio's own statistics.
      tasks_waiting_write: As in Trio's own statistics.
      fallback_reason: Why there is no ring, and what to do about it.
    """

    tasks_waiting_read: int
    tasks_waiting_write: int
    fallback_reason: str
    backend: str = "epoll"


class FallbackIOManager(EpollIOManager):
    """Trio's own I/O manager, with the reason for the fallback in its statistics."""

    fallback_reason: str = ""

    @classmethod
    def because(cls, reason: str) -> FallbackIOManager:
        """Return a new I/O manager that has *reason* in its statistics."""
        manager = cls()
        manager.fallback_reason = reason
        return manager

    def statistics(self) -> FallbackStatistics:  # type: ignore[override]
        """Return Trio's statistics with the reason."""
        plain = super().statistics()
        return FallbackStatistics(
            plain.tasks_waiting_read, plain.tasks_waiting_write, self.fallback_reason
        )
