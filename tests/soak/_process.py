"""One process of a soak: all workloads at once, on one engine and one kind of ring.

It prints a sample as a line of JSON each second, and fails if a byte, an fd or a task is lost.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import resource
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Final

import _programs
import _streams
import anyio
import trio
from _load import Load, LostError

import trio_uring
from trio_uring import RingConfig, SQPoll

VARIANTS: Final = {
    "default": RingConfig(require=True),
    # Its CQ overflows all the time.
    "8 entries": RingConfig(require=True, entries=8, completion_entries=8),
    "sqpoll": RingConfig(require=True, sqpoll=SQPoll(idle=0.001)),
    "one buffer": RingConfig(require=True, receive_buffers=1),
    "one file operation": RingConfig(
        require=True, max_file_operations=1, bounded_workers=1, unbounded_workers=1
    ),
    "anyio": RingConfig(require=True),
}

SHORT_RUNS: Final = 3  # before the long one, so that runs end and begin, too
SHORT_SECONDS: Final = 2.0
SAMPLE_SECONDS: Final = 1.0
PROBE_SECONDS: Final = 0.02
TIMER_SECONDS: Final = 0.001


async def run_all(load: Load, *, probing: bool) -> None:
    """Run all workloads to their end. Nothing may be in flight then."""
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        directory = Path(name)
        async with trio.open_nursery() as measuring:
            measuring.start_soon(load.tick_repeatedly)
            if probing:
                measuring.start_soon(probe_echo, load)
                measuring.start_soon(probe_timer, load)
                measuring.start_soon(sample_repeatedly, load)
            async with trio.open_nursery() as nursery:
                for workload in (
                    *(_streams.tcp, _streams.accepted_in_bulk, _streams.tls),
                    *(_streams.passed_fds, _streams.udp, _streams.pipes),
                    *(_programs.subprocesses, _programs.anyio_streams),
                    partial(_programs.files, directory=directory),
                    partial(_programs.transfers, directory=directory),
                ):
                    nursery.start_soon(workload, load)
            measuring.cancel_scope.cancel()
    if in_flight := statistics().in_flight:
        raise LostError(f"{in_flight} operations are in flight after all tasks have ended")


def statistics() -> Any:
    return trio.lowlevel.current_statistics().io_statistics


# --- Measuring ------------------------------------------------------------------------------


async def probe_echo(load: Load) -> None:
    """Note how long a message and its answer take beside the workloads."""
    ours, theirs = (trio.SocketStream(sock) for sock in trio.socket.socketpair())
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(answer, theirs)
        while True:
            began = time.perf_counter()
            await ours.send_all(b"ping")
            await ours.receive_some()
            load.latencies["echo"].append(time.perf_counter() - began)
            await trio.sleep(PROBE_SECONDS)


async def answer(stream: trio.SocketStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def probe_timer(load: Load) -> None:
    """Note by how much a timer is late."""
    while True:
        began = time.perf_counter()
        await trio.sleep(TIMER_SECONDS)
        load.latencies["timer"].append(time.perf_counter() - began - TIMER_SECONDS)
        await trio.sleep(PROBE_SECONDS)


async def sample_repeatedly(load: Load) -> None:
    began = time.monotonic()
    while True:
        await trio.sleep(SAMPLE_SECONDS)
        sample = {
            "seconds": time.monotonic() - began,
            "rss": resident(),
            "fds": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "in_flight": statistics().in_flight,
            "bytes": load.bytes,
            "rounds": load.rounds.total(),
            "cancelled": load.cancelled.total(),
        }
        for what, latencies in load.latencies.items():
            sample[what] = sorted(latencies)
            latencies.clear()
        print(json.dumps(sample), flush=True)


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- Runs -----------------------------------------------------------------------------------


def soak(variant: str, seed: int, seconds: float | None, rounds: int | None) -> Load:
    """Do short runs and a long one. After each, the fds are those from before."""
    load = Load(seed, SHORT_SECONDS if rounds is None else None, 1)
    run(variant, load, probing=False)  # what is imported late is imported
    before = open_fds()
    for number in range(SHORT_RUNS if rounds is None else 1):
        run(variant, Load(seed + number, SHORT_SECONDS, 1), probing=False)
        check_fds(before)
    load = Load(seed, seconds, rounds)
    run(variant, load, probing=rounds is None)
    check_fds(before)
    return load


def run(variant: str, load: Load, *, probing: bool) -> None:
    config = VARIANTS[variant]
    main = partial(run_all, load, probing=probing)
    if variant == "anyio":
        anyio.run(main, backend="trio_uring", backend_options={"ring": config})
    else:
        trio_uring.run(main, ring=config)


def open_fds() -> Counter[str]:
    """Return what the open fds refer to, and how many to each kind of it."""
    kinds = Counter[str]()
    for fd in os.listdir("/proc/self/fd"):
        try:
            kinds[os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]] += 1
        except FileNotFoundError:  # the directory itself, while it was read
            continue
    return kinds


def check_fds(before: Counter[str]) -> None:
    gc.collect()
    after = open_fds()
    if after != before:
        raise LostError(f"fds: {after - before} appeared, {before - after} vanished")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)
    load = soak(options.variant, options.seed, options.seconds, options.rounds)
    print(json.dumps({"cancelled": load.cancelled, "rounds": load.rounds, "bytes": load.bytes}))


if __name__ == "__main__":
    main()
