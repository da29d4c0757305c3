"""TCP echo: the same server under ``trio.run`` and ``trio_uring.run``; CPU per message.

The load comes from another process. Two servers: through ``trio.serve_tcp`` and its streams,
and through ``trio.socket``.

    python bench_echo.py [--connections 64] [--size 64] [--messages 100000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import functools
import resource
import select
import socket
import subprocess
import sys
import time

import _measure
import trio

import trio_uring

RUNS = {"trio": trio.run, "trio_uring": trio_uring.run}


# ---- The server, in a process of its own ---------------------------------------------------


async def serve_streams(task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, echo, 0)
        task_status.started(listeners[0].socket.getsockname()[1])


async def serve_sockets(task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
    async def echo(sock: trio.socket.SocketType) -> None:
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := await sock.recv(65536):
                await sock.send(data)

    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        task_status.started(listener.getsockname()[1])
        async with trio.open_nursery() as nursery:
            while True:
                connection, _ = await listener.accept()
                nursery.start_soon(echo, connection)


SERVERS = {"stream": serve_streams, "socket": serve_sockets}


async def server(kind: str) -> None:
    """Print the port and, at the end of standard input, the CPU seconds used in between."""
    async with trio.open_nursery() as nursery:
        port = await nursery.start(SERVERS[kind])
        print(port, flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        before = cpu_seconds()
        await trio.to_thread.run_sync(sys.stdin.readline)
        print(cpu_seconds() - before, flush=True)
        nursery.cancel_scope.cancel()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---- The load ------------------------------------------------------------------------------


def measure(run: str, kind: str, connections: int, size: int, messages: int) -> _measure.Sample:
    """Start a server, and echo *messages* over *connections*. Each waits for its answer."""
    command = [sys.executable, __file__, "--serve", run, kind]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        for client in clients:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        load(clients, size, messages // 10)
        process.stdin.write("begin\n")
        process.stdin.flush()
        begin = time.perf_counter()
        load(clients, size, messages)
        elapsed = time.perf_counter() - begin
        process.stdin.write("end\n")
        process.stdin.flush()
        cpu = float(process.stdout.readline())
        for client in clients:
            client.close()
    return _measure.Sample(rate=messages / elapsed, cpu_us=cpu / messages * 1e6)


def load(clients: list[socket.socket], size: int, messages: int) -> None:
    """Send a message on every connection, and another one when its echo is complete."""
    message = b"x" * size
    missing = {client.fileno(): 0 for client in clients}
    by_fd = {client.fileno(): client for client in clients}
    poll = select.epoll()
    for client in clients:
        poll.register(client, select.EPOLLIN)
        client.sendall(message)
        missing[client.fileno()] = size
    sent, received = len(clients), 0
    while received < messages:
        for fd, _ in poll.poll():
            missing[fd] -= len(by_fd[fd].recv(65536))
            if missing[fd] == 0:
                received += 1
                if sent < messages:
                    by_fd[fd].sendall(message)
                    missing[fd] = size
                    sent += 1
    poll.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="bytes in a message")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, metavar=("RUN", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        RUNS[options.serve[0]](server, options.serve[1])
        return
    for kind in SERVERS:
        variants = {
            run: functools.partial(
                measure, run, kind, options.connections, options.size, options.messages
            )
            for run in RUNS
        }
        title = f"TCP echo through trio's {kind}s, {options.connections} × {options.size} B"
        _measure.report(title, _measure.interleave(variants, options.rounds), "trio")


if __name__ == "__main__":
    main()
