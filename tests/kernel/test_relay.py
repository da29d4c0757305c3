"""`relay`: every byte arrives once and in order, and none is lost."""

from __future__ import annotations

import os
import signal
import socket as stdlib_socket
import struct
import sys
from contextlib import suppress
from functools import partial
from typing import Any, Final

import pytest
import trio
from accounting import open_fds
from children import output_of, run_python
from races import current_manager
from transfers import (
    KINDS,
    RUNS,
    all_of,
    closing,
    completed,
    connected,
    no_fds_but,
    tls_pair,
)
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from trio_uring import RelayProgress, relay
from trio_uring._transfers import _splice_pipes

DATA: Final = os.urandom((3 << 20) + 12345)

# What takes bytes through the program.
COPIES: Final = ("RECV", "SEND", "RECVMSG", "SENDMSG")


async def relayed(source: Any, destination: Any, **options: Any) -> int:
    """Relay, and send the end of the stream too."""
    count = await relay(source, destination, **options)
    await destination.send_eof()
    return count


@pytest.mark.usefixtures("fd_ledger")
@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_all_bytes_are_relayed(run: str, kind: str, to: str) -> None:
    async def one(data: bytes) -> None:
        progress = RelayProgress()
        with connected(kind) as (client, source), connected(to) as (destination, server):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, client, partial(client.send_all, data))
                nursery.start_soon(partial(relayed, source, destination, progress=progress))
                assert await all_of(server) == data
        assert progress == RelayProgress(len(data), b"")

    async def main() -> None:
        for data in (b"", b"x", DATA):
            await one(data)
        if run == "ring":
            assert _splice_pipes.current_pipes().free

    RUNS[run](main)


@pytest.mark.parametrize("disabled", [frozenset[str](), frozenset(["files"])])
@pytest.mark.parametrize("kind", KINDS)
async def test_the_bytes_stay_in_the_kernel(
    kind: str, disabled: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if files are used without the ring, as none are needed."""
    monkeypatch.setattr(current_manager(), "disabled", disabled)
    with connected(kind) as (client, source), connected(kind) as (destination, server):
        client.socket._sock.send(DATA[:10_000])  # type: ignore[attr-defined]
        before = completed(*COPIES)
        assert await relay(source, destination, count=10_000) == 10_000
        assert completed(*COPIES) == before
        got = b""
        while len(got) < 10_000:
            got += await server.receive_some()
        assert got == DATA[:10_000]


async def test_the_bytes_are_copied_where_sigpipe_would_kill() -> None:
    """splice(2) cannot be told to raise no signal."""
    with connected("UNIX") as (client, source), connected("UNIX") as (destination, server):
        client.socket._sock.send(DATA[:10_000])  # type: ignore[attr-defined]
        before = completed(*COPIES)
        handler = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            assert await relay(source, destination, count=10_000) == 10_000
        finally:
            signal.signal(signal.SIGPIPE, handler)
        assert completed(*COPIES) > before
        assert await server.receive_some() == DATA[:10_000]


async def test_other_objects_are_refused_without_anyio(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("anyio.abc", "anyio._backends._trio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with connected("UNIX") as (source, destination):
        for ends in ((source, object()), (object(), destination)):
            with pytest.raises(TypeError, match="must be a stream"):
                await relay(*ends)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", RUNS)
def test_it_relays_no_more_than_was_asked_for(run: str) -> None:
    async def main() -> None:
        with connected("TCP") as (client, source), connected("UNIX") as (destination, server):
            await client.send_all(b"head and body")
            assert await relay(source.socket, destination.socket, count=4) == 4
            assert await relay(source, destination, count=0) == 0
            assert await server.receive_some() == b"head"
            assert await source.receive_some() == b" and body"

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_streams_that_are_no_sockets_are_relayed_too(run: str) -> None:
    async def main() -> None:
        for through in (memory_stream_pair, None):
            with connected("TCP") as (client, source), connected("TCP") as (destination, server):
                middle = through() if through is not None else await tls_pair()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(closing, client, partial(client.send_all, DATA))
                    nursery.start_soon(relay_and_close, source, middle[0])
                    nursery.start_soon(relay_and_close, middle[1], destination)
                    assert await all_of(server) == DATA

    async def relay_and_close(source: Any, destination: Any) -> None:
        assert await relay(source, destination) == len(DATA)
        await destination.aclose()

    RUNS[run](main)


# --- Pipes ----------------------------------------------------------------------------------


async def test_waiting_for_the_source_holds_no_pipe() -> None:
    count = _splice_pipes.PIPES_MAX + 4
    pairs = [connected("UNIX") for _ in range(count)]
    made = [pair.__enter__() for pair in pairs]
    with connected("UNIX") as (destination, _):
        async with trio.open_nursery() as nursery:
            for _, source in made:
                nursery.start_soon(relay, source.socket, destination.socket)
            await wait_all_tasks_blocked()
            assert _splice_pipes.current_pipes().in_use == 0
            for client, _ in made:
                await client.aclose()
    for pair in pairs:
        pair.__exit__(None, None, None)


@pytest.mark.usefixtures("fd_ledger")
async def test_more_relays_than_pipes_all_end() -> None:
    """Further relays receive and send, and do not wait for a pipe."""
    count = _splice_pipes.PIPES_MAX + 4
    pairs = [(connected("TCP"), connected("UNIX")) for _ in range(count)]
    made = [(*a.__enter__(), *b.__enter__()) for a, b in pairs]
    async with trio.open_nursery() as nursery:
        for client, source, destination, _ in made:
            nursery.start_soon(closing, client, partial(client.send_all, DATA))
            nursery.start_soon(relayed, source, destination)
        await wait_all_tasks_blocked()
        assert _splice_pipes.current_pipes().in_use == _splice_pipes.PIPES_MAX
        for *_, server in reversed(made):
            assert await all_of(server) == DATA
    assert _splice_pipes.current_pipes().in_use == 0
    for a, b in pairs:
        a.__exit__(None, None, None)
        b.__exit__(None, None, None)


@pytest.mark.usefixtures("fd_ledger")
async def test_without_fds_for_a_pipe_it_copies() -> None:
    with (
        connected("UNIX") as (client, source),
        connected("TCP") as (destination, server),
        no_fds_but(1),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(closing, client, partial(client.send_all, DATA))
            nursery.start_soon(relayed, source, destination)
            assert await all_of(server) == DATA


class Thief(trio.abc.Instrument):
    """Receives the data of *sock* just before *victim* runs."""

    def __init__(self, sock: stdlib_socket.socket, victim: str) -> None:
        self.sock = sock
        self.victim = victim
        self.stolen = b""

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task.name == self.victim:
            with suppress(BlockingIOError):
                self.stolen += self.sock.recv(100)


async def test_a_source_that_is_readable_and_yet_empty_is_waited_for() -> None:
    """If somebody else received the data, it waits again, and holds no pipe."""
    with connected("TCP") as (client, source), connected("UNIX") as (destination, server):
        thief = Thief(source.socket._sock, "the relay")  # type: ignore[attr-defined]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relayed, source, destination, name="the relay")
            await wait_all_tasks_blocked()
            trio.lowlevel.add_instrument(thief)
            await client.send_all(b"stolen")
            while not thief.stolen:
                await trio.lowlevel.checkpoint()
            trio.lowlevel.remove_instrument(thief)
            await wait_all_tasks_blocked()
            assert _splice_pipes.current_pipes().in_use == 0
            await client.send_all(b"abc")
            await client.send_eof()
            assert await all_of(server) == b"abc"
        assert thief.stolen == b"stolen"


@pytest.mark.parametrize("run", RUNS)
def test_urgent_data_is_left_out(run: str) -> None:
    """It is left out, as by recv(2). splice(2) does not get past it (Linux 6.18)."""

    async def main() -> None:
        with connected("TCP") as (client, source), connected("TCP") as (destination, server):
            for data, flags in ((DATA[:40_000], 0), (b"!", stdlib_socket.MSG_OOB), (b"abc", 0)):
                assert await client.socket.send(data, flags) == len(data)
            await client.send_eof()
            assert await relayed(source, destination) == 40_003
            assert await all_of(server) == DATA[:40_000] + b"abc"

    RUNS[run](main)


# --- Cancellation ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_cancelled_midway_it_loses_no_byte(run: str, kind: str) -> None:
    """Bytes sent, bytes returned in the progress and bytes in the source are all bytes."""
    seen: set[tuple[bool, bool]] = set()

    async def one_round(steps: int) -> None:
        progress = RelayProgress()
        with connected(kind) as (client, source), connected(kind) as (destination, server):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, client, partial(client.send_all, DATA))
                got = bytearray()
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as inner:
                        inner.start_soon(partial(relay, source, destination, progress=progress))
                        for _ in range(steps):
                            await trio.lowlevel.checkpoint()
                        if steps % 3 == 0:
                            got += await server.receive_some(100_000)
                        if steps % 2:
                            await wait_all_tasks_blocked()
                        scope.cancel()
                await destination.aclose()
                got += await all_of(server)
                assert got == DATA[: progress.bytes_sent]
                assert got + progress.left + await all_of(source) == DATA
        seen.add((progress.bytes_sent > 0, len(progress.left) > 0))

    async def main() -> None:
        for steps in range(40):
            await one_round(steps)

    fds = open_fds()
    RUNS[run](main)
    assert open_fds() == fds
    assert (True, True) in seen


async def test_cancelled_before_it_begins_it_does_nothing() -> None:
    with connected("UNIX") as (client, source), connected("UNIX") as (destination, _):
        await client.send_all(b"abc")
        with trio.CancelScope() as scope:
            scope.cancel()
            await relay(source, destination)
        assert scope.cancelled_caught
        assert await source.receive_some() == b"abc"


# --- Errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_two_tasks_cannot_relay_from_or_to_one_stream(run: str) -> None:
    async def main() -> None:
        with connected("UNIX") as (client, source), connected("TCP") as (destination, server):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relayed, source, destination)
                await wait_all_tasks_blocked()
                for other in (
                    partial(destination.send_all, b"x"),
                    partial(relay, server, destination),
                    source.receive_some,
                ):
                    with pytest.raises(trio.BusyResourceError):
                        await other()
                await client.aclose()

    RUNS[run](main)


@pytest.mark.parametrize("as_stream", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_a_destination_that_breaks_is_an_error(run: str, *, as_stream: bool) -> None:
    async def main() -> None:
        progress = RelayProgress()
        with connected("UNIX") as (client, source), connected("UNIX") as (destination, server):
            await server.aclose()
            await client.send_all(b"abc")
            with pytest.raises(trio.BrokenResourceError if as_stream else BrokenPipeError):
                await relay(
                    source, destination if as_stream else destination.socket, progress=progress
                )
        assert progress == RelayProgress(0, b"abc")

    RUNS[run](main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_destination_raises_no_signal(kind: str) -> None:
    """Also if SIGPIPE would kill the process. Then it does not splice."""
    code = """
        import signal, sys, trio, trio_uring
        from transfers import connected

        async def main():
            with connected("UNIX") as (client, source), connected(sys.argv[1]) as (to, server):
                await client.send_all(bytes(100_000))
                await server.aclose()
                try:
                    while True:
                        await trio_uring.relay(source, to, count=1000)
                except trio.BrokenResourceError:
                    print("broken")

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        trio_uring.run(main)
    """
    assert output_of(run_python(code, kind)) == ["broken"]


@pytest.mark.parametrize("as_stream", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_a_source_that_breaks_is_an_error(run: str, *, as_stream: bool) -> None:
    async def main() -> None:
        with connected("TCP") as (client, source), connected("UNIX") as (destination, _):
            reset = struct.pack("ii", 1, 0)
            client.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, reset)
            await client.aclose()
            with pytest.raises(trio.BrokenResourceError if as_stream else ConnectionResetError):
                await relay(source if as_stream else source.socket, destination)

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_closing_an_end_ends_it(run: str) -> None:
    async def relay_closed(source: Any, destination: Any, progress: RelayProgress) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await relay(source, destination, progress=progress)

    async def main() -> None:
        progress = RelayProgress()
        with connected("UNIX") as (client, source), connected("UNIX") as (destination, server):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay_closed, source, destination, progress)
                await wait_all_tasks_blocked()
                await source.aclose()
            await relay_closed(source, destination, progress)
        with connected("UNIX") as (client, source), connected("UNIX") as (destination, server):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, client, partial(client.send_all, DATA))
                nursery.start_soon(relay_closed, source, destination, progress)
                await wait_all_tasks_blocked()
                await destination.aclose()
                got = await all_of(server)
                assert got == DATA[: progress.bytes_sent]
                assert got + progress.left + await all_of(source) == DATA
            with pytest.raises(OSError, match="Bad file descriptor"):
                await relay(client.socket, server)
        with connected("UNIX") as (client, source), connected("UNIX") as (destination, _):
            await destination.aclose()
            await client.send_all(b"abc")
            await relay_closed(source, destination, RelayProgress())
            assert await source.receive_some() == b"abc"  # nothing was taken for nobody

    RUNS[run](main)


async def test_bad_arguments_are_refused() -> None:
    with connected("TCP") as (source, destination):
        with pytest.raises(ValueError, match="0 or more"):
            await relay(source, destination, count=-1)
        with pytest.raises(TypeError, match="must be a stream"):
            await relay(3, destination)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="must be a stream"):
            await relay(source, object())  # type: ignore[arg-type]
        datagrams = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        with datagrams, pytest.raises(ValueError, match="SOCK_STREAM"):
            await relay(datagrams, destination)
        await source.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await relay(destination, source)
        with trio.CancelScope() as scope:  # a checkpoint, even if there is nothing to do
            scope.cancel()
            await relay(destination, destination, count=0)
        assert scope.cancelled_caught
