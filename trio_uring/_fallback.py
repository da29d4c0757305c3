"""Trio's own I/O manager, for runs that asked for a ring and got none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

from ._log import log_fallback_run
from ._statistics import FallbackStatistics, RingStatistics
from ._trio_private import EpollIOManager, no_run_error

if TYPE_CHECKING:

    class PlainStatistics(Protocol):
        """The statistics of Trio's own I/O manager."""

        @property
        def tasks_waiting_read(self) -> int:
            """Tasks that wait for an fd to be readable."""
            ...

        @property
        def tasks_waiting_write(self) -> int:
            """Tasks that wait for an fd to be writable."""
            ...


_NOT_ASKED = "the run did not ask for a ring, or trio_uring does not support this Trio"


class FallbackIOManager(EpollIOManager):
    """Trio's own I/O manager, with the reason for the fallback in its statistics."""

    fallback_reason: str = ""

    @classmethod
    def because(cls, reason: str) -> FallbackIOManager:
        """Return a new I/O manager that has *reason* in its statistics. It is logged."""
        log_fallback_run(reason)
        manager = cls()
        manager.fallback_reason = reason
        return manager

    def statistics(self) -> FallbackStatistics:  # type: ignore[override]
        """Return Trio's statistics with the reason."""
        plain = super().statistics()
        return FallbackStatistics(
            tasks_waiting_read=plain.tasks_waiting_read,
            tasks_waiting_write=plain.tasks_waiting_write,
            fallback_reason=self.fallback_reason,
        )


def statistics() -> RingStatistics | FallbackStatistics:
    """Return the I/O statistics of the current run, which has the same fields with any backend.

    In a run that asked for a ring, ``trio.lowlevel.current_statistics().io_statistics`` is the same
    object. This function works in any other Trio run, too, and its result has the right type.

    Raises:
      RuntimeError: outside a run.
    """
    try:
        found = trio.lowlevel.current_statistics()
    except RuntimeError:
        raise no_run_error() from None
    return as_statistics(found.io_statistics)


def as_statistics(
    found: RingStatistics | FallbackStatistics | PlainStatistics,
) -> RingStatistics | FallbackStatistics:
    """Return the statistics of an I/O manager, Trio's own with the fields of ours."""
    if isinstance(found, RingStatistics | FallbackStatistics):
        return found
    return FallbackStatistics(
        tasks_waiting_read=found.tasks_waiting_read,
        tasks_waiting_write=found.tasks_waiting_write,
        fallback_reason=_NOT_ASKED,
    )
