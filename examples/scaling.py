"""Serve with several processes, which share a port. Each answers requests with its own number.

python examples/scaling.py [PORT PROCESSES], or --demo
"""

import os
import socket
import subprocess
import sys

import trio

import trio_uring


async def handle(stream: trio.SocketStream) -> None:
    async with stream:
        async for _ in stream:
            await stream.send_all(b"%d" % os.getpid())


async def serve(fd: int) -> None:
    sock = socket.socket(fileno=fd)
    sock.settimeout(0)
    await trio.serve_listeners(handle, [trio.SocketListener(trio.socket.from_stdlib_socket(sock))])


def start(port: int, processes: int) -> tuple[int, list[subprocess.Popen[bytes]]]:
    """Start the processes, each with a socket of its own, in which connections already wait."""
    started = []
    for _ in range(processes):
        with socket.create_server(("127.0.0.1", port), reuse_port=True) as sock:
            port = sock.getsockname()[1]
            command = [sys.executable, __file__, "--serve", str(sock.fileno())]
            started.append(subprocess.Popen(command, pass_fds=[sock.fileno()]))
    return port, started


async def demo(port: int) -> None:
    pids = set()
    for _ in range(50):  # the kernel chooses a process by the addresses, which differ each time
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"hello")
            pids.add(await stream.receive_some())
    print(f"{len(pids)} processes have answered")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    elif sys.argv[1:2] == ["--serve"]:
        trio_uring.run(serve, int(sys.argv[2]))
    elif sys.argv[1:] == ["--demo"]:
        for count in (1, 2, 4):
            port, servers = start(0, count)
            trio_uring.run(demo, port)
            for server in servers:
                server.terminate()
                server.wait()
    else:
        port, count = map(int, sys.argv[1:] or (8000, 2))
        print(f"{count} processes answer at 127.0.0.1:{port}, until Ctrl-C")
        for server in start(port, count)[1]:
            server.wait()
