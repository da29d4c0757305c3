"""Programs under measurement. Each runs in a process of its own, on one of several systems."""

from __future__ import annotations

import functools
import importlib.util
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import _measure
import _peers
import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent

WARM_UP_SHARE = 10

ANSWER_SECONDS = 60.0  # for a program that has not answered then, something is wrong
SLEEPY_SECONDS = 0.005  # until a program without work sleeps
LAST_WORDS_SECONDS = 2.0  # for a program that fails to say why
PATIENCE_SECONDS = 30  # until a program that is to end is killed

# Whoever must not write bytecode compiles everything at each start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in {
    "PYTHONDONTWRITEBYTECODE", "TRIO_URING", "TRIO_URING_ENGINE"
}}  # fmt: skip


def not_installed(names: tuple[str, ...]) -> str | None:
    """Say which of some modules and commands is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None and shutil.which(name) is None:
            return f"{name} is not installed"
    return None


# ---- Systems -------------------------------------------------------------------------------


@attrs.frozen
class System:
    """Where a program runs: the module's name, what chooses a way to use it, what else it needs."""

    name: str
    module: str
    environment: dict[str, str] = attrs.Factory(dict)
    needs: tuple[str, ...] = ()

    @property
    def is_trio(self) -> bool:
        return self.module in {"trio", "trio_uring"}

    def missing(self) -> str | None:
        """Return why it cannot be measured here."""
        if reason := not_installed((self.module, *self.needs)):
            return reason
        if self.module != "trio_uring":
            return None
        program = [sys.executable, HERE / "_trio_programs.py", self.module, "empty_runs"]
        tried = subprocess.run(
            program,
            env=ENVIRONMENT | self.environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else None


# ---- A program under measurement -----------------------------------------------------------


class ProgramFailedError(Exception):
    """With the last line of what it said about that."""


class Program:
    """A process whose CPU time can be read at any time."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process = process
        self._errors = errors
        self._clock = _peers.cpu_clock(process.pid)

    def read(self) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        if not ready:
            raise ProgramFailedError("it hangs")
        line = self._process.stdout.readline()
        if not line:
            raise ProgramFailedError(self.last_error())
        return line

    def last_error(self) -> str:
        """Return the last line that it wrote to the standard error, if it ends by itself."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS_SECONDS)
        self._errors.seek(0)
        # The traceback of an exception group has a frame.
        lines = [line.strip(" |+-") for line in self._errors.read().splitlines()]
        return next((line for line in reversed(lines) if line), "")

    def ask(self, what: object) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.read()

    def cpu_seconds(self) -> float:
        """Return the sum that getrusage(2) divides into user and system time.

        The kernel adds up what a thread used when the thread falls asleep, and at clock ticks.
        """
        time.sleep(SLEEPY_SECONDS)
        return time.clock_gettime(self._clock)

    def finish(self) -> None:
        """Let it end by itself, which the end of its input asks for."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def started(
    system: System, kind: str | None, program: str, *arguments: object, inherit: int | None = None
) -> Iterator[Program]:
    """Start a program of `_trio_programs.py` or its like, and kill it at the end."""
    kind = kind or ("trio" if system.is_trio else "asyncio")
    command = [sys.executable, str(HERE / f"_{kind}_programs.py"), system.module, program]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*command, *map(str, arguments)],
            env=ENVIRONMENT | system.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            pass_fds=() if inherit is None else (inherit,),
        ) as process,
    ):
        running = Program(process, errors)
        try:
            yield running
        except OSError as exc:
            raise ProgramFailedError(running.last_error() or repr(exc)) from exc
        finally:
            running.kill()


def sample(program: Program, operations: int, perform: Callable[[int], float]) -> _measure.Sample:
    """Perform some operations to warm up, then *operations*, and measure those."""
    return sample_counted(program, operations, lambda count: (count, perform(count)))


def sample_counted(
    program: Program, amount: int, perform: Callable[[int], tuple[int, float]]
) -> _measure.Sample:
    """The same where *perform* says how many operations it was, and how many seconds.

    The program is killed before the connections of the load end, so no error handling is measured.
    """
    perform(max(1, amount // WARM_UP_SHARE))
    cpu, own = program.cpu_seconds(), time.process_time()
    count, seconds = perform(amount)
    cpu, own = program.cpu_seconds() - cpu, time.process_time() - own
    program.kill()
    return _measure.Sample(
        count / seconds, cpu / count * 1e6, {"load": own / seconds, "cpu": cpu / seconds}
    )


@attrs.frozen
class Performs:
    """A program that performs as many operations as it is told to."""

    program: str

    def __call__(self, system: System, operations: int) -> _measure.Sample:
        with started(system, None, self.program) as program:
            return sample(program, operations, functools.partial(perform, program))


def perform(program: Program, count: int) -> float:
    begin = time.perf_counter()
    assert program.ask(count) == "done\n"
    return time.perf_counter() - begin
