"""`send_zerocopy`: all data arrives, and the memory is free when it returns."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from functools import partial
from typing import Final

import pytest
import trio
from transfers import KINDS, RUNS, all_of, closing, completed, connected, tls_pair
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from trio_uring import ZeroCopyProgress, send_zerocopy
from trio_uring.lowlevel import operations, perform

SIZE: Final = (5 << 20) + 12345
DATA: Final = os.urandom(SIZE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_all_of_the_data_arrives(run: str, kind: str) -> None:
    async def main() -> None:
        progress = ZeroCopyProgress()
        with connected(kind) as (ours, theirs):
            async with trio.open_nursery() as nursery:
                send = partial(send_zerocopy, ours, DATA, progress=progress)
                nursery.start_soon(closing, ours, send)
                assert await all_of(theirs) == DATA
        # Over loopback the kernel copies anyway.
        assert progress == ZeroCopyProgress(SIZE, SIZE)
        if run == "ring":
            if kind == "TCP":
                assert completed("SEND_ZC") > 1
                assert completed("SEND") == 0
            else:  # one attempt
                assert completed("SEND_ZC") == 1
                assert completed("SEND") > 0

    RUNS[run](main)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_several_buffers_are_sent_in_order(run: str, kind: str) -> None:
    blocks = [b"", DATA[:3], bytearray(DATA[3:2000]), memoryview(DATA)[2000:], b""]

    async def main() -> None:
        for parts in (blocks, [DATA[i : i + 1] for i in range(5000)]):
            with connected(kind) as (ours, theirs):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(closing, ours, partial(send_zerocopy, ours.socket, *parts))
                    assert await all_of(theirs) == b"".join(parts)
        if run == "ring" and kind == "TCP":
            assert completed("SENDMSG_ZC") >= 1 + 5

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_streams_that_are_no_sockets_are_sent_to_too(run: str) -> None:
    async def main() -> None:
        for ours, theirs in (memory_stream_pair(), await tls_pair()):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, ours, partial(send_zerocopy, ours, DATA, b"end"))
                assert await all_of(theirs) == DATA + b"end"

    RUNS[run](main)


async def test_a_full_socket_is_waited_for() -> None:
    with connected("TCP") as (ours, theirs):
        before = 0
        with suppress(BlockingIOError):
            while True:
                before += ours.socket._sock.send(DATA)  # type: ignore[attr-defined]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(closing, ours, partial(send_zerocopy, ours, DATA))
            await wait_all_tasks_blocked()
            received = await all_of(theirs)
        assert received[before:] == DATA


async def test_closed_in_the_turn_in_which_a_socket_proved_to_be_full() -> None:
    for _ in range(20):  # Trio's order of the two tasks is random
        with connected("TCP") as (ours, _theirs):
            with suppress(BlockingIOError):
                while True:
                    ours.socket._sock.send(DATA)  # type: ignore[attr-defined]
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def send() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await send_zerocopy(ours, DATA)

                await trio.lowlevel.checkpoint()  # as send_zerocopy does first
                await trio.lowlevel.checkpoint()  # the result and the close come in the next turn
                ours.socket.close()


@pytest.mark.ring(allowed_operations=frozenset({"RECV", "SEND"}))
async def test_a_ring_that_does_not_allow_zero_copy_sends_copies() -> None:
    with connected("TCP") as (ours, theirs):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(closing, ours, partial(send_zerocopy, ours, DATA))
            assert await all_of(theirs) == DATA


async def test_the_memory_is_held_until_it_is_free() -> None:
    data = bytearray(DATA)
    with connected("TCP") as (ours, theirs):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(closing, ours, partial(send_zerocopy, ours, data))
            await wait_all_tasks_blocked()
            with pytest.raises(BufferError):
                data.clear()
            assert await all_of(theirs) == DATA
        data.clear()


async def test_only_a_reset_ends_the_wait_for_the_memory() -> None:
    """If the receiver does not read. Neither cancelling nor closing does."""
    ended = False
    progress = ZeroCopyProgress()

    async def send(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        nonlocal ended
        with scope:
            await send_zerocopy(stream, DATA, progress=progress)
        ended = True

    with connected("TCP") as (ours, _):
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, ours, scope)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            assert not ended
            reset = struct.pack("ii", 1, 0)
            ours.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, reset)
            await ours.aclose()
        assert scope.cancelled_caught
    assert 0 < progress.bytes_sent < SIZE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_cancelled_midway_it_has_sent_what_progress_says(run: str, kind: str) -> None:
    gone = set()

    async def one_round(steps: int) -> None:
        progress = ZeroCopyProgress()
        with connected(kind) as (ours, theirs):
            got = bytearray()
            scope = trio.CancelScope()

            async def send() -> None:
                with scope:
                    await send_zerocopy(ours, DATA, progress=progress)
                await ours.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                if steps % 2:
                    got += await theirs.receive_some(100_000)
                scope.cancel()
                got += await all_of(theirs)
        assert got == DATA[: progress.bytes_sent]
        gone.add(progress.bytes_sent)

    async def main() -> None:
        for steps in range(30):
            await one_round(steps)

    RUNS[run](main)
    assert gone - {0, SIZE}


@pytest.mark.parametrize("run", RUNS)
def test_two_tasks_cannot_send_on_one_stream(run: str) -> None:
    async def main() -> None:
        with connected("TCP") as (ours, theirs):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, ours, partial(send_zerocopy, ours, DATA))
                await wait_all_tasks_blocked()
                with pytest.raises(trio.BusyResourceError):
                    await ours.send_all(b"x")
                with pytest.raises(trio.BusyResourceError):
                    await send_zerocopy(ours, b"x")
                assert await all_of(theirs) == DATA

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_closed_and_broken_streams_raise_trios_errors(run: str) -> None:
    async def main() -> None:
        with connected("TCP") as (ours, _):
            await ours.send_eof()
            with pytest.raises(trio.ClosedResourceError):
                await send_zerocopy(ours, b"x")
            with pytest.raises(BrokenPipeError):
                await send_zerocopy(ours.socket, b"x")
            await ours.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await send_zerocopy(ours, b"x")
            with pytest.raises(OSError, match="Bad file descriptor"):
                await send_zerocopy(ours.socket, b"x", b"y")

    RUNS[run](main)


async def test_bad_arguments_are_refused() -> None:
    with connected("TCP") as (ours, theirs):
        with pytest.raises(TypeError):
            await send_zerocopy(ours, "text")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="contiguous"):
            await send_zerocopy(ours, memoryview(b"abcd")[::2])
        with pytest.raises(TypeError, match="must be a stream"):
            await send_zerocopy(3, b"x")  # type: ignore[arg-type]
        with trio.CancelScope() as scope:  # a checkpoint, even if there is nothing to do
            scope.cancel()
            await send_zerocopy(ours)
        assert scope.cancelled_caught
        await send_zerocopy(ours, memoryview(b"12345678").cast("I"))
        assert await theirs.receive_some() == b"12345678"
    datagrams = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
    with datagrams, pytest.raises(ValueError, match="SOCK_STREAM"):
        await send_zerocopy(datagrams, b"x")


async def test_it_tells_whether_the_kernel_copied() -> None:
    copied: list[int] = []
    with connected("TCP") as (ours, theirs):
        fd = ours.socket.fileno()
        await perform(operations.send_zc(fd, b"abc", on_copied=copied.append))
        await perform(operations.sendmsg_zc(fd, [b"de", b"fg"], on_copied=copied.append))
        await perform(operations.send_zc(fd, b"h"))
        assert copied == [3, 4]
        assert await theirs.receive_some() == b"abcdefgh"
