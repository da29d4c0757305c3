"""What `bench_sockets.py` measures on the event loops of asyncio, as `_trio_programs.py`.

TCP through asyncio's streams. asyncio has none for datagrams, so that program is a protocol.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import ssl
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

BACKLOG = 4096
RECEIVE_MAX = 65536


# ---- Servers -------------------------------------------------------------------------------


async def serve(handle: Handle, tls: ssl.SSLContext | None = None, receive_buffer: int = 0) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    if receive_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.start_server(handle, sock=listener, backlog=BACKLOG, ssl=tls)
    print(listener.getsockname()[1], flush=True)
    await asyncio.get_running_loop().create_future()


async def send_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(RECEIVE_MAX):
        writer.write(data)
        await writer.drain()
    writer.close()


async def echo() -> None:
    await serve(send_back)


async def echo_sockets() -> None:
    loop = asyncio.get_running_loop()
    tasks = set[asyncio.Task[None]]()

    async def handle(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := await loop.sock_recv(connection, RECEIVE_MAX):
            await loop.sock_sendall(connection, data)

    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        listener.setblocking(False)
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = await loop.sock_accept(listener)
            tasks.add(asyncio.create_task(handle(connection)))


async def answer_once() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(RECEIVE_MAX))
        await writer.drain()
        writer.close()

    await serve(handle)


async def echo_tls(certificate: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    await serve(send_back, context)


class EchoDatagrams(asyncio.DatagramProtocol):
    transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)


async def echo_datagrams() -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(EchoDatagrams, ("127.0.0.1", 0))
    print(transport.get_extra_info("sockname")[1], flush=True)
    await loop.create_future()


async def receive_all(size: str, receive_buffer: str) -> None:
    received: list[int] = []

    async def handle(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        number = len(received)
        received.append(0)
        while data := await reader.read(int(size)):
            received[number] += len(data)

    def tell() -> None:
        while sys.stdin.readline():
            print(json.dumps(received), flush=True)

    threading.Thread(target=tell, daemon=True).start()
    await serve(handle, receive_buffer=int(receive_buffer))


async def serve_http(fd: str) -> None:
    hypercorn = importlib.import_module("hypercorn.asyncio")
    app, config = importlib.import_module("_http_app").app_and_config(fd)
    print(fd, flush=True)
    await hypercorn.serve(app, config)


# ---- Without sockets -----------------------------------------------------------------------


async def yields() -> None:
    while line := sys.stdin.readline():
        for _ in range(int(line)):
            await asyncio.sleep(0)
        print("done", flush=True)


async def nothing() -> None:
    pass


def empty_runs(new_event_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    while line := sys.stdin.readline():
        for _ in range(int(line)):
            # As asyncio.Runner, which Python 3.10 does not have.
            loop = new_event_loop()
            loop.run_until_complete(nothing())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
        print("done", flush=True)


# ---- All of it -----------------------------------------------------------------------------

PROGRAMS = {
    program.__name__: program
    for program in (
        *(echo, echo_sockets, answer_once, echo_tls, echo_datagrams, receive_all),
        *(serve_http, yields),
    )
}


def main(system: str, name: str, *arguments: str) -> None:
    new_event_loop = importlib.import_module(system).new_event_loop
    if name == "empty_runs":
        empty_runs(new_event_loop)
    else:
        new_event_loop().run_until_complete(PROGRAMS[name](*arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
