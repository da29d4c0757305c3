"""Sockets, pipes, files and programs for minutes or hours, with cancels, closes and resets.

A process for each engine and each kind of ring, all at once, does everything that `_streams.py` and
`_programs.py` list. It hashes every byte. This program prints a table of what they did, and fails
if one of them lost a byte, an fd or a task, or if its memory grew.

    python soak.py [MINUTES] [--rings default,sqpoll] [--engines native] [--seed N]
        [--plot FILE.svg] [--json FILE]

Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any, Final

import attrs
from _process import VARIANTS

ENGINES: Final = ("native", "python")

# A sample comes each second. Twelve processes share a machine's cores, perhaps with others.
SILENCE_SECONDS: Final = 600
LAST_ROUNDS_SECONDS: Final = 900

# Resident memory at the end, compared with that after a quarter of the time. Heaps fragment, and
# the largest messages meet each other by chance; a leak of 100 bytes a round is more than this.
GROWTH_BYTES_MAX: Final = 8 << 20
GROWTH_SHARE_MAX: Final = 0.05
SAMPLES_MIN: Final = 120  # to judge by

MIB: Final = 1 << 20


class Process:
    """A process of the soak, its samples, and why it failed, if it did."""

    def __init__(self, engine: str, ring: str, seed: int, seconds: float) -> None:
        self.name = f"{engine}, {ring}"
        self.samples: list[dict[str, Any]] = []
        self.total: dict[str, Any] = {}
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._child = subprocess.Popen(
            [
                *(sys.executable, Path(__file__).with_name("_process.py"), ring),
                *("--seed", str(seed), "--seconds", str(seconds)),
            ],
            env=os.environ | {"TRIO_URING_ENGINE": engine},
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._end = time.monotonic() + seconds + LAST_ROUNDS_SECONDS
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._heard = time.monotonic()
        self.failure = ""

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)

    def look(self) -> bool:
        """Take what it printed; end it if it hangs. Return whether it runs."""
        ended = self._child.poll() is not None
        if ended:
            self._reader.join()
        self._take_lines()
        if ended:
            if self._child.returncode and not self.failure:
                self.failure = self._last_words() or f"exit status {self._child.returncode}"
            elif not self.total:
                self.failure = self.failure or "it ended without saying what it did"
        elif time.monotonic() > min(self._end, self._heard + SILENCE_SECONDS):
            self.failure = "it hung"
            self._child.send_signal(signal.SIGUSR1)  # it prints where
            time.sleep(1)
            self._child.kill()
        return not ended

    def _take_lines(self) -> None:
        while not self._lines.empty():
            self._heard = time.monotonic()
            found = json.loads(self._lines.get())
            if "seconds" in found:
                self.samples.append(found)
            else:
                self.total = found

    def _last_words(self) -> str:
        return self.errors().strip().rpartition("\n")[2].lstrip(" |")

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def growth(self) -> tuple[float, float]:
        """Return the resident memory of the second quarter and of the last, as medians."""
        quarter = len(self.samples) // 4
        if not quarter:
            return 0, 0
        resident = [sample["rss"] for sample in self.samples]
        return (
            statistics.median(resident[quarter : 2 * quarter]),
            statistics.median(resident[-quarter:]),
        )

    def judge(self) -> None:
        """Note as failure that memory grew."""
        before, after = self.growth()
        allowed = max(GROWTH_BYTES_MAX, GROWTH_SHARE_MAX * before)
        if len(self.samples) >= SAMPLES_MIN and after - before > allowed and not self.failure:
            self.failure = f"memory grew from {before / MIB:.0f} to {after / MIB:.0f} MiB"


# --- What was found -------------------------------------------------------------------------


@attrs.frozen
class Column:
    title: str
    width: int
    cell: Any  # from a Process to what is printed


def greatest(what: str) -> Any:
    return lambda process: max((sample[what] for sample in process.samples), default=0)


def percentiles(what: str) -> Any:
    """Return p50, p99 and the greatest, in milliseconds."""

    def cell(process: Process) -> str:
        found = sorted(each for sample in process.samples for each in sample[what])
        if not found:
            return "–"
        chosen = (found[len(found) // 2], found[len(found) * 99 // 100], found[-1])
        return " / ".join(f"{1000 * each:.1f}" for each in chosen)

    return cell


COLUMNS: Final = [
    Column("rounds", 9, greatest("rounds")),
    Column("cancels", 9, greatest("cancelled")),
    Column("MiB", 8, lambda process: greatest("bytes")(process) // MIB),
    Column("RSS MiB", 16, lambda p: " → ".join(f"{each / MIB:.1f}" for each in p.growth())),
    Column("fds", 5, greatest("fds")),
    Column("threads", 8, greatest("threads")),
    Column("in flight", 11, greatest("in_flight")),
    Column("echo ms p50/p99/max", 26, percentiles("echo")),
    Column("timer late ms p50/p99/max", 27, percentiles("timer")),
]


def table(processes: list[Process]) -> str:
    heads = [f"{column.title:>{column.width}}" for column in COLUMNS]
    lines = [f"{'engine, ring':26}{''.join(heads)}  "]
    for process in processes:
        cells = [f"{column.cell(process)!s:>{column.width}}" for column in COLUMNS]
        lines.append(f"{process.name:26}{''.join(cells)}  {process.failure or 'nothing lost'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("minutes", type=float, nargs="?", default=10)
    parser.add_argument("--rings", default=",".join(VARIANTS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{options.minutes} minutes, seed {options.seed}", flush=True)
    processes = [
        Process(engine, ring, options.seed, 60 * options.minutes)
        for engine in options.engines.split(",")
        for ring in options.rings.split(",")
    ]
    running = processes
    while running:
        time.sleep(0.1)
        running = [process for process in running if process.look()]
    for process in processes:
        process.judge()
    print(table(processes))
    if options.json:
        found = {process.name: process.samples for process in processes}
        options.json.write_text(json.dumps(found), encoding="utf-8")
    if options.plot:
        importlib.import_module("_plot").write(processes, options.plot)
    failed = [process for process in processes if process.failure]
    for process in failed:
        print(f"\n{process.name}: {process.failure}\n{process.errors()}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
