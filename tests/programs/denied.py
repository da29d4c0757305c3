"""Deny one of io_uring's system calls in the middle of a run, and tell how the run ends.

Usage: denied.py CALL WORK [guest], with the number of the call and the name of a function below.
Prints the end of the run, of the next run, and the fds that are left.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import seccomp
import trio
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import open_ring_channel, receive_many
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Deny = Callable[[], None]


async def sockets(deny: Deny) -> None:
    """A receive is in flight."""
    left, right = trio.socket.socketpair()
    with left, right:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.recv, 1)
            await wait_all_tasks_blocked()
            deny()
            await right.send(b"x")
        await left.send(b"back")
        assert await right.recv(9) == b"back"


async def first_receive(deny: Deny) -> None:
    """There are no provided buffers yet."""
    left, right = trio.socket.socketpair()
    with left, right:
        deny()
        await left.send(b"x")
        assert await right.recv(9) == b"x"


async def files(deny: Deny) -> None:
    with tempfile.NamedTemporaryFile() as plain:
        async with await trio.open_file(plain.name, "r+b") as file:
            await file.write(b"before")
            deny()
            await file.write(b" and after")
            await file.flush()
        assert await trio.Path(plain.name).read_bytes() == b"before and after"


async def waiting(deny: Deny) -> None:
    """Others wait for the same file, or for the limit of operations on files."""
    errors: list[OSError] = []

    async def catch(call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except OSError as exc:
            errors.append(exc)

    with tempfile.NamedTemporaryFile() as plain:
        appending = await trio.open_file(plain.name, "ab", buffering=0)
        buffered = await trio.open_file(plain.name, "wb")
        await appending.write(b"first")
        async with appending, buffered, trio.open_nursery() as nursery:
            deny()
            for _ in range(2):
                nursery.start_soon(catch, partial(appending.write, b"more"))
                nursery.start_soon(catch, partial(trio_uring.fsync, buffered))
            for _ in range(70):  # of which 64 begin
                synced = operations.fsync(plain.fileno())
                nursery.start_soon(catch, partial(perform, synced))
    assert len(errors) == 74
    assert len(set(map(str, errors))) == 1
    raise errors[0]


async def batch(deny: Deny) -> None:
    deny()
    results = await trio_uring.perform_many([operations.nop() for _ in range(1000)])
    assert len(results) == 1000


async def multishot(deny: Deny) -> None:
    left, right = (trio.SocketStream(sock) for sock in trio.socket.socketpair())
    async with left, right, receive_many(left) as receiver:
        await right.send_all(b"1")
        with await receiver.receive() as lease:
            assert bytes(lease.memory) == b"1"
        deny()
        await right.send_all(b"2")
        with await receiver.receive() as lease:
            assert bytes(lease.memory) == b"2"


async def cancelled(deny: Deny) -> None:
    """An operation with a buffer of its own is cancelled."""
    reader, writer = os.pipe()
    try:
        async with trio.open_nursery() as nursery:
            read = operations.read(reader, bytearray(9), -1, cancellable=True)
            nursery.start_soon(perform, read)
            await wait_all_tasks_blocked()
            deny()
            nursery.cancel_scope.cancel()
    finally:
        os.close(reader)
        os.close(writer)


async def goes_on(deny: Deny) -> None:
    """What was in flight fails. What begins later works, without the ring."""
    left, right = trio.socket.socketpair()
    data = bytearray(b"data")
    with left, right:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with suppress(PermissionError):
                    await left.recv(1)

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            deny()
            with suppress(PermissionError):  # a guest run enters the ring only if it must
                await right.send(b"x")
        assert trio_uring.statistics().fallback_reason.startswith(
            "the run lost its ring: io_uring_enter"
        )
        await left.send(data)
        assert await right.recv(9) == data
        async with trio.open_nursery() as nursery:

            async def closed() -> None:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(right)

            nursery.start_soon(closed)
            await wait_all_tasks_blocked()
            trio.lowlevel.notify_closing(right)
    with tempfile.NamedTemporaryFile() as plain:
        await trio.Path(plain.name).write_bytes(data)
        assert await trio.Path(plain.name).read_bytes() == data
    await trio.sleep(0.001)
    with trio.move_on_after(0.001) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught


async def channel(deny: Deny) -> None:
    """The other run, in a thread of its own, keeps its ring."""
    request, requests = open_ring_channel[int](0)
    reply, replies = open_ring_channel[int](0)

    async def echo() -> None:
        with requests, reply:
            async for number in requests:
                await reply.send(number)

    async def ask(number: int) -> None:
        await request.send(number)
        assert await replies.receive() == number

    with trio.fail_after(20), request, replies:
        async with trio.open_nursery() as nursery:
            peer = partial(trio.to_thread.run_sync, abandon_on_cancel=True)
            nursery.start_soon(peer, trio_uring.run, echo)
            for number in range(6):
                if number == 3:
                    deny()
                await ask(number)
                await wait_all_tasks_blocked()  # its loop sleeps
            assert trio_uring.statistics().fallback_reason
            request.close()


async def channel_later(deny: Deny) -> None:
    """The channel is opened when the ring is lost already."""
    deny()
    with suppress(PermissionError):
        await perform(operations.nop())
    assert trio_uring.statistics().fallback_reason
    await channel(int)


async def nothing(_deny: Deny) -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        await left.send(b"x")
        assert await right.recv(9) == b"x"


def as_guest(main: Callable[[], Awaitable[None]]) -> None:
    async def host() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        trio_uring.start_guest_run(
            main,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
        )
        (await done).unwrap()

    asyncio.run(host())


def attempt(work: Callable[[Deny], Awaitable[None]], deny: Deny, *, guest: bool = False) -> None:
    """Print how a run with *work* ends."""

    async def main() -> None:
        await work(deny)
        backend.append(trio_uring.statistics().backend)

    backend: list[str] = []
    try:
        if guest:
            as_guest(main)
        else:
            trio_uring.run(main)
    except BaseException as exc:  # noqa: BLE001 (printed)
        for each in getattr(exc, "exceptions", [exc]):
            print(f"{type(each).__name__}: {each}")
    else:
        print(*backend)


def open_fds() -> dict[str, str]:
    return {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")  # not the one of the listing
    }


def main() -> None:
    call, name, *way = sys.argv[1:]
    work = globals()[name]
    warnings.simplefilter("ignore")
    attempt(nothing, int)
    attempt(nothing, int, guest=True)  # what asyncio and Trio keep
    before = open_fds()
    attempt(work, partial(seccomp.forbid, int(call), error=1), guest=bool(way))
    attempt(nothing, int)
    gc.collect()
    print({fd: file for fd, file in open_fds().items() if before.get(fd) != file})


if __name__ == "__main__":
    main()
