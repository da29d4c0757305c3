"""An HTTP/1.0 file server on AnyIO, with the backend "trio_uring".

python http_file_server_anyio.py directory port, or --demo
"""

import sys
from contextlib import suppress
from functools import partial

import anyio
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

import trio_uring  # registers the backend; send_file sends inside the kernel

LOCAL_ADDRESS = SocketAttribute.local_address
# The data is not a request, or the client has disconnected.
NO_HTTP = (ValueError, anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.BrokenResourceError)


async def answer(root: anyio.Path, client: SocketStream) -> None:
    async with client:
        with suppress(*NO_HTTP):
            request = await BufferedByteReceiveStream(client).receive_until(b"\r\n\r\n", 16384)
            method, target, _version = request.split(b"\r\n")[0].decode("ascii").split(" ")
            path = root / target.lstrip("/")
            if method != "GET" or ".." in path.parts or not await path.is_file():
                await client.send(b"HTTP/1.0 404 Not Found\r\n\r\n")
                return
            await client.send(b"HTTP/1.0 200 OK\r\n\r\n")
            async with await anyio.open_file(path, "rb") as file:
                await trio_uring.send_file(client, file.wrapped)


async def serve(directory: str, port: int) -> None:
    root = await anyio.Path(directory).resolve()
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port) as server:
        print(f"Serving {root} on", *server.extra(LOCAL_ADDRESS))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, partial(answer, root))
            if port == 0:
                async with await anyio.connect_tcp(*server.extra(LOCAL_ADDRESS)) as client:
                    await client.send(b"GET /hello.txt HTTP/1.0\r\n\r\n")
                    print(b"".join([chunk async for chunk in client]).decode(), end="")
                tasks.cancel_scope.cancel()


async def demo() -> None:
    async with anyio.TemporaryDirectory() as directory:
        await anyio.Path(directory, "hello.txt").write_text("Hello from the ring.\n")
        await serve(directory, port=0)


if __name__ == "__main__":
    ring = trio_uring.RingConfig(entries=64)
    run = partial(anyio.run, backend="trio_uring", backend_options={"ring": ring})
    if sys.argv[1:] == ["--demo"]:
        run(demo)
    elif len(sys.argv) == 3:
        run(serve, sys.argv[1], int(sys.argv[2]))
    else:
        print(__doc__)
