"""Serve digests over TCP in several threads: while one computes, the others answer.

python examples/threaded_server.py [PORT], or --demo
"""

import hashlib
import os
import sys
from functools import partial

import trio
import trio.testing

import trio_uring

SALT = b"not a secret"


async def digest(stream: trio.SocketStream) -> None:
    """Answer each line. A digest takes some milliseconds and lets other threads run meanwhile."""
    received = b""
    async for data in stream:
        *lines, received = (received + data).split(b"\n")
        for line in lines:
            key = hashlib.pbkdf2_hmac("sha256", line, SALT, 20_000)
            await stream.send_all(key.hex().encode() + b"\n")


async def serve(
    port: int,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    threads = os.cpu_count() or 1
    await trio_uring.serve_threads(digest, listeners, threads=threads, task_status=task_status)


async def ask(listener: trio.SocketListener, line: bytes) -> None:
    async with await trio.testing.open_stream_to_socket_listener(listener) as stream:
        await stream.send_all(line + b"\n")
        print(line.decode(), (await stream.receive_some()).decode().strip()[:16])


async def demo() -> None:
    async with trio.open_nursery() as server:
        listeners = await server.start(partial(serve, 0))
        async with trio.open_nursery() as clients:
            for line in (b"one", b"two", b"three", b"four"):
                clients.start_soon(ask, listeners[0], line)
        server.cancel_scope.cancel()


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    elif sys.argv[1:] == ["--demo"]:
        trio_uring.run(demo)
    else:
        trio_uring.run(serve, int((*sys.argv, "8000")[1]))
