"""The statistics of a run: how its ring is set up, and counters of what it has done."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

import attrs

from ._kernel.uapi import Opcode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from enum import IntFlag


# Without __init__ and __repr__, which take time to make, and nobody makes an object of it.
@attrs.frozen(eq=False, kw_only=True, init=False, repr=False)
class _Statistics:
    """The fields that the statistics of all runs have. The defaults are those without a ring."""

    tasks_waiting_read: int
    tasks_waiting_write: int
    setup_flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    entries: int = 0
    in_flight: int = 0
    submitted: int = 0
    enters: int = 0
    cancelled: int = 0
    buffers_ran_out: int = 0
    completed: Mapping[str, int] = attrs.field(factory=dict[str, int])
    waiting_for_limit: int = 0
    routes: Mapping[str, int] = attrs.field(factory=dict[str, int])
    limits: Mapping[str, int] = attrs.field(factory=dict[str, int])
    engine: str = "none"
    engine_reason: str = "the run has no ring"
    fallback_reason: str = ""


@attrs.frozen(eq=False, kw_only=True)
class RingStatistics(_Statistics):
    """The statistics of a run on io_uring.

    Args:
      backend: ``"io_uring"``.
      tasks_waiting_read: Tasks that wait to receive, accept, or for an fd to be readable.
      tasks_waiting_write: Tasks that wait to connect, or for an fd to be writable.
      setup_flags: Names of the ``IORING_SETUP_*`` flags in use.
      features: Names of the ``IORING_FEAT_*`` that the kernel reports.
      refused: What the kernel was asked for and refused, so that it is not in use.
      entries: The size of the submission queue.
      in_flight: Operations that were pushed and have not completed.
      submitted: SQEs that the kernel has taken, including cancellations and polls of the epoll fd.
      enters: Calls of io_uring_enter(2).
      cancelled: Operations that ended because their task was cancelled.
      buffers_ran_out: Receives that found no free buffer (``ENOBUFS``), and were tried again.
      completed: Completed operations by opcode: ``{"RECV": 3, ...}``. With one or two connections,
        the native engine calls send(2) directly if no other operation would share the enter. These
        calls count as ``SEND``.
      waiting_for_limit: Tasks that wait because of ``RingConfig.max_file_operations``.
      routes: Calls on files and paths by their route: ``ring``, ``inline`` (without waiting, in the
        event loop's thread) or ``thread``.
      limits: The limits of the run, named as in `trio_uring.RingConfig`: ``max_file_operations``
        and, if the kernel supports them (Linux 5.15), ``bounded_workers`` and
        ``unbounded_workers``.
      engine: The engine for operations on sockets: ``native``, which is written in C, or
        ``python``.
      engine_reason: Why the engine is not ``native``; empty if it is.
      fallback_reason: Empty: there was no fallback.
    """

    backend: Literal["io_uring"] = "io_uring"


@attrs.frozen(eq=False, kw_only=True)
class FallbackStatistics(_Statistics):
    """The statistics of a run without a ring, with the fields of `RingStatistics`.

    So a program can read each field in every run. Numbers are 0 and collections are empty, except:

    Args:
      backend: ``"epoll"``.
      tasks_waiting_read: As in Trio's own statistics.
      tasks_waiting_write: As in Trio's own statistics.
      engine: ``"none"``.
      engine_reason: That the run has no ring.
      fallback_reason: Why there is no ring, and what to do about it.
    """

    backend: Literal["epoll"] = "epoll"


_OPCODE_NAMES = {int(opcode): opcode.name for opcode in Opcode}


def opcode_name(opcode: int) -> str:
    """Return the name of *opcode*; its number, if it is unknown here."""
    return _OPCODE_NAMES.get(opcode, f"{opcode}")


def counts_by_name(counts: Sequence[int]) -> dict[str, int]:
    """Return the *counts* that are not 0, which are in the order of their opcodes, by name."""
    return {name: n for opcode, name in _OPCODE_NAMES.items() if (n := counts[opcode])}


def flag_names(flags: IntFlag) -> tuple[str, ...]:
    """Return the names of the members in *flags*. Bits without a name are left out."""
    return tuple(member.name for member in type(flags) if member in flags and member.name)


class Totals:
    """Totals of all runs of this process that have ended.

    Attributes:
      ring_runs: Runs that had a ring.
      native_runs: Runs that had a ring and used the native engine.
      fallback_runs: Runs that asked for a ring and got none.
      completed: Completed operations by opcode.
      routes: Calls on files and paths by their route.
    """

    def __init__(self) -> None:
        self.ring_runs: int = 0
        self.native_runs: int = 0
        self.fallback_runs: int = 0
        self.completed: Counter[str] = Counter()
        self.routes: Counter[str] = Counter()

    def add(self, completed: Mapping[str, int], routes: Mapping[str, int], *, native: bool) -> None:
        """Add the counts of a run that ends."""
        self.ring_runs += 1
        self.native_runs += native
        self.completed.update(completed)
        self.routes.update(routes)


totals = Totals()
