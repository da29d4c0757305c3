"""Files on Trio, on trio_uring, and with other packages on the event loops of asyncio.

What is measured runs in a process of its own; its CPU time is that of the whole process, threads
and kernel workers included. Each round measures every system once, in a fresh process, and a ratio
is to plain Trio in the same round, to a limit (a synchronous loop, or a C program on raw
io_uring), or to asyncio's own `sendfile`. Printed are medians, and the least and the greatest.

    python bench_files.py [WORKLOAD ...] [--short] [--systems trio,trio_uring] [--rounds 5]
        [--directory WHERE] [--markdown FILE] [--json FILE] [--plot DIRECTORY]

A system or a program that is not installed is named and left out. The files are made in the
temporary directory unless *--directory* says where; direct I/O needs a disk. The last workloads are
not compared: they show for how long the event loop itself holds up a ticker that is due each
millisecond. Plots need matplotlib.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import _measure
import _peers
import _workloads
import attrs
from _file_steps import LARGE, MIB, SMALL_FILES, make_files
from _programs import (
    HERE,
    WARM_UP_SHARE,
    Program,
    ProgramFailedError,
    System,
    sample_counted,
    started,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import _report

LARGE_SIZE = 256 * MIB
SMOKE_LARGE_SIZE = 4 * MIB
SMOKE_MILLISECONDS = 20
SMOKE_TASKS = 4

DIRECT_READS_PER_MS = 40  # of the C program
C_PROGRAM = Path("direct_read")


# ---- Systems -------------------------------------------------------------------------------


SYSTEMS = {
    system.name: system
    for system in (
        System("trio", "trio"),
        System("trio_uring", "trio_uring", {"TRIO_URING_ENGINE": "native"}),
        System("python engine", "trio_uring", {"TRIO_URING_ENGINE": "python"}),
        System("aiofiles", "asyncio", needs=("aiofiles",)),
        System("blazio", "blazio"),
        System("uringio", "uringio"),
        System("uvloop + pyaio", "uvloop", needs=("pyaio",)),
        System("caio", "asyncio", needs=("caio",)),
        System("asyncio", "asyncio"),
        System("uvloop", "uvloop"),
        System("synchronous", "io"),
        System("C", "io", needs=("cc",)),
    )
}
RING = ("trio", "trio_uring", "python engine")
OPENS = (*RING, "aiofiles", "blazio", "uringio", "synchronous")
READS = (*OPENS, "uvloop + pyaio", "caio")
APPENDS = (*RING, "aiofiles", "uringio", "uvloop + pyaio", "caio", "synchronous")
LINES = (*RING, "aiofiles", "blazio", "synchronous")
WHOLE = (*RING, "synchronous")
HAS_OS = (*RING, "aiofiles", "synchronous")  # functions like those of `os`


# ---- Measures ------------------------------------------------------------------------------


@attrs.frozen
class Files:
    """Some tasks that each do the same with files over and over."""

    program: str
    tasks: int = 1

    def __call__(self, system: System, milliseconds: int) -> _measure.Sample:
        with self.started(system) as program:
            return sample_counted(program, milliseconds, lambda time: perform(program, time))

    @contextmanager
    def started(self, system: System, *arguments: object) -> Iterator[Program]:
        given: tuple[object, ...] = (self.tasks, *arguments)
        if system.is_trio:
            kind = "trio_file"
        elif system.name == "synchronous":
            kind, given = "sync_file", ()
        else:
            kind, given = "asyncio_file", (system.name, *given)
        with started(system, kind, self.program, *given) as program:
            yield program


def perform(program: Program, milliseconds: int) -> tuple[int, float]:
    count, seconds = program.ask(milliseconds / 1000).split()
    return int(count), float(seconds)


@attrs.frozen
class SendFile(Files):
    def __call__(self, system: System, milliseconds: int) -> _measure.Sample:
        with _peers.receiver() as port, self.started(system, port) as program:
            return sample_counted(program, milliseconds, lambda time: perform(program, time))


@attrs.frozen
class Direct(Files):
    def __call__(self, system: System, milliseconds: int) -> _measure.Sample:
        if system.name != "C":
            return super().__call__(system, milliseconds)
        if not C_PROGRAM.exists():
            source = HERE / "direct_read.c"
            subprocess.run(["cc", "-O2", "-o", C_PROGRAM, source], check=True)
        numbers = (LARGE.stat().st_size, self.tasks, milliseconds * DIRECT_READS_PER_MS)
        done = subprocess.run(
            [C_PROGRAM.absolute(), LARGE, *map(str, numbers), str(random.getrandbits(24))],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ProgramFailedError(done.stderr.strip())
        rate, cpu_us = map(float, done.stdout.split())
        return _measure.Sample(rate, cpu_us)


@attrs.frozen
class Ticks:
    """A ticker beside a load: the rate is ticks, and the CPU time is the 99th percentile."""

    load: str

    def __call__(self, system: System, milliseconds: int) -> _measure.Sample:
        with started(system, "tick", self.load) as program:
            # What is done only once, at first, takes milliseconds.
            program.ask(milliseconds / 1000 / WARM_UP_SHARE)
            answer = program.ask(milliseconds / 1000)
            ticks, seconds, held_up, late = map(float, answer.split())
            program.finish()  # if it were killed, its file server's mount would stay
        return _measure.Sample(ticks / seconds, held_up * 1e6, {"late_p99_ms": late * 1e3})


# ---- Workloads -----------------------------------------------------------------------------


@attrs.frozen
class FileWorkload(_workloads.Workload):
    compared: _report.Compared = "rate"

    def for_smoke(self) -> FileWorkload:
        """Return a very small one of it."""
        measure = self.measure
        if isinstance(measure, Files):
            measure = attrs.evolve(measure, tasks=min(measure.tasks, SMOKE_TASKS))
        return attrs.evolve(self, measure=measure, amount=SMOKE_MILLISECONDS)


@attrs.frozen
class DirectWorkload(FileWorkload):
    def missing(self) -> str | None:
        """Say why there is no direct I/O."""
        try:
            os.close(os.open(LARGE, os.O_RDONLY | os.O_DIRECT))
        except OSError as exc:
            return f"the directory is on a file system without O_DIRECT, {exc}"
        return super().missing()


@attrs.frozen
class ServerWorkload(FileWorkload):
    def missing(self) -> str | None:
        """Say why no file system can be mounted."""
        if os.geteuid() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
            return "this user may not mount a file system of FUSE"
        return super().missing()


def tasks_text(tasks: int) -> str:
    return "1 task" if tasks == 1 else f"{tasks} tasks"


def grown(
    name: str, title: str, program: str, systems: tuple[str, ...], *numbers: int
) -> Iterator[FileWorkload]:
    """Yield a workload for each number of tasks."""
    for tasks in numbers:
        yield FileWorkload(
            f"{name}-{tasks}",
            f"{title}, {tasks_text(tasks)}",
            1000,
            Files(program, tasks),
            systems=systems,
        )


WORKLOADS: dict[str, FileWorkload] = {
    workload.name: workload
    for workload in (
        *grown("read", "seek + read 4 KiB, cached", "read", READS, 1, 32, 128),
        *grown("positional", "read 4 KiB at an offset, cached", "read_at", READS, 1, 32, 128),
        FileWorkload(
            "batch-64",
            "64 reads of 4 KiB in one call, cached",
            1000,
            Files("read_batch"),
            baseline="synchronous",
            systems=("trio_uring", "python engine", "synchronous"),
        ),
        *grown("lines", "async for line", "lines", LINES, 1, 32),
        *grown("small", "open + read + close, 4 KiB files", "open_read_close", OPENS, 1, 64),
        *grown("bytes", "Path.read_bytes, 4 KiB files", "read_bytes", WHOLE, 1, 64),
        *grown("stat", "Path.stat", "stat", HAS_OS, 1, 32),
        *grown("exists", "Path.exists of a missing file", "exists", HAS_OS, 1, 32),
        *grown("iterdir", f"iterdir of {SMALL_FILES:,}, by entry", "iterdir", HAS_OS, 1),
        *grown("append", "append 4 KiB + fdatasync", "append", APPENDS, 1, 16),
        *grown("mkdir", "Path.mkdir + rmdir", "mkdir_rmdir", RING, 1, 32),
        *grown("write", "Path.write_bytes + unlink, 4 KiB", "write_unlink", RING, 1, 32),
        *grown("checkpoint", "a bare checkpoint", "checkpoints", RING, 1, 32),
        *(
            attrs.evolve(workload, needs=("anyio",))
            for workload in (
                *grown(
                    "anyio-read", "AnyIO: seek + read 4 KiB, cached", "anyio_read",
                    (*RING, "asyncio", "uvloop"), 1, 32,
                ),
                *grown(
                    "anyio-iterdir", f"AnyIO: iterdir of {SMALL_FILES:,}, by entry",
                    "anyio_iterdir", (*RING, "asyncio", "uvloop"), 1,
                ),
            )
        ),
        *(
            DirectWorkload(
                name,
                f"O_DIRECT, 32 tasks: {title}",
                1000,
                Direct(program, 32),
                baseline="C",
                systems=(*RING, "C"),
            )
            for name, title, program in (
                ("direct", "read_at", "read_direct"),
                ("leased", "with a lease", "read_leased"),
            )
        ),
        FileWorkload(
            "send-file",
            "64 MiB file to a socket, by MiB",
            1000,
            SendFile("send_file"),
            baseline="asyncio",
            systems=(*RING, "asyncio"),
            compared="CPU",
        ),
        *(
            (ServerWorkload if load == "slow_server" else FileWorkload)(
                f"ticks-{load.partition('_')[0]}",
                f"a 1 ms ticker beside {title}",
                4000,
                Ticks(load),
                systems=RING,
                compared="ticks",
            )
            for load, title in (
                ("nothing", "nothing"),
                ("large", "reads of 64 MiB"),
                ("text", "reads of 64 MiB of text"),
                ("cached", "32 tasks that read cached files"),
                ("slow_server", "a FUSE server that takes 400 ms"),
            )
        ),
        # At the end, because it removes from the page cache what the others read.
        *grown("cold", "seek + read 4 KiB, not cached", "read_cold", RING, 1, 32),
    )
}  # fmt: skip


# ---- All of it -----------------------------------------------------------------------------


def main() -> None:
    parser = _workloads.option_parser(__doc__ or "", WORKLOADS, SYSTEMS)
    parser.add_argument("--directory", help="where to make the files")
    options = _workloads.parsed_options(parser, WORKLOADS, SYSTEMS)
    if options.list:
        print(*WORKLOADS, sep="\n")
        return
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory))
        stack.callback(os.chdir, Path.cwd())
        os.chdir(name)
        make_files(SMOKE_LARGE_SIZE if options.smoke else LARGE_SIZE)
        _workloads.measure_all("files", options, WORKLOADS, SYSTEMS)


if __name__ == "__main__":
    main()
