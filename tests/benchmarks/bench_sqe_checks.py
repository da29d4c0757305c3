"""What the kernel does for each SQE before it performs it: find the file, check restrictions.

Messages go through socket pairs, one send and one receive each:

- ``fds``: as ever, the kernel looks the file up by its fd, and counts a reference to it;
- ``fixed files``: the sockets are registered with the ring (IOSQE_FIXED_FILE), which spares both;
- ``restricted``: fds, and the ring may do these operations only (RingConfig.allowed_operations).

    python bench_sqe_checks.py [--messages 20000] [--pairs 1 32] [--rounds 7]
"""

from __future__ import annotations

import argparse
import resource
import socket
import time
from array import array
from functools import partial
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring
from trio_uring import RingConfig
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._kernel import ffi
from trio_uring._kernel.uapi import RegisterOpcode, SqeFlag
from trio_uring._trio_private import current_io_manager
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from trio_uring.lowlevel import Operation

SIZE = 64
WAYS = ("fds", "fixed files", "restricted")
CONFIGS = {
    way: RingConfig(
        require=True,
        allowed_operations=frozenset({"SEND", "RECV"}) if way == "restricted" else None,
    )
    for way in WAYS
}
FLAGS = {way: int(SqeFlag.FIXED_FILE) if way == "fixed files" else 0 for way in WAYS}


def flagged(operation: Operation[int], flags: int) -> Operation[int]:
    """Add *flags* to those of *operation*; even if there are none, so that all take as long."""
    opcode, others, *rest = operation.sqe
    operation.sqe = (opcode, others | flags, *rest)  # type: ignore[assignment]
    operation.acts_on_fd = False  # else the I/O manager would take a slot for an fd
    return operation


def register(fds: list[int]) -> list[int]:
    """Make *fds* fixed files of this run's ring, and return their indexes."""
    manager = current_io_manager()
    assert isinstance(manager, UringIOManager)
    pin = ffi.from_buffer("char[]", array("i", fds))
    manager.ring.register(RegisterOpcode.FILES, pin, len(fds))
    return list(range(len(fds)))


async def exchange(left: int, right: int, count: int, way: str) -> None:
    flags = FLAGS[way]
    data, buffer = bytes(SIZE), bytearray(SIZE)
    for _ in range(count):
        await perform(flagged(operations.send(left, data), flags))
        assert await perform(flagged(operations.recv(right, buffer), flags)) == SIZE


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(way: str, messages: int, pairs: int) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        sockets = [sock for _ in range(pairs) for sock in socket.socketpair()]
        ends = [sock.fileno() for sock in sockets]
        if way == "fixed files":
            ends = register(ends)
        begin, cpu = time.perf_counter(), cpu_seconds()
        async with trio.open_nursery() as nursery:
            for left, right in zip(ends[::2], ends[1::2], strict=True):
                nursery.start_soon(exchange, left, right, messages // pairs, way)
        elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
        for sock in sockets:
            sock.close()
        return elapsed, cpu

    elapsed, cpu = trio_uring.run(main, ring=CONFIGS[way])
    return _measure.Sample(rate=messages / elapsed, cpu_us=cpu / messages * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for pairs in options.pairs:
        variants = {way: partial(measure, way, options.messages, pairs) for way in WAYS}
        samples = _measure.interleave(variants, options.rounds)
        _measure.report(f"Messages of {SIZE} bytes, {pairs} at once", samples, "fds")


if __name__ == "__main__":
    main()
