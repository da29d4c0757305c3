"""Ring setup: which flags are tried, and what happens if memory is short."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final

from trio_uring._errors import setup_error
from trio_uring._kernel import ffi, lib
from trio_uring._kernel.uapi import SetupFlag
from trio_uring._statistics import flag_names

if TYPE_CHECKING:
    from trio_uring._config import RingConfig
    from trio_uring._kernel import CData

# The flags to try, in this order. Each step leaves out flags that an older kernel refuses with
# EINVAL. The kernels that added them: DEFER_TASKRUN 6.1, SINGLE_ISSUER 6.0, COOP_TASKRUN and
# TASKRUN_FLAG 5.19, SUBMIT_ALL 5.18. CLAMP and CQSIZE are older than 5.11, the oldest kernel that
# we support. With TASKRUN_FLAG, a loop iteration with nothing to do needs no system call
# (tests/kernel/test_ring.py).
_BASE = SetupFlag.CLAMP | SetupFlag.CQSIZE
_DEFER = _BASE | SetupFlag.SUBMIT_ALL | SetupFlag.SINGLE_ISSUER | SetupFlag.DEFER_TASKRUN
_LADDER: Final = (
    _DEFER | SetupFlag.TASKRUN_FLAG,
    _DEFER,
    _BASE | SetupFlag.SUBMIT_ALL | SetupFlag.SINGLE_ISSUER | SetupFlag.COOP_TASKRUN,
    _BASE | SetupFlag.SUBMIT_ALL | SetupFlag.COOP_TASKRUN,
    _BASE | SetupFlag.SUBMIT_ALL,
    _BASE,
)
# With SQPOLL the kernel refuses the TASKRUN flags.
_SQPOLL_LADDER: Final = (
    _BASE | SetupFlag.SQPOLL | SetupFlag.SUBMIT_ALL | SetupFlag.SINGLE_ISSUER,
    _BASE | SetupFlag.SQPOLL | SetupFlag.SUBMIT_ALL,
    _BASE | SetupFlag.SQPOLL,
)
_ENTRIES_MIN: Final = 8

# The kernel frees a ring's memory some time after the ring was closed (about 10 ms on Linux 6.18).
# Until then it counts against RLIMIT_MEMLOCK, so a program with many short runs would reach that
# limit because of rings that it has closed. So if there is not enough memory and a ring was closed
# within this time, setup waits and tries again. Otherwise it tries with fewer entries.
_PATIENCE_SECONDS: Final = 0.5


class SetupLog:
    """What the kernel refused during setup, for the statistics."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def refused(self, what: str, result: int) -> None:
        """Record that *what* was refused with *result*, a negative error number."""
        self.steps.append(f"{what}: {errno.errorcode.get(-result, -result)}")


class _Memory:
    """What is known about the memory that this process may lock."""

    def __init__(self) -> None:
        self.last_close = -_PATIENCE_SECONDS  # when a ring was last closed
        # The lowest number of entries that was refused when no ring had been closed just before.
        self.too_many = 1 << 32

    def is_worth_waiting_for(self, entries: int) -> bool:
        """Whether memory for *entries* may be missing only because a ring was closed just now."""
        if time.monotonic() >= self.last_close + _PATIENCE_SECONDS:
            self.too_many = min(entries, self.too_many)
        return entries < self.too_many


_memory: Final = _Memory()


def note_close() -> None:
    """Record that a ring was closed now."""
    _memory.last_close = time.monotonic()


def open_ring(config: RingConfig, attempts: SetupLog) -> CData:
    """Set up a ring. Try fewer flags on EINVAL, and fewer entries on ENOMEM."""
    ladder = _LADDER if config.sqpoll is None else _SQPOLL_LADDER
    entries, step = config.entries, 0
    while True:
        ring, result = _try_open(config, entries, ladder[step])
        if ring is not None:
            return ring
        if result == -errno.ENOMEM and _memory.is_worth_waiting_for(entries):
            time.sleep(0.005)
            continue
        attempts.refused(f"{entries} entries, {'|'.join(flag_names(ladder[step]))}", result)
        if result == -errno.EINVAL and step + 1 < len(ladder):
            step += 1
        elif result == -errno.ENOMEM and entries > _ENTRIES_MIN:
            entries //= 2
        else:
            raise setup_error(result, "io_uring_setup")


def _try_open(config: RingConfig, entries: int, flags: SetupFlag) -> tuple[CData | None, int]:
    completion_entries = max(config.completion_entries * entries // config.entries, entries)
    idle_ms = cpu = 0
    if config.sqpoll is not None:
        idle_ms = round(config.sqpoll.idle * 1000)
        if config.sqpoll.cpu is not None:
            cpu = config.sqpoll.cpu
            flags |= SetupFlag.SQ_AFF
    if config.allowed_operations is not None:
        flags |= SetupFlag.R_DISABLED
    ring = ffi.gc(lib.ring_new(), lib.ring_free)
    result = lib.ring_open(ring, entries, completion_entries, flags, idle_ms, cpu)
    return (ring if result == 0 else None), result
