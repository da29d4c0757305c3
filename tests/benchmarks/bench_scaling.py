"""Requests answered by 1, 2 and 4 processes or threads, in three ways to share a port.

- ``SO_REUSEPORT``: a process each, with a socket of its own; the kernel chooses by the addresses;
- ``hypercorn``: the workers of ``hypercorn --workers N``, which accept from the same socket. HTTP
  costs time of its own, so compare it only with itself;
- ``serve_threads``: one process with a thread each.

Each request costs 0.3 ms of hashing, which lets other threads run, or of Python, which does not. It
prints the table of docs/howto/scaling.md; and each row, when it is measured, on standard error.

    python bench_scaling.py [--seconds 1] [--rounds 3] [--counts 1 2 4]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring
from trio_uring import RingConfig
from trio_uring.lowlevel import on_ring

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

REQUIRED = RingConfig(require=True)
BLOCK = bytes(1 << 19)
WORK: dict[str, Callable[[], object]] = {
    "hashing": lambda: hashlib.sha256(BLOCK).digest(),
    "Python": lambda: sum(range(15_000)),
}
NAMES = {
    "SO_REUSEPORT": "processes, `SO_REUSEPORT`",
    "serve_threads": "threads, `serve_threads`",
    "hypercorn": "hypercorn's workers",
}
HTTP = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
PID = b"%d" % os.getpid()
CLIENTS = 16

# Some connections, kept alive, from a process of its own. It prints how many answers came.
CLIENT = """
import socket, sys, threading, time
port, count, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
request = bytes.fromhex(sys.argv[4])
answers = []
def call():
    number = 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection.sendall(request)
            assert connection.recv(65536)
            number += 1
    answers.append(number)
threads = [threading.Thread(target=call) for _ in range(count)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sum(answers))
"""

CLIENT_COMMAND = (sys.executable, "-Sc", CLIENT)


def handler(work: str) -> Callable[[trio.SocketStream], object]:
    async def handle(stream: trio.SocketStream) -> None:
        async for _ in stream:
            WORK[work]()
            await stream.send_all(PID)

    return handle


async def serve(way: str, work: str, fd: int, threads: int) -> None:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock))]
    if way == "serve_threads":
        await trio_uring.serve_threads(handler(work), listeners, threads=threads, ring=REQUIRED)
    else:
        await trio.serve_listeners(handler(work), listeners)


async def application(scope: dict[str, object], _receive: object, send: object) -> None:
    """The ASGI application that hypercorn serves."""
    assert scope["type"] == "http"
    assert on_ring()
    WORK["Python"]()
    await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b" " + PID})  # type: ignore[operator]


def start(way: str, work: str, count: int) -> tuple[int, list[subprocess.Popen[bytes]]]:
    """Start the server; return its port and its processes."""
    if way == "hypercorn":
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        command = [
            *(sys.executable, "-m", "trio_uring", "-m", "hypercorn", "--worker-class", "trio"),
            *("--workers", str(count), "--bind", f"127.0.0.1:{port}", "--log-level", "error"),
            f"{os.path.splitext(os.path.basename(__file__))[0]}:application",
        ]
        return port, [subprocess.Popen(command, cwd=os.path.dirname(os.path.abspath(__file__)))]
    port, servers = 0, []
    for _ in range(count if way == "SO_REUSEPORT" else 1):
        with socket.create_server(("127.0.0.1", port), backlog=1024, reuse_port=True) as sock:
            port = sock.getsockname()[1]
            command = [sys.executable, __file__, "--serve", way, work, str(sock.fileno())]
            servers.append(subprocess.Popen([*command, str(count)], pass_fds=[sock.fileno()]))
    return port, servers


def wait_until_all_answer(port: int, request: bytes, processes: int) -> None:
    """Ask until *processes* have answered. Each answer ends with the number of its process."""
    pids: set[bytes] = set()
    while len(pids) < processes:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request)
            answer = connection.recv(65536)
            if b" 500 " in answer:
                raise SystemExit(
                    "hypercorn's workers are on the ring with an installed package only"
                )
            pids.add(answer.split()[-1])
        time.sleep(0.01)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(way: str, work: str, count: int, seconds: float) -> _measure.Sample:
    """Return the rate of answers. The CPU time includes the clients and the servers' start."""
    request = HTTP if way == "hypercorn" else b"x"
    begin = cpu_seconds()
    port, servers = start(way, work, count)
    try:
        wait_until_all_answer(port, request, 1 if way == "serve_threads" else count)
        client = [*CLIENT_COMMAND, str(port), str(CLIENTS), str(seconds), request.hex()]
        answers = int(subprocess.run(client, check=True, capture_output=True).stdout)
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
            server.wait()
    return _measure.Sample(answers / seconds, (cpu_seconds() - begin) / answers * 1e6)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        way, work, fd, threads = sys.argv[2:]
        trio_uring.run(serve, way, work, int(fd), int(threads), ring=REQUIRED)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    rows = [("SO_REUSEPORT", work) for work in WORK]
    rows += [("serve_threads", work) for work in WORK]
    lines = [table_head(options.counts)]
    for way, work in [*rows, ("hypercorn", "Python")]:
        variants = {
            str(count): partial(measure, way, work, count, options.seconds)
            for count in options.counts
        }
        lines.append(table_row(way, work, _measure.interleave(variants, options.rounds)))
        print(lines[-1], file=sys.stderr)
    print(*lines, sep="\n")
    print(
        f"\nEach {options.rounds} times for {options.seconds:g} s: the median, the least and the "
        f"greatest.\nLinux {platform.release().partition('-')[0]}, {os.cpu_count()} cores, "
        f"{platform.python_implementation()} {platform.python_version()}."
    )


def table_head(counts: Sequence[int]) -> str:
    first, *others = counts
    headings = [f"{first}, answers/s", *(f"{count}, ratio" for count in others)]
    return f"| Way | Work of a request | {' | '.join(headings)} |\n|---|---{'|---:' * len(counts)}|"


def table_row(way: str, work: str, samples: Mapping[str, Sequence[_measure.Sample]]) -> str:
    """Return the rate of the first count, and those of the others as ratios to it."""
    first, *others = samples.values()
    cells = [f"{statistics.median(sample.rate for sample in first):,.0f}"]
    for row in others:
        ratio = _measure.rate_ratio(row, first)
        cells.append(f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})")
    return f"| {NAMES[way]} | {work} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
