"""Programs that Ctrl-C interrupts, at every instruction of the package and at any time."""

from __future__ import annotations

import dis
import gc
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from accounting import ByteLedger, open_fds
from trio.lowlevel import enable_ki_protection

import trio_uring
from trio_uring import RingConfig
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._trio_private import current_io_manager

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup  # type: ignore[import-not-found, unused-ignore]

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractContextManager
    from types import FrameType

_YIELD = dis.opmap["YIELD_VALUE"]
PACKAGE = str(Path(trio_uring.__file__).parent)


# --- Programs -------------------------------------------------------------------------------


class Unprotected:
    """A program with a mix of operations. The interrupt may come in any line of any task."""

    interrupts = 0

    async def main(self) -> None:
        with trio.socket.socket() as listener, tempfile.TemporaryDirectory() as directory:
            await listener.bind(("127.0.0.1", 0))
            listener.listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.serve, listener)
                with trio.socket.socket() as client:
                    await client.connect(listener.getsockname())
                    await client.send(b"ping")
                    await client.recv(100)
                    await client.sendmsg([b"pi", b"ng"])
                    await client.recvmsg_into([bytearray(10)])
                await self.pipe()
                async with await trio.open_file(f"{directory}/file", "wb+") as file:
                    await file.write(b"data")
                    await file.seek(0)
                    await file.read()
                nursery.cancel_scope.cancel()

    async def serve(self, listener: trio.socket.SocketType) -> None:
        sock, _ = await listener.accept()
        with sock:
            while data := await sock.recv(100):
                await sock.send(data)

    async def pipe(self) -> None:
        reader, writer = self.open_pipe()
        async with reader, writer:
            await writer.send_all(b"data")
            await reader.receive_some()

    @enable_ki_protection
    def open_pipe(self) -> tuple[trio.lowlevel.FdStream, trio.lowlevel.FdStream]:
        read, write = os.pipe()
        return trio.lowlevel.FdStream(read), trio.lowlevel.FdStream(write)

    def check(self) -> None:
        """Check nothing, as nothing is promised about an interrupted line."""


class Protected:
    """A program that is interrupted only where it waits. It counts every byte in and out."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.bytes = ByteLedger()
        self.piped = ByteLedger()
        self.connections = 0  # made, and not accepted yet
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.a, self.b = socket.socketpair()
        self.read, self.write = os.pipe()
        self.clients = [socket.socket() for _ in range(3)]

    @enable_ki_protection
    async def main(self) -> None:
        self.sender = trio.socket.from_stdlib_socket(self.a)
        self.receiver = trio.socket.from_stdlib_socket(self.b)
        reader = trio.lowlevel.FdStream(os.dup(self.read))
        listener = trio.socket.from_stdlib_socket(self.listener)
        for size in (1, 1000, 70_000):
            await self.counting(self.exchange, size)
        for client in self.clients:
            client.connect(self.listener.getsockname())
            self.connections += 1
            await self.counting(self.accept, listener)
        for size in (1, 1000):
            os.write(self.write, self.piped.take(size))
            await self.counting(self.receive_from_pipe, reader)
        reader._fd_holder.close()  # aclose() is a checkpoint

    @enable_ki_protection
    async def counting(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        try:
            await function(*args)
        except BaseException as exc:
            if not is_interrupt(exc):
                raise
            self.interrupts += 1

    @enable_ki_protection
    async def exchange(self, size: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.send, size)
            await self.receive()

    @enable_ki_protection
    async def send(self, size: int) -> None:
        await trio.lowlevel.checkpoint()  # the other waits by then
        sent = 0
        data = self.bytes.take(size)
        try:
            sent = await self.sender.send(data)
        finally:
            self.bytes.take_back(size - sent)

    @enable_ki_protection
    async def receive(self) -> None:
        self.bytes.received(await self.receiver.recv(65536))

    @enable_ki_protection
    async def accept(self, listener: trio.socket.SocketType) -> None:
        sock, _ = await listener.accept()
        self.connections -= 1
        sock.close()

    @enable_ki_protection
    async def receive_from_pipe(self, reader: trio.lowlevel.FdStream) -> None:
        self.piped.received(await reader.receive_some())

    def check(self) -> None:
        """Check that all data that was sent was received, or can be received now."""
        while self.bytes.missing:
            self.bytes.received(self.b.recv(65536))
        if self.piped.missing:
            self.piped.received(os.read(self.read, 65536))
        assert self.piped.missing == 0
        for _ in range(self.connections):
            self.listener.accept()[0].close()
        self.listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.listener.accept()
        for sock in (self.listener, self.a, self.b, *self.clients):
            sock.close()
        os.close(self.read)
        os.close(self.write)


class Alone(Unprotected):
    """One task without a nursery, which gives exactly a KeyboardInterrupt, as on plain Trio."""

    async def main(self) -> None:
        a, b = trio.socket.socketpair()
        with a, b, tempfile.TemporaryDirectory() as directory:
            for _ in range(5):
                await a.send(b"ping")
                await b.recv(100)
                with trio.move_on_after(0.001):
                    await b.recv(100)
                await trio.Path(directory, "file").write_bytes(b"data")
                await trio.Path(directory, "file").read_bytes()
            await self.pipe()


PROGRAMS: dict[str, Callable[[], Alone | Protected | Unprotected]] = {
    "alone": Alone,
    "protected": Protected,
    "unprotected": Unprotected,
}


# --- Interrupting ---------------------------------------------------------------------------


class AtStep:
    """Counts the executed instructions of the package, and interrupts before one of them."""

    def __init__(self, target: int) -> None:
        self.count = 0
        self.target = target

    def trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        # Python handles no signal between what an operation yields and the yield of its coroutine.
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] != _YIELD:
            self.count += 1
            if self.count == self.target:
                signal.raise_signal(signal.SIGINT)
        return self.trace

    def __enter__(self) -> None:
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


@contextmanager
def at_some_moment(seconds: float) -> Iterator[None]:
    """Interrupt after this time: in Python, or in the kernel."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Stopwatch:
    """Measures how long a program takes."""

    seconds = 0.0

    def __enter__(self) -> None:
        self.seconds = -time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic()


def is_interrupt(exc: BaseException) -> bool:
    """Return whether it is a KeyboardInterrupt, maybe in a group with errors of other tasks."""
    leaves = list(leaves_of(exc))
    return any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves) and all(
        isinstance(leaf, KeyboardInterrupt | ConnectionError) for leaf in leaves
    )


def leaves_of(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from leaves_of(inner)
    else:
        yield exc


def run(
    name: str,
    around: AbstractContextManager[None],
    inside: AbstractContextManager[None] | None = None,
) -> str:
    """Run a program, interrupted from *around* it or *inside* it, and return how it ended."""
    managers: list[UringIOManager] = []

    @enable_ki_protection
    async def main() -> None:
        manager = current_io_manager()
        assert isinstance(manager, UringIOManager)
        managers.append(manager)
        with inside or nullcontext():
            await program.main()

    program = PROGRAMS[name]()
    ending = "not interrupted"
    try:
        with around:
            trio_uring.run(main, ring=RingConfig(require=True))
    except BaseException as exc:
        exactly = type(exc) is KeyboardInterrupt
        if not (exactly if isinstance(program, Alone) else is_interrupt(exc)):
            raise
        ending = "interrupted"
    if program.interrupts:
        ending = "interrupted"
    gc.collect()
    program.check()
    for manager in managers:
        assert manager.ring.closed
        assert manager.statistics().in_flight == 0
    return ending


def differing(before: dict[int, str]) -> set[tuple[int, str]]:
    return set(open_fds().items()) ^ set(before.items())


def at_every_step(name: str, stride: int) -> None:
    """Interrupt before each *stride*-th instruction that the package runs for the program."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(name, nullcontext())  # what is imported late is imported
    before = open_fds()
    endings = Counter[str]()
    step = AtStep(1)
    while not step.count or step.count >= step.target:
        step = AtStep(step.target + stride)
        endings[run(name, step)] += 1
        assert open_fds() == before, f"step {step.target}: {differing(before)}"
    print(endings["interrupted"], endings["not interrupted"])


def at_random(name: str, rounds: int) -> None:
    """Interrupt at random times, mostly while it runs. Print the longest time to the end, too."""

    def interrupt(*_: object) -> None:
        nonlocal sent
        sent = time.monotonic()
        signal.raise_signal(signal.SIGINT)

    sent = longest = 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, interrupt)
    run(name, nullcontext())
    before = open_fds()
    endings = Counter[str]()
    for seed in range(rounds):
        stopwatch = Stopwatch()
        run(name, nullcontext(), stopwatch)
        # Of what it takes now, on this machine: later it would be over, mostly.
        seconds = random.Random(seed).uniform(0.02, 0.8) * stopwatch.seconds
        # Inside: Trio itself leaves things open where it is interrupted as it starts.
        ending = run(name, nullcontext(), at_some_moment(seconds))
        if ending == "interrupted":
            longest = max(longest, time.monotonic() - sent)
        endings[ending] += 1
        assert open_fds() == before, f"round {seed}: {differing(before)}"
    print(endings["interrupted"], endings["not interrupted"], longest)
