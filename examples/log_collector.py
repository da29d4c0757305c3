"""Count lines from many senders by multishot accept and multishot receive.

python -m trio_uring log_collector.py [PORT], or --demo
"""

import sys
from collections import Counter
from functools import partial

import trio
import trio.testing

import trio_uring

SENDERS, LINES = 20, 500


async def collect(counts: Counter[bytes], stream: trio.SocketStream) -> None:
    """Count the lines of one sender by their first word."""
    begun = b""  # a line whose end has not arrived
    async with stream, trio_uring.receive_many(stream) as leases:
        async for lease in leases:
            with lease:  # data that is kept must be copied, as here
                *lines, begun = (begun + lease.memory).split(b"\n")
            counts.update(line.partition(b" ")[0] for line in lines)


async def serve(counts: Counter[bytes], listener: trio.SocketListener) -> None:
    async with trio_uring.accept_many(listener) as streams, trio.open_nursery() as nursery:
        async for stream in streams:
            nursery.start_soon(collect, counts, stream)


async def demo() -> None:
    async def send(listener: trio.SocketListener) -> None:
        async with await trio.testing.open_stream_to_socket_listener(listener) as stream:
            for number in range(LINES):
                await stream.send_all(b"%s line %d\n" % (b"odd" if number % 2 else b"even", number))
            await stream.send_eof()
            await stream.receive_some()  # returns when the collector closes the connection

    counts: Counter[bytes] = Counter()
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as server:
        server.start_soon(serve, counts, listener)
        async with trio.open_nursery() as senders:
            for _ in range(SENDERS):
                senders.start_soon(send, listener)
        server.cancel_scope.cancel()
    print(f"{SENDERS} senders sent {dict(counts)}.")


async def main(port: int) -> None:
    [listener] = await trio.open_tcp_listeners(port, host="127.0.0.1")
    await serve(Counter(), listener)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    else:
        trio_uring.run(demo if "--demo" in sys.argv else partial(main, int((*sys.argv, "5140")[1])))
