"""Sets up the native engine's `Loop` of a run."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from trio_uring._kernel import native
from trio_uring._kernel.sockets import MSG_DONTWAIT
from trio_uring._operations import recv_once, send
from trio_uring._trio_private import counts_steps, current_runner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_uring._kernel._native import Loop

    from ._buffer_pool import BufferPool
    from ._fd_waiters import FdWaiters
    from ._limiter import Limiter
    from ._ring import Ring


def open_native_loop(
    table: object,
    ring: Ring,
    waiters: FdWaiters,
    limiter: Limiter,
    registered: Mapping[int, object],
    *,
    turn_budget: float,
    may_send_now: bool,
) -> Loop:
    """Return the native engine's `Loop` of the current run. It fetches all completions from now on.

    Args:
      table: The run's `InFlightTable`, for what the engine leaves to Python.
      ring: The run's ring.
      waiters: The table where its operations are registered; used as a plain dict.
      limiter: Limits its operations on files.
      registered: The fds with tasks waiting in epoll; a plain dict too.
      turn_budget: As in `RingConfig`.
      may_send_now: Whether the engine may use send(2) if that is cheaper than the ring.
    """
    loop = native.Loop(
        ring=ring.address,
        python_ring=ring,
        manager=table,
        waiters=waiters,
        registered=registered,
        limiter=limiter,
        send_operation=send(-1, b"", MSG_DONTWAIT),
    )
    loop.begin(current_runner(), 0.0 if counts_steps() else turn_budget, may_send_now)
    ring.native = loop
    return loop


def receive_natively(loop: Loop, pool: BufferPool) -> None:
    """Make *loop* receive from streams into the buffers of *pool*, as `recv_once` does."""
    loop.receive_into(
        *pool.addresses(),
        pool.size,
        pool.count if pool.incremental else 0,
        pool.group,
        recv_once(-1, pool, pool.size),
    )


def count_native(loop: Loop, completed: list[int]) -> list[int]:
    """Return *completed*, the counts of completions by opcode, with those of *loop* added."""
    counts = [*map(operator.add, completed, loop.completed())]
    counts[loop.send_operation.opcode] += loop.sent_now
    return counts
