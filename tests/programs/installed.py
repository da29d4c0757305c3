"""An echo on the installed package, which must run on what the argument says.

python installed.py native|python|epoll
"""

from __future__ import annotations

import sys
import warnings

import trio

import trio_uring


async def echo() -> str:
    """Send some bytes there and back, and return what that ran on."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    _, port = listener.socket.getsockname()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for number in range(100):
                await stream.send_all(b"%4d" % number)
                assert await stream.receive_some() == b"%4d" % number
        nursery.cancel_scope.cancel()
    statistics = trio_uring.statistics()
    return statistics.engine if statistics.backend == "io_uring" else statistics.backend


if __name__ == "__main__":
    expected = sys.argv[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        used = trio_uring.run(echo)
    print(f"{trio_uring.__file__}: {used}", *(warning.message for warning in caught), sep="\n")
    assert used == expected
    assert bool(caught) == (expected == "epoll")
