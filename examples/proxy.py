"""A TCP proxy: relays each connection to another server inside the kernel (splice).

    python proxy.py 8080 example.org 80    (or --demo)

It calls `trio_uring.run` instead of `trio.run`, so it needs no launcher.
"""

import sys
from functools import partial

import trio

import trio_uring


async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    try:
        await trio_uring.relay(source, sink)
        await sink.send_eof()
    except trio.BrokenResourceError:  # one connection broke: close both
        await trio.aclose_forcefully(source)
        await trio.aclose_forcefully(sink)


async def proxy(host: str, port: int, client: trio.SocketStream) -> None:
    try:
        server = await trio.open_tcp_stream(host, port)
    except OSError as exc:
        print(f"No connection to {host}, port {port}: {exc}", file=sys.stderr)
        return
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(pump, client, server)
        nursery.start_soon(pump, server, client)


async def demo() -> None:
    async def shout(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data.upper())

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, host="127.0.0.1")
        [target] = await nursery.start(serve, shout, 0)
        handler = partial(proxy, *target.socket.getsockname())
        [listener] = await nursery.start(serve, handler, 0)
        async with await trio.open_tcp_stream(*listener.socket.getsockname()) as stream:
            await stream.send_all(b"through the proxy and back")
            await stream.send_eof()
            print(b"".join([data async for data in stream]))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    if sys.argv[1:] == ["--demo"]:
        trio_uring.run(demo)
    elif len(sys.argv) == 4:
        handler = partial(proxy, sys.argv[2], int(sys.argv[3]))
        trio_uring.run(partial(trio.serve_tcp, handler, int(sys.argv[1]), host="localhost"))
    else:
        print(__doc__)
