"""A TCP echo server: a plain Trio program that does not mention io_uring.

python echo_server.py [port]                     Trio's own epoll
python -m trio_uring echo_server.py [port]       io_uring
python -m trio_uring echo_server.py --demo       send itself messages, print statistics, and exit
"""

import contextlib
import sys
from functools import partial
from typing import Any

import trio
import trio.testing

SERVE = partial(trio.serve_tcp, host="localhost")
CLIENTS = 10
MESSAGES = 100


async def echo(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):  # the client has disconnected
        async for data in stream:
            await stream.send_all(data)


async def talk(stream: trio.SocketStream, number: int) -> None:
    async with stream:
        for count in range(MESSAGES):
            message = b"message %d of client %d" % (count, number)
            await stream.send_all(message)
            echoed = b""
            while len(echoed) < len(message):
                echoed += await stream.receive_some()
            assert echoed == message, echoed


async def demo() -> None:
    async with trio.open_nursery() as server:
        listeners = await server.start(SERVE, echo, 0)
        async with trio.open_nursery() as clients:
            for number in range(CLIENTS):
                stream = await trio.testing.open_stream_to_socket_listener(listeners[0])
                clients.start_soon(talk, stream, number)
        server.cancel_scope.cancel()
    statistics: Any = trio.lowlevel.current_statistics().io_statistics
    print(f"{CLIENTS} clients had {MESSAGES} messages each echoed, on {statistics.backend}.")
    if statistics.backend == "io_uring":
        print(f"{statistics.submitted} operations took {statistics.enters} system calls:")
        for opcode, count in statistics.completed.items():
            print(f"  {opcode:12} {count:6}")
    elif reason := getattr(statistics, "fallback_reason", ""):
        print(f"No io_uring here: {reason}.")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    elif sys.argv[1:] == ["--demo"]:
        trio.run(demo)
    else:
        trio.run(SERVE, echo, int(sys.argv[1]) if sys.argv[1:] else 12345)
