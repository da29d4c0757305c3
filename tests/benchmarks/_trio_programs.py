"""What `bench_sockets.py` measures on Trio and on trio_uring: unchanged Trio programs.

    python _trio_programs.py SYSTEM PROGRAM [ARGUMENT...]

A server prints its port, and serves until it is killed. A client performs as many operations as
each line of its input says, and then prints "done".
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import ssl
import sys
import threading
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BACKLOG = 4096


# ---- Servers -------------------------------------------------------------------------------


async def serve(handle: Callable[[Any], Awaitable[None]], receive_buffer: int = 0) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=BACKLOG)
    if receive_buffer:
        listeners[0].socket.setsockopt(
            trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer
        )
    print(listeners[0].socket.getsockname()[1], flush=True)
    await trio.serve_listeners(handle, listeners)


async def echo() -> None:
    async def handle(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    await serve(handle)


async def echo_sockets() -> None:
    """Do it without streams."""

    async def handle(connection: trio.socket.SocketType) -> None:
        with connection:
            connection.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
            while data := await connection.recv(65536):
                await connection.send(data)

    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen(BACKLOG)
        print(listener.getsockname()[1], flush=True)
        async with trio.open_nursery() as nursery:
            while True:
                connection, _ = await listener.accept()
                nursery.start_soon(handle, connection)


async def answer_once() -> None:
    """Receive once, send it back, close."""

    async def handle(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some())

    await serve(handle)


async def echo_tls(certificate: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def handle(stream: trio.SocketStream) -> None:
        secure = trio.SSLStream(stream, context, server_side=True)
        async for data in secure:
            await secure.send_all(data)

    await serve(handle)


async def echo_datagrams() -> None:
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as server:
        await server.bind(("127.0.0.1", 0))
        print(server.getsockname()[1], flush=True)
        while True:
            data, address = await server.recvfrom(65536)
            await server.sendto(data, address)


async def receive_all(size: str, receive_buffer: str) -> None:
    """Count the bytes of each connection, *size* at a time."""
    received: list[int] = []

    async def handle(stream: trio.SocketStream) -> None:
        number = len(received)
        received.append(0)
        while data := await stream.receive_some(int(size)):
            received[number] += len(data)

    tell_when_asked(received)
    await serve(handle, int(receive_buffer))


def tell_when_asked(counts: list[int]) -> None:
    """Print *counts* for each line of the input, without occupying the event loop."""

    def tell() -> None:
        while sys.stdin.readline():
            print(json.dumps(counts), flush=True)

    threading.Thread(target=tell, daemon=True).start()


async def serve_http(fd: str) -> None:
    """Serve a JSON answer through Hypercorn and Starlette, on a socket that listens already."""
    hypercorn = importlib.import_module("hypercorn.trio")
    app, config = importlib.import_module("_http_app").app_and_config(fd)
    async with trio.open_nursery() as nursery:
        await nursery.start(hypercorn.serve, app, config)
        print(fd, flush=True)


# ---- Without sockets -----------------------------------------------------------------------


async def yields() -> None:
    while line := sys.stdin.readline():
        for _ in range(int(line)):
            await trio.lowlevel.checkpoint()
        print("done", flush=True)


async def nothing() -> None:
    pass


def empty_runs(run: Callable[..., object]) -> None:
    while line := sys.stdin.readline():
        for _ in range(int(line)):
            run(nothing)
        print("done", flush=True)


# ---- All of it -----------------------------------------------------------------------------

PROGRAMS = {
    program.__name__: program
    for program in (
        *(echo, echo_sockets, answer_once, echo_tls, echo_datagrams, receive_all),
        *(serve_http, yields),
    )
}


async def checked(program: Callable[..., Awaitable[None]], *arguments: str) -> None:
    """Run *program*, unless this is another engine than the one to be measured."""
    engine = getattr(trio.lowlevel.current_statistics().io_statistics, "engine", None)
    asked = os.environ.get("TRIO_URING_ENGINE")
    if engine != asked:
        raise RuntimeError(f"to be measured is the engine {asked}, and this is {engine}")
    await program(*arguments)


def runner(system: str) -> Callable[..., object]:
    if system == "trio":
        return trio.run
    trio_uring = importlib.import_module("trio_uring")
    return functools.partial(trio_uring.run, ring=trio_uring.RingConfig(require=True))


def main(system: str, name: str, *arguments: str) -> None:
    run = runner(system)
    if name == "empty_runs":
        run(checked, nothing)
        empty_runs(run)
    else:
        run(checked, PROGRAMS[name], *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
