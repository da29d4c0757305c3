"""An echo server on a ring, which its parent stops, continues and kills."""

from __future__ import annotations

from functools import partial

import trio

import trio_uring
from trio_uring import RingConfig


async def main() -> None:
    """Print the port, and serve for ever."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        print(listeners[0].socket.getsockname()[1], flush=True)


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


if __name__ == "__main__":
    trio_uring.run(main, ring=RingConfig(require=True))
