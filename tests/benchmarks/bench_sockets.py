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

import importlib
import importlib.util
import json
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import _measure
import _peers
import _socket_load
import _workloads
import attrs
from _programs import (
    ENVIRONMENT,
    Performs,
    Program,
    ProgramFailedError,
    System,
    perform,
    sample,
    started,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SMOKE_OPERATIONS = 32
SMOKE_CONNECTIONS = 8


# ---- Systems ---

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
class SocketWorkload(_workloads.Workload):
    def missing(self) -> str | None:
        """Return what it needs and does not find."""
        connections = getattr(self.measure, "connections", 0)
        if connections + 100 > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
            return f"a process may not open {connections} files"
        return super().missing()

    def for_smoke(self) -> SocketWorkload:
        """Return a very small one of it."""
        measure = self.measure
        if isinstance(measure, Echo | Http | Flood):
            measure = attrs.evolve(measure, connections=min(measure.connections, SMOKE_CONNECTIONS))
        if isinstance(measure, Flood):
            measure = attrs.evolve(measure, seconds=0.1)
        if isinstance(measure, Client):
            measure = attrs.evolve(measure, tasks=min(measure.tasks, 4))
        amount = 1 if isinstance(measure, Once) else SMOKE_OPERATIONS
        return attrs.evolve(self, measure=measure, amount=amount)


GROWTH = (1, 10, 100, 1000, 10_000)  # connections

WORKLOADS = {
    workload.name: workload
    for workload in (
        SocketWorkload("echo-1", "TCP echo, 1 × 64 B", 20_000, Echo(1, 64)),
        SocketWorkload("echo-64", "TCP echo, 64 × 64 B", 100_000, Echo(64, 64)),
        SocketWorkload("echo-512", "TCP echo, 512 × 64 B", 100_000, Echo(512, 64)),
        SocketWorkload(
            "echo-5000", "TCP echo, 5,000 × 64 B, 50 active", 60_000, Echo(5000, 64, active=50)
        ),
        SocketWorkload("echo-16k", "TCP echo, 64 × 16 KiB", 40_000, Echo(64, 16384)),
        SocketWorkload(
            "socket-64",
            "TCP echo through sockets, 64 × 64 B",
            100_000,
            Echo(64, 64, program="echo_sockets"),
        ),
        SocketWorkload("storm", "connect, a byte each way, close; 32 at once", 12_000, Storm(32)),
        SocketWorkload("udp", "UDP request and response, 32 × 64 B", 60_000, Datagrams(32, 64)),
        SocketWorkload("tls", "TLS echo, 64 × 1 KiB", 30_000, EchoTLS(64, 1024), ("trustme",)),
        SocketWorkload(
            "anyio", "AnyIO's TCP echo, 64 × 64 B", 60_000, Echo(64, 64, kind="anyio"), ("anyio",)
        ),
        SocketWorkload("yields", "one task that yields", 200_000, Performs("yields")),
        SocketWorkload("empty-run", "an empty run()", 400, Performs("empty_runs")),
        SocketWorkload("first-run", "the first run() of a process", 5, Once(FIRST_RUN)),
        SocketWorkload("import", "import", 5, Once(IMPORT)),
        *(
            SocketWorkload(
                f"redis-{tasks}",
                f"Redis client (coredis), tasks: {tasks}",
                8000,
                Client("redis", tasks),
                ("anyio", "coredis", "redis-server"),
            )
            for tasks in (1, 32)
        ),
        *(
            SocketWorkload(
                f"httpx-{tasks}",
                f"HTTP client (httpx), tasks: {tasks}",
                4000,
                Client("http", tasks),
                ("anyio", "httpx"),
            )
            for tasks in (1, 32)
        ),
        SocketWorkload(
            "hypercorn",
            "Hypercorn and Starlette, JSON, 32 connections",
            8000,
            Http(32),
            ("hypercorn", "starlette"),
        ),
        *(
            SocketWorkload(
                f"growth-{connections}",
                f"growth: TCP echo, {connections:,} × 64 B",
                60_000 if connections > 1 else 20_000,
                Echo(connections, 64),
            )
            for connections in GROWTH
        ),
        SocketWorkload(
            "busy-1000", "1,000 connections that always send, by KiB", 0, Flood(1000, seconds=1)
        ),
        SocketWorkload(
            "busy-10000", "10,000 connections that always send, by KiB", 0, Flood(10_000, seconds=4)
        ),
    )
}


# ---- All of it -----------------------------------------------------------------------------


def main() -> None:
    parser = _workloads.option_parser(__doc__ or "", WORKLOADS, SYSTEMS)
    options = _workloads.parsed_options(parser, WORKLOADS, SYSTEMS)
    if options.list:
        print(*WORKLOADS, sep="\n")
        return
    allow_files()
    _workloads.measure_all("sockets", options, WORKLOADS, SYSTEMS)


def allow_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
