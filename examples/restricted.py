"""An echo server whose ring may perform only the operations that it needs.

python examples/restricted.py, or --demo
"""

from __future__ import annotations

import sys

import trio

import trio_uring
from trio_uring.lowlevel import operations, perform

RING = trio_uring.RingConfig(
    require=True,
    allowed_operations=frozenset({"ACCEPT", "RECV", "SEND", "CONNECT", "SHUTDOWN"}),
)


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def demo() -> None:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, echo, 0)
        port = listeners[0].socket.getsockname()[1]
        async with await trio.open_tcp_stream("localhost", port) as client:
            await client.send_all(b"hello")
            print((await client.receive_some()).decode())
        try:
            await perform(operations.openat("/etc/passwd", 0, 0))
        except PermissionError as exc:
            print(exc)
        nursery.cancel_scope.cancel()


async def main() -> None:
    await trio.serve_tcp(echo, 2000)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    else:
        trio_uring.run(demo if "--demo" in sys.argv else main, ring=RING)
