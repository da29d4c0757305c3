"""Serve one file over TCP; the kernel moves it from the page cache to the sockets.

python -m trio_uring send_file.py FILE [PORT]
python -m trio_uring send_file.py --demo
"""

import os
import sys
import tempfile
from functools import partial

import trio
import trio.testing

import trio_uring

BYTES = 5_000_000  # in the demonstration


async def serve(
    path: str,
    port: int,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Send the file to each client that connects."""
    async with await trio_uring.open_positional(path) as file:

        async def handle(stream: trio.SocketStream) -> None:
            progress = trio_uring.SendProgress()
            try:
                await trio_uring.send_file(stream, file, progress=progress)
            except trio.BrokenResourceError:
                print(f"A client left after {progress.bytes_sent} bytes.")

        await trio.serve_tcp(handle, port, host="127.0.0.1", task_status=task_status)


async def demo() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data := os.urandom(BYTES))
        file.flush()
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(serve, file.name, 0))
            async with await trio.testing.open_stream_to_socket_listener(listeners[0]) as stream:
                received = b"".join([part async for part in stream])
            nursery.cancel_scope.cancel()
    assert received == data
    print(f"{len(received)} bytes received.")


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        print(__doc__)
    elif sys.argv[1:] == ["--demo"]:
        trio_uring.run(demo)
    else:
        trio_uring.run(serve, sys.argv[1], int((*sys.argv, "8000")[2]))
