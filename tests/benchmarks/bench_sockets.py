"""Socket programs on Trio, on trio_uring, and on the event loops of asyncio: CPU per operation.

What is measured runs in a process of its own: a server under load, or a client of a server that is
not measured. Its CPU time is that of the whole process, threads and kernel workers included. Each
round measures every system once, in a fresh process, and a ratio is to plain Trio (for AnyIO's
programs, to AnyIO on Trio) in the same round. Printed are medians, and the least and the greatest.

    python bench_sockets.py [WORKLOAD ...] [--short] [--systems trio,trio_uring] [--rounds 5]
        [--markdown FILE] [--json FILE] [--plot DIRECTORY]

A system or a program that is not installed is named and left out. Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import platform
import resource
import select
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import _measure
import _peers
import _report
import _socket_load
import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Measure = Callable[["System", int], _measure.Sample]

HERE = Path(__file__).parent
BASELINE = "trio"

ROUNDS = 5
SHORT_ROUNDS = 3
SHORT_SHARE = 4  # a short round is a quarter of a round
SMOKE_OPERATIONS = 32
SMOKE_CONNECTIONS = 8
WARM_UP_SHARE = 10

ANSWER_SECONDS = 60.0  # for a program that has not answered then, something is wrong
SLEEPY_SECONDS = 0.005  # until a program without work sleeps
LAST_WORDS_SECONDS = 2.0  # for a program that fails to say why

# Whoever must not write bytecode compiles everything at each start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in {
    "PYTHONDONTWRITEBYTECODE", "TRIO_URING", "TRIO_URING_ENGINE"
}}  # fmt: skip


# ---- Systems -------------------------------------------------------------------------------


@attrs.frozen
class System:
    """Where a program runs: the module's name, and what chooses a way to use it."""

    name: str
    module: str
    environment: dict[str, str] = attrs.Factory(dict)

    @property
    def is_trio(self) -> bool:
        return self.module in {"trio", "trio_uring"}

    def missing(self) -> str | None:
        """Return why it cannot be measured here."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
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


SYSTEMS = {
    system.name: system
    for system in (
        System("trio", "trio"),
        System("trio_uring", "trio_uring", {"TRIO_URING_ENGINE": "native"}),
        System("python engine", "trio_uring", {"TRIO_URING_ENGINE": "python"}),
        System("asyncio", "asyncio"),
        System("uvloop", "uvloop"),
        System("zloop", "zloop", {"ZLOOP_IO_URING": "completion"}),
        System("blazio", "blazio"),
    )
}


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
    """Perform some operations to warm up, then *operations*, and measure those.

    The program is killed before the connections of the load end, so no error handling is measured.
    """
    perform(max(1, operations // WARM_UP_SHARE))
    cpu, own = program.cpu_seconds(), time.process_time()
    seconds = perform(operations)
    cpu, own = program.cpu_seconds() - cpu, time.process_time() - own
    program.kill()
    return _measure.Sample(
        operations / seconds, cpu / operations * 1e6, {"load": own / seconds, "cpu": cpu / seconds}
    )


# ---- Servers -------------------------------------------------------------------------------


@attrs.frozen
class Echo:
    """Messages of one size, one at a time on each connection, and not on more than *active*."""

    connections: int
    size: int
    active: int | None = None
    kind: str | None = None
    program: str = "echo"

    def __call__(self, system: System, operations: int) -> _measure.Sample:
        with started(system, self.kind, self.program) as server:
            return exchange(server, self, operations)


@attrs.frozen
class EchoTLS(Echo):
    def __call__(self, system: System, operations: int) -> _measure.Sample:
        authority = importlib.import_module("trustme").CA()
        with tempfile.TemporaryDirectory() as directory:
            certificate = str(Path(directory, "server.pem"))
            authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
                certificate
            )
            context = ssl.create_default_context()
            authority.configure_trust(context)
            with started(system, self.kind, "echo_tls", certificate) as server:
                return exchange(server, self, operations, context)


def exchange(
    server: Program, echo: Echo, operations: int, tls: ssl.SSLContext | None = None
) -> _measure.Sample:
    message = b"x" * echo.size
    with _socket_load.connected(int(server.read()), echo.connections, tls) as connections:
        # Whatever is only there after the first message, is.
        _socket_load.exchange(connections, message, echo.size, echo.connections)
        return sample(
            server,
            operations,
            lambda count: _socket_load.exchange(
                connections, message, echo.size, count, echo.active
            ),
        )


@attrs.frozen
class Storm:
    in_flight: int

    def __call__(self, system: System, operations: int) -> _measure.Sample:
        with started(system, None, "answer_once") as server:
            port = int(server.read())
            return sample(
                server, operations, lambda count: _socket_load.storm(port, count, self.in_flight)
            )


@attrs.frozen
class Datagrams:
    clients: int
    size: int

    def __call__(self, system: System, operations: int) -> _measure.Sample:
        with started(system, None, "echo_datagrams") as server:
            port = int(server.read())
            return sample(
                server,
                operations,
                lambda count: _socket_load.datagrams(port, self.size, count, self.clients),
            )


@attrs.frozen
class Http:
    connections: int

    def __call__(self, system: System, operations: int) -> _measure.Sample:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with (
            socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
            started(
                system, None, "serve_http", listener.fileno(), inherit=listener.fileno()
            ) as server,
        ):
            server.read()
            port = listener.getsockname()[1]
            size = _socket_load.http_answer_size(port, request)
            with _socket_load.connected(port, self.connections) as connections:
                return sample(
                    server,
                    operations,
                    lambda count: _socket_load.exchange(connections, request, size, count),
                )


@attrs.frozen
class Flood:
    """All connections send as much as they can, for some seconds; an operation is a KiB received.

    Fairness shows only when each connection could be served some dozen times. So the seconds are
    the same in a short round.
    """

    connections: int
    seconds: float
    receive_size: int = 1024
    send_size: int = 16384

    def __call__(self, system: System, _operations: int) -> _measure.Sample:
        arguments = (self.receive_size, self.send_size)
        with started(system, None, "receive_all", *arguments) as server:
            port = int(server.read())
            with _socket_load.connected(port, self.connections) as connections:
                for connection in connections:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_size)
                self._wait_for_accepts(server)
                # Every socket is full before anything is counted.
                chunk = bytes(self.send_size)
                _socket_load.flood(connections, chunk, self.seconds / 2)
                before, cpu = json.loads(server.ask("counts")), server.cpu_seconds()
                own = time.process_time()
                elapsed = _socket_load.flood(connections, chunk, self.seconds)
                cpu, own = server.cpu_seconds() - cpu, time.process_time() - own
                after = json.loads(server.ask("counts"))
                server.kill()
        served = [new - old for old, new in zip(before, after, strict=True)]
        mean = statistics.mean(served)
        if not mean:
            raise ProgramFailedError("it received nothing")
        other = {
            "load": own / elapsed,
            "cpu": cpu / elapsed,
            "least": min(served) / mean,
            "greatest": max(served) / mean,
        }
        kib = sum(served) / 1024
        return _measure.Sample(kib / elapsed, cpu / kib * 1e6, other)

    def _wait_for_accepts(self, server: Program) -> None:
        end = time.monotonic() + _socket_load.PATIENCE
        while len(json.loads(server.ask("counts"))) < self.connections:
            if time.monotonic() > end:
                raise ProgramFailedError("it does not accept all connections")
            time.sleep(0.01)


# ---- Clients, and programs without sockets -------------------------------------------------


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


@attrs.frozen
class Client:
    program: str
    tasks: int

    def __call__(self, system: System, operations: int) -> _measure.Sample:
        # Whole turns of every task, or more was counted than done.
        turn = 2 * self.tasks
        with (
            SERVERS[self.program]() as port,
            started(system, "anyio", self.program, port, self.tasks) as client,
        ):
            return sample(
                client,
                operations - operations % turn,
                lambda count: perform(client, count - count % turn),
            )


@contextmanager
def redis_server() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "ready to accept connections" in line.lower():
                    break
            yield port
        finally:
            process.kill()


SERVERS = {"redis": redis_server, "http": _peers.http_server}

IMPORT = """
import sys, time
begin = time.process_time()
import {module}
print(time.process_time() - begin)
"""

FIRST_RUN = """
import sys, time
import {module}
async def nothing(): pass
begin = time.process_time()
{run}
print(time.process_time() - begin)
"""


@attrs.frozen
class Once:
    """What is done once in a process, measured in one or more of them."""

    source: str

    def __call__(self, system: System, operations: int) -> _measure.Sample:
        run = f"{system.module}.run(nothing)"
        if not system.is_trio:
            run = f"{system.module}.new_event_loop().run_until_complete(nothing())"
        source = self.source.format(module=system.module, run=run)
        begin = time.perf_counter()
        cpu = statistics.median(
            float(
                subprocess.run(
                    [sys.executable, "-c", source],
                    env=ENVIRONMENT | system.environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                ).stdout
            )
            for _ in range(operations)
        )
        return _measure.Sample(operations / (time.perf_counter() - begin), cpu * 1e6)


# ---- Workloads -----------------------------------------------------------------------------


@attrs.frozen
class Workload:
    name: str
    title: str
    operations: int
    measure: Measure
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Return what it needs and does not find."""
        for name in self.needs:
            if importlib.util.find_spec(name) is None and shutil.which(name) is None:
                return f"{name} is not installed"
        connections = getattr(self.measure, "connections", 0)
        if connections + 100 > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
            return f"a process may not open {connections} files"
        return None

    def for_smoke(self) -> Workload:
        """Return a very small one of it."""
        measure = self.measure
        if isinstance(measure, Echo | Http | Flood):
            measure = attrs.evolve(measure, connections=min(measure.connections, SMOKE_CONNECTIONS))
        if isinstance(measure, Flood):
            measure = attrs.evolve(measure, seconds=0.1)
        if isinstance(measure, Client):
            measure = attrs.evolve(measure, tasks=min(measure.tasks, 4))
        operations = 1 if isinstance(measure, Once) else SMOKE_OPERATIONS
        return attrs.evolve(self, measure=measure, operations=operations)


GROWTH = (1, 10, 100, 1000, 10_000)  # connections

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("echo-1", "TCP echo, 1 × 64 B", 20_000, Echo(1, 64)),
        Workload("echo-64", "TCP echo, 64 × 64 B", 100_000, Echo(64, 64)),
        Workload("echo-512", "TCP echo, 512 × 64 B", 100_000, Echo(512, 64)),
        Workload(
            "echo-5000", "TCP echo, 5,000 × 64 B, 50 active", 60_000, Echo(5000, 64, active=50)
        ),
        Workload("echo-16k", "TCP echo, 64 × 16 KiB", 40_000, Echo(64, 16384)),
        Workload(
            "socket-64",
            "TCP echo through sockets, 64 × 64 B",
            100_000,
            Echo(64, 64, program="echo_sockets"),
        ),
        Workload("storm", "connect, a byte each way, close; 32 at once", 12_000, Storm(32)),
        Workload("udp", "UDP request and response, 32 × 64 B", 60_000, Datagrams(32, 64)),
        Workload("tls", "TLS echo, 64 × 1 KiB", 30_000, EchoTLS(64, 1024), ("trustme",)),
        Workload(
            "anyio", "AnyIO's TCP echo, 64 × 64 B", 60_000, Echo(64, 64, kind="anyio"), ("anyio",)
        ),
        Workload("yields", "one task that yields", 200_000, Performs("yields")),
        Workload("empty-run", "an empty run()", 400, Performs("empty_runs")),
        Workload("first-run", "the first run() of a process", 5, Once(FIRST_RUN)),
        Workload("import", "import", 5, Once(IMPORT)),
        *(
            Workload(
                f"redis-{tasks}",
                f"Redis client (coredis), tasks: {tasks}",
                8000,
                Client("redis", tasks),
                ("anyio", "coredis", "redis-server"),
            )
            for tasks in (1, 32)
        ),
        *(
            Workload(
                f"httpx-{tasks}",
                f"HTTP client (httpx), tasks: {tasks}",
                4000,
                Client("http", tasks),
                ("anyio", "httpx"),
            )
            for tasks in (1, 32)
        ),
        Workload(
            "hypercorn",
            "Hypercorn and Starlette, JSON, 32 connections",
            8000,
            Http(32),
            ("hypercorn", "starlette"),
        ),
        *(
            Workload(
                f"growth-{connections}",
                f"growth: TCP echo, {connections:,} × 64 B",
                60_000 if connections > 1 else 20_000,
                Echo(connections, 64),
            )
            for connections in GROWTH
        ),
        Workload(
            "busy-1000", "1,000 connections that always send, by KiB", 0, Flood(1000, seconds=1)
        ),
        Workload(
            "busy-10000", "10,000 connections that always send, by KiB", 0, Flood(10_000, seconds=4)
        ),
    )
}


# ---- All of it -----------------------------------------------------------------------------


def main() -> None:
    options = parsed_options()
    if options.list:
        print(*WORKLOADS, sep="\n")
        return
    allow_files()
    systems = present(SYSTEMS[name] for name in options.systems.split(","))
    results = _report.Results([system.name for system in systems], BASELINE, machine())
    for name in options.workloads or WORKLOADS:
        workload, rounds = scaled(WORKLOADS[name], options)
        if reason := workload.missing():
            print(f"\n{workload.title}: left out, {reason}")
            results.left_out[name] = reason
            continue
        samples = measured(workload, systems, rounds, results.left_out)
        results.add(name, workload.title, samples)
        _measure.report(workload.title, samples, BASELINE)
        for system, (least, greatest) in results.shares(name).items():
            print(f"{system:26} a connection was served {least:.2f} to {greatest:.2f} of the mean")
        # Whatever was measured is kept, should the rest fail.
        if options.json:
            results.write_json(options.json)
    if options.markdown:
        options.markdown.write_text(results.markdown())
    if options.plot:
        importlib.import_module("_plots").write(results, options.plot)


def measured(
    workload: Workload, systems: list[System], rounds: int, left_out: dict[str, str]
) -> dict[str, list[_measure.Sample]]:
    """Measure the systems in turns, A B A B. A peer that cannot do it is left out, with a word."""
    samples: dict[str, list[_measure.Sample]] = {system.name: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            if system.name not in samples:
                continue
            try:
                found = workload.measure(system, workload.operations)
            except ProgramFailedError as exc:
                if system.is_trio:
                    raise
                print(f"\n{workload.title}: {system.name} left out, {exc}")
                left_out[f"{workload.name}, {system.name}"] = str(exc)
                del samples[system.name]
            else:
                samples[system.name].append(found)
    return samples


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"Workloads: {', '.join(WORKLOADS)}. Systems: {', '.join(SYSTEMS)}.",
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: all")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="separated by commas")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--short", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--smoke", action="store_true", help="only try it: a few operations each")
    parser.add_argument("--list", action="store_true", help="only print the workloads' names")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table of ratios")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--plot", type=Path, metavar="DIRECTORY", help="write plots as SVG")
    options = parser.parse_args()
    if unknown := {*options.workloads} - {*WORKLOADS}:
        parser.error(f"no such workloads: {', '.join(sorted(unknown))}")
    if unknown := {*options.systems.split(",")} - {*SYSTEMS}:
        parser.error(f"no such systems: {', '.join(sorted(unknown))}")
    if BASELINE not in options.systems.split(","):
        parser.error(f"the ratios are to {BASELINE}, so it must be among the systems")
    return options


def scaled(workload: Workload, options: argparse.Namespace) -> tuple[Workload, int]:
    """Return the workload as large as the options ask for, and how many rounds of it."""
    if options.smoke:
        return workload.for_smoke(), options.rounds or 1
    if options.short:
        operations = max(1, workload.operations // SHORT_SHARE)
        return attrs.evolve(workload, operations=operations), options.rounds or SHORT_ROUNDS
    return workload, options.rounds or ROUNDS


def allow_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def present(systems: Iterator[System]) -> list[System]:
    """Return those that can be measured, and say why the others cannot."""
    found = []
    for system in systems:
        if reason := system.missing():
            print(f"{system.name}: left out, {reason}")
        else:
            found.append(system)
    return found


def machine() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    kernel = ".".join(os.uname().release.split(".")[:2])
    return f"Linux {kernel}, {os.cpu_count()} cores, {platform.python_implementation()} {version}"


if __name__ == "__main__":
    main()
