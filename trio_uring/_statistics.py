"""`RingStatistics`: what a run's ring is, and what it has done."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from enum import IntFlag


@attrs.frozen(eq=False)
class RingStatistics:
    """`trio.lowlevel.RunStatistics.io_statistics` of a run on io_uring.

    Args:
      tasks_waiting_read: Tasks that wait to receive, accept, or for an fd to be readable.
      tasks_waiting_write: Tasks that wait to connect, or for an fd to be writable.
      setup_flags: Names of the ``IORING_SETUP_*`` flags in use.
      features: Names of the ``IORING_FEAT_*`` that the kernel reports.
      refused: What was asked of the kernel and refused, and so is not in use.
      entries: Places in the submission queue.
      in_flight: Operations submitted, or about to be, that have not completed.
      submitted: SQEs taken by the kernel; includes cancels and the watch on epoll.
      enters: Calls of io_uring_enter(2).
      cancelled: Operations that ended because their task was cancelled.
      completed: Completed operations by opcode: ``{"RECV": 3, ...}``. With one or two connections
        the native engine calls send(2) where a task has nothing to share an enter with; such calls
        are among those of ``SEND``.
      waiting_for_limit: Tasks in line because of ``RingConfig.max_file_operations``.
      routes: Calls on files and paths by the way they went: ``ring``; ``inline``, which had
        nothing to wait for; and ``thread``.
      limits: What bounds the run, as in `trio_uring.RingConfig`: ``max_file_operations``, and, if
        the kernel has taken them (Linux 5.15), ``bounded_workers`` and ``unbounded_workers``.
      engine: What performs operations on sockets: ``native``, which is in C, or ``python``.
      engine_reason: Why it is not ``native``; empty if it is.
    """

    tasks_waiting_read: int
    tasks_waiting_write: int
    setup_flags: tuple[str, ...]
    features: tuple[str, ...]
    refused: tuple[str, ...]
    entries: int
    in_flight: int
    submitted: int
    enters: int
    cancelled: int
    completed: Mapping[str, int]
    waiting_for_limit: int
    routes: Mapping[str, int]
    limits: Mapping[str, int]
    engine: str
    engine_reason: str
    backend: str = "io_uring"


def flag_names(flags: IntFlag) -> tuple[str, ...]:
    """Return the names of the members in *flags*; bits without a name are left out."""
    return tuple(member.name for member in type(flags) if member in flags and member.name)


@attrs.define(eq=False)
class Totals:
    """What all runs of this process have done, added up when each ends.

    Args:
      ring_runs: Runs that had a ring.
      native_runs: Those of them that used the native engine.
      fallback_runs: Runs that wanted one and got none.
      completed: Completed operations by opcode.
      routes: Calls on files and paths by the way they went.
    """

    ring_runs: int = 0
    native_runs: int = 0
    fallback_runs: int = 0
    completed: Counter[str] = attrs.field(factory=Counter[str])
    routes: Counter[str] = attrs.field(factory=Counter[str])

    def add(self, statistics: RingStatistics) -> None:
        """Add those of a run that ends."""
        self.ring_runs += 1
        self.native_runs += statistics.engine == "native"
        self.completed.update(statistics.completed)
        self.routes.update(statistics.routes)


totals = Totals()
