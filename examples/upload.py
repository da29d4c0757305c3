"""Receive uploads over TCP; the kernel moves each from its socket to a new file.

python -m trio_uring upload.py DIRECTORY [PORT]
python -m trio_uring upload.py --demo
"""

import os
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

import trio
import trio.testing

import trio_uring

BYTES = 5_000_000  # in the demonstration


async def serve(
    directory: str,
    port: int,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Write what each client sends to a separate file."""
    numbers = count()

    async def handle(stream: trio.SocketStream) -> None:
        path = Path(directory) / f"upload-{next(numbers)}"
        async with await trio_uring.open_positional(path, "w") as file:
            received = await trio_uring.receive_file(stream, file)
            await file.fdatasync()
        await stream.send_all(b"%d bytes in %s" % (received, path.name.encode()))

    await trio.serve_tcp(handle, port, host="127.0.0.1", task_status=task_status)


async def demo() -> None:
    data = os.urandom(BYTES)
    with tempfile.TemporaryDirectory() as directory:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(serve, directory, 0))
            async with await trio.testing.open_stream_to_socket_listener(listeners[0]) as stream:
                await stream.send_all(data)
                await stream.send_eof()
                print((await stream.receive_some()).decode())
            nursery.cancel_scope.cancel()
        assert (Path(directory) / "upload-0").read_bytes() == data


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        print(__doc__)
    elif sys.argv[1:] == ["--demo"]:
        trio_uring.run(demo)
    else:
        trio_uring.run(serve, sys.argv[1], int((*sys.argv, "8000")[2]))
