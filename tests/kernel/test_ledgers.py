"""Ledgers of bytes, connections and fds, while operations are cancelled at random.

What was sent must be received, once and in order; who was connected must be accepted; and no fd may
be left. `nox -s ledgers` cancels 100,000 operations on each engine.
"""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from accounting import ByteLedger

import trio_uring
from trio_uring import RingConfig
from trio_uring._kernel import why_no_native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

CANCELLED: Final = int(os.environ.get("TRIO_URING_LEDGER_CANCELS", "3000"))
SEED: Final = int(os.environ.get("TRIO_URING_LEDGER_SEED", "20"))

# So many operations may pass for each that is cancelled: a third is, so this is far off.
OPERATIONS_MAX: Final = 20 * CANCELLED

STREAMS: Final = 6
OPERATIONS_ON_A_STREAM: Final = 60
CONNECTORS: Final = 3

# Small and large, to be done at once and to wait for room.
SIZES: Final = (1, 10, 500, 5_000, 60_000)
SEND_BUFFER: Final = 4096

KINDS: Final = ("send_all", "send", "receive_some", "recv", "recv_into", "accept", "connect")


class Cancels:
    """Performs operations, and cancels each of them after some steps of other tasks."""

    def __init__(self, seed: int, nursery: trio.Nursery) -> None:
        self.random = random.Random(seed)
        self._nursery = nursery
        self.cancelled = Counter[str]()
        self.completed = Counter[str]()

    @property
    def enough(self) -> bool:
        """Whether enough operations have been cancelled."""
        done = self.cancelled.total() + self.completed.total()
        assert done < OPERATIONS_MAX, self
        return self.cancelled.total() >= CANCELLED

    async def perform(self, kind: str, operation: Callable[[], Awaitable[Any]]) -> Any:
        """Return what *operation* returns, or None if it was cancelled."""
        assert kind in KINDS
        with trio.CancelScope() as scope:
            steps = self.random.choice((0, 1, 1, 2, 2, 3, 5, 8))
            if steps:
                self._nursery.start_soon(self._cancel_after, steps, scope)
            else:
                scope.cancel()
            result = await operation()
        if scope.cancelled_caught:
            self.cancelled[kind] += 1
            return None
        self.completed[kind] += 1
        return result

    @staticmethod
    async def _cancel_after(steps: int, scope: trio.CancelScope) -> None:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    def check(self) -> None:
        """Fail if a kind of operation never ended in one of the ways, which was then not tested."""
        for kind in KINDS:
            assert self.cancelled[kind], self
            assert self.completed[kind], self

    def __str__(self) -> str:
        return ", ".join(
            f"{kind} {self.cancelled[kind]} cancelled and {self.completed[kind]} completed"
            for kind in KINDS
        )


# --- Bytes ----------------------------------------------------------------------------------


async def connected(cancels: Cancels) -> tuple[trio.SocketStream, trio.SocketStream]:
    if cancels.random.random() < 0.5:
        a, b = trio.socket.socketpair()
    else:
        with trio.socket.socket() as listener:
            await listener.bind(("127.0.0.1", 0))
            listener.listen()
            a = trio.socket.socket()
            await a.connect(listener.getsockname())
            b, _ = await listener.accept()
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return trio.SocketStream(a), trio.SocketStream(b)


async def streams(cancels: Cancels) -> None:
    """Send and receive on one pair of streams after the other."""
    while not cancels.enough:
        a, b = await connected(cancels)
        ledger = ByteLedger()
        perhaps_sent = 0

        async def sending(stream: trio.SocketStream, ledger: ByteLedger) -> None:
            nonlocal perhaps_sent
            perhaps_sent = await send(cancels, stream, ledger)

        async with a, b, trio.open_nursery() as nursery:
            nursery.start_soon(sending, a, ledger)
            await receive(cancels, b, ledger)
        assert 0 <= ledger.missing <= perhaps_sent


async def send(cancels: Cancels, stream: trio.SocketStream, ledger: ByteLedger) -> int:
    """Send until a cancellation. Return how many bytes it may have sent."""
    choose = cancels.random
    perhaps_sent = 0
    for _ in range(OPERATIONS_ON_A_STREAM):
        if perhaps_sent or cancels.enough:
            break
        size = choose.randrange(1, choose.choice(SIZES) + 1)
        data = ledger.take(size)
        if choose.random() < 0.3:
            done = await cancels.perform("send_all", partial(whole, stream, data))
            perhaps_sent = 0 if done else size
        else:
            sent = await cancels.perform("send", partial(stream.socket.send, data))
            ledger.take_back(size - (sent or 0))
        for _ in range(choose.choice((0, 0, 1, 4))):  # the receiver waits
            await trio.lowlevel.checkpoint()
    stream.socket.shutdown(socket.SHUT_WR)
    return perhaps_sent


async def whole(stream: trio.SocketStream, data: bytes) -> bool:
    await stream.send_all(data)
    return True


async def receive(cancels: Cancels, stream: trio.SocketStream, ledger: ByteLedger) -> None:
    """Receive in every way, until the end of the stream."""
    choose = cancels.random
    sock = stream.socket
    buffer = bytearray(max(SIZES))
    while True:
        size = choose.choice(SIZES)
        kind = choose.choice(("receive_some", "recv", "recv_into"))
        if kind == "recv_into":
            with memoryview(buffer)[:size] as view:
                count = await cancels.perform(kind, partial(sock.recv_into, view))
            data = None if count is None else bytes(buffer[:count])
        elif kind == "recv":
            data = await cancels.perform(kind, partial(sock.recv, size))
        else:
            limit = choose.choice((size, None))
            data = await cancels.perform(kind, partial(stream.receive_some, limit))
        if data is None:
            continue
        if not data:
            return
        ledger.received(data)


# --- Connections ----------------------------------------------------------------------------


class Callers:
    """The callers that were connected, and those that were accepted."""

    def __init__(self) -> None:
        self.connected = set[int]()
        self.accepted = set[int]()
        self.calling = CONNECTORS


async def connect(cancels: Cancels, callers: Callers, path: str, first: int) -> None:
    """Connect repeatedly. Each caller that succeeds sends its number."""
    number = first
    while not cancels.enough:
        number += CONNECTORS
        with trio.socket.socket(socket.AF_UNIX) as sock:

            async def connecting(sock: trio.socket.SocketType) -> bool:
                await sock.connect(path)
                return True

            if await cancels.perform("connect", partial(connecting, sock)):
                callers.connected.add(number)
                await trio.SocketStream(sock).send_all(b"%d" % number)
    callers.calling -= 1


async def accept(cancels: Cancels, callers: Callers, listener: trio.SocketListener) -> None:
    """Accept until there are no more callers, and note their numbers."""

    async def accept_socket() -> trio.SocketStream:
        sock, _ = await listener.socket.accept()
        return trio.SocketStream(sock)

    while callers.calling or not callers.connected <= callers.accepted:
        way = cancels.random.choice((listener.accept, accept_socket))
        stream = await cancels.perform("accept", way)
        if stream is None:
            continue
        async with stream:
            number = b""
            with suppress(trio.BrokenResourceError):
                while data := await stream.receive_some():
                    number += data
        if number:  # the others were cancelled
            assert int(number) not in callers.accepted
            callers.accepted.add(int(number))


# --- All of it ------------------------------------------------------------------------------


async def ledgers(seed: int, directory: Path) -> Cancels:
    path = str(directory / "socket")
    callers = Callers()
    with trio.socket.socket(socket.AF_UNIX) as sock:
        await sock.bind(path)
        sock.listen(1)
        listener = trio.SocketListener(sock)
        async with trio.open_nursery() as cancelling:
            cancels = Cancels(seed, cancelling)
            async with trio.open_nursery() as nursery:
                for _ in range(STREAMS):
                    nursery.start_soon(streams, cancels)
                for number in range(CONNECTORS):
                    nursery.start_soon(connect, cancels, callers, path, number)
                nursery.start_soon(accept, cancels, callers, listener)
    assert callers.connected <= callers.accepted
    statistics: Any = trio.lowlevel.current_statistics().io_statistics
    assert statistics.in_flight == 0
    return cancels


@pytest.mark.parametrize("engine", ["native", "python"])
@pytest.mark.usefixtures("fd_ledger")
def test_nothing_is_lost_by_cancelling(
    engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if engine == "native" and why_no_native:
        pytest.skip(why_no_native)
    print(f"TRIO_URING_LEDGER_SEED={SEED} TRIO_URING_LEDGER_CANCELS={CANCELLED}")
    monkeypatch.setenv("TRIO_URING_ENGINE", engine)
    cancels = trio_uring.run(ledgers, SEED, tmp_path, ring=RingConfig(require=True))
    print(cancels)
    cancels.check()
