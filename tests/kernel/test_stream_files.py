"""Files over pipes, sockets and terminals that the program opened: no thread, no byte lost."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import random
import socket
import subprocess
import sys
import termios
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
import trio
from children import CHILD_SECONDS, TESTS, clean_environment, in_thread
from races import current_files
from trio.testing import wait_all_tasks_blocked

from trio_uring._files._stream_file import StreamFile, stream_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAM: Final = TESTS / "programs" / "stdio.py"

pytestmark = pytest.mark.usefixtures("fd_ledger")


# --- As a process ---------------------------------------------------------------------------


class Peer:
    """What talks to a child over its standard input and output."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "pipes":
            self.child_in, self._write_fd = os.pipe()
            self._read_fd, self.child_out = os.pipe()
        elif kind == "sockets":
            ours, theirs = socket.socketpair()
            self.child_in = theirs.detach()
            self._write_fd = self._read_fd = ours.detach()
            self.child_out = os.dup(self.child_in)
        else:
            self._write_fd, self.child_in = pty.openpty()
            self._read_fd = self._write_fd
            self.child_out = os.dup(self.child_in)
            settings = termios.tcgetattr(self.child_in)
            settings[1] &= ~termios.OPOST
            settings[3] &= ~termios.ECHO
            termios.tcsetattr(self.child_in, termios.TCSANOW, settings)

    def started(self) -> None:
        os.close(self.child_in)
        os.close(self.child_out)

    def say(self, data: bytes) -> None:
        os.write(self._write_fd, data)

    def end(self) -> None:
        if self.kind == "pipes":
            os.close(self._write_fd)
        elif self.kind == "sockets":
            with socket.socket(fileno=os.dup(self._write_fd)) as sock:
                sock.shutdown(socket.SHUT_WR)
        else:
            self.say(b"\x04")  # Ctrl-D

    def hear(self, size: int) -> bytes:
        heard = b""
        while len(heard) < size:
            heard += os.read(self._read_fd, size - len(heard))
        return heard

    def close(self) -> None:
        os.close(self._read_fd)


@pytest.mark.parametrize(
    ("kind", "wrapper", "ring"),
    [
        ("pipes", "trio", "0"),
        ("pipes", "trio", "require"),
        ("pipes", "anyio", "require"),
        ("sockets", "mcp", "require"),
        ("terminal", "trio", "require"),
        ("terminal", "mcp", "require"),
    ],
)
def test_a_process_echoes_its_stdin_without_threads(
    tmp_path: Path, kind: str, wrapper: str, ring: str
) -> None:
    report = tmp_path / "report"
    peer = Peer(kind)
    child = subprocess.Popen(
        [sys.executable, PROGRAM, wrapper, report],
        stdin=peer.child_in,
        stdout=peer.child_out,
        env={**clean_environment(), "TRIO_URING": ring},
    )
    peer.started()
    for number in range(10):  # each answer is awaited, so that the child waits for the next line
        line = f"line {number} é\n".encode()
        peer.say(line)
        assert peer.hear(4 + len(line)) == b"got " + line
    peer.end()
    assert child.wait(CHILD_SECONDS) == 0
    peer.close()
    counted = report.read_text()
    if ring == "0":
        assert counted == "None 2"  # on plain Trio's way, all 31 calls are made in a thread
    else:
        assert counted == "0 1"


# --- Helpers --------------------------------------------------------------------------------


def opened(fd: int, mode: str, **options: Any) -> Any:
    """Open *fd*, and wrap it. No thread is inside, although the test's process has threads."""
    file = open(fd, mode, **options)  # noqa: SIM115 (the test closes it)
    stream = stream_file(file)
    assert isinstance(stream, StreamFile)
    stream._is_new = False
    return trio.wrap_file(file)


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def threads() -> int:
    return current_files().in_thread


class Waiting:
    """A call that a test lets wait, and then cancels."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.scope = trio.CancelScope()

    async def run(self, call: Callable[..., Any], *args: object) -> None:
        with self.scope:
            self.results.append(await call(*args))


async def cancelled(call: Callable[..., Any], *args: object, before: Callable[[], object]) -> None:
    """Let a call wait, then do *before*, let it wait again, and cancel it."""
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.run, call, *args)
        await wait_all_tasks_blocked()
        before()
        await wait_all_tasks_blocked(0.001)
        waiting.scope.cancel()
    assert not waiting.results
    assert waiting.scope.cancelled_caught


# --- Reading --------------------------------------------------------------------------------


async def test_a_cancelled_readline_loses_no_byte(pipe: tuple[int, int]) -> None:
    text = opened(pipe[0], "r", encoding="utf-8")
    await cancelled(text.readline, before=lambda: os.write(pipe[1], "hal\u00fc".encode()[:-1]))
    await cancelled(text.readline, before=lambda: os.write(pipe[1], "\u00fc".encode()[1:]))
    os.write(pipe[1], b"o\nnext\n")
    assert await text.readline() == "hal\u00fco\n"
    assert text.wrapped.readline() == "next\n"
    assert threads() == 0
    os.close(pipe[1])
    text.wrapped.close()


async def test_a_synchronous_call_reads_first_what_a_cancelled_one_left(
    pipe: tuple[int, int],
) -> None:
    binary = opened(pipe[0], "rb")
    await cancelled(binary.read, 10, before=lambda: os.write(pipe[1], b"first"))
    os.write(pipe[1], b" second\nrest")
    assert binary.wrapped.readline() == b"first second\n"
    assert await binary.read1() == b"rest"
    os.close(pipe[1])
    assert await binary.read() == b""
    binary.wrapped.close()


async def test_what_a_synchronous_call_left_is_read_first(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"one\ntwo\nthr")
    text = opened(pipe[0], "r", encoding="utf-8")
    assert text.wrapped.readline() == "one\n"
    assert await text.readline() == "two\n"  # in a thread, as nobody knows how much text is left
    os.write(pipe[1], b"ee\nfour\nfi")
    assert [await text.readline() for _ in range(2)] == ["three\n", "four\n"]
    before = threads()
    os.write(pipe[1], b"ve\nsix\n")
    assert [await text.readline() for _ in range(2)] == ["five\n", "six\n"]
    await cancelled(text.readline, before=lambda: os.write(pipe[1], b"seven"))
    assert threads() <= before + 1
    os.close(pipe[1])
    assert await text.readline() == "seven"
    assert await text.readline() == ""
    text.wrapped.close()


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
@pytest.mark.parametrize("seed", range(5))
async def test_lines_of_text_end_where_python_s_own_end(
    pipe: tuple[int, int], newline: str | None, seed: int
) -> None:
    choices = random.Random(seed)
    pieces = ["a", "\u00fc", "\u20ac", "\n", "\r", "\r\n", "bc", "\n"]
    data = "".join(choices.choices(pieces, k=100)).encode()
    expected = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline=newline).readlines()
    text = opened(pipe[0], "r", encoding="utf-8", newline=newline)
    lines: list[str] = []

    async def read() -> None:
        lines.extend([line async for line in text])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        start = 0
        while start < len(data):
            size = choices.randrange(1, 9)
            os.write(pipe[1], data[start : start + size])
            start += size
            await wait_all_tasks_blocked()
        os.close(pipe[1])
    assert lines == expected
    await text.aclose()


CALLS: Final[list[tuple[str, tuple[Any, ...], bytes]]] = [
    ("read", (5,), b"ab\ncd"),
    ("read", (0,), b""),
    ("read", (), b"ab\ncdefgh\nij"),
    ("read1", (2,), b"ab"),
    ("read1", (), b"ab\ncdefgh\nij"),
    ("readline", (), b"ab\n"),
    ("readline", (1,), b"a"),
    ("peek", (), b"ab\ncdefgh\nij"),
]


@pytest.mark.parametrize(("name", "args", "expected"), CALLS)
async def test_binary_calls_return_what_python_s_own_return(
    pipe: tuple[int, int], name: str, args: tuple[Any, ...], expected: bytes
) -> None:
    data = b"ab\ncdefgh\nij"
    os.write(pipe[1], data)
    os.close(pipe[1])
    binary = opened(pipe[0], "rb")
    assert await getattr(binary, name)(*args) == expected
    rest = await binary.read()
    assert rest == (data if name == "peek" else data[len(expected) :])
    assert await binary.readlines() == []
    assert threads() == 0
    binary.wrapped.close()


async def test_reads_into_memory_and_unbuffered_ones(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"abcdefgh")
    binary = opened(os.dup(pipe[0]), "rb")
    memory = bytearray(3)
    assert (await binary.readinto(memory), memory) == (3, b"abc")
    assert (await binary.readinto1(memory), memory) == (3, b"def")
    assert binary.wrapped.read1() == b"gh"
    raw = opened(pipe[0], "rb", buffering=0)
    os.write(pipe[1], b"123456")
    assert await raw.read(2) == b"12"
    assert os.read(pipe[0], 1) == b"3"  # an unbuffered file takes no more than it was asked for
    assert (await raw.readinto(memory), memory) == (3, b"456")
    os.close(pipe[1])
    assert await raw.read() == b""
    assert await raw.readall() == b""
    assert threads() == 0
    raw.wrapped.close()
    binary.wrapped.close()


async def test_the_flag_of_the_pipe_is_not_changed_and_if_set_python_s_own_way_is_used(
    pipe: tuple[int, int],
) -> None:
    binary = opened(pipe[0], "rb")
    os.write(pipe[1], b"x")
    assert await binary.read1() == b"x"
    assert os.get_blocking(pipe[0])
    os.set_blocking(pipe[0], False)
    assert await binary.read(1) is None
    assert threads() == 1
    os.close(pipe[1])
    binary.wrapped.close()


async def test_calls_that_are_not_known_go_to_threads(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"abc\nd\ne\n")
    text = opened(pipe[0], "r", encoding="utf-8")
    assert await text.read(2) == "ab"
    assert threads() == 1
    with pytest.raises(TypeError):
        await text.readline("x")
    with pytest.raises(io.UnsupportedOperation):
        await text.write("x")
    assert await text.readline() == "c\n"
    os.close(pipe[1])
    assert await text.readlines() == ["d\n", "e\n"]
    with Path(os.devnull).open("rb") as nothing:
        assert stream_file(nothing) is None
    wide = trio.wrap_file(io.TextIOWrapper(io.BytesIO("x".encode("utf-16")), "utf-16"))
    assert await wide.read() == "x"
    text.wrapped.close()
    with pytest.raises(ValueError, match="closed file"):
        await text.readline()


async def test_anyio_s_files_and_a_thread_that_is_inside(pipe: tuple[int, int]) -> None:
    file = open(pipe[0], encoding="utf-8")  # noqa: SIM115 (closed below)
    wrapped = anyio.wrap_file(file)
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.append(file.readline()))
    thread.start()  # it is inside, or soon will be
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            lines.append(await wrapped.readline())

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        os.write(pipe[1], b"one\n")
        while not lines:  # one chunk with two lines would leave the other thread waiting
            await trio.lowlevel.checkpoint()
        os.write(pipe[1], b"two\n")
    await trio.to_thread.run_sync(thread.join)
    assert sorted(lines) == ["one\n", "two\n"]
    await wrapped.aclose()
    os.close(pipe[1])


async def test_a_subclass_that_reads_in_its_own_way_is_left_alone(pipe: tuple[int, int]) -> None:
    class Numbered(io.TextIOWrapper):
        def readline(self, size: int = -1, /) -> str:
            return "1 " + super().readline(size)

    os.write(pipe[1], b"line\n")
    os.close(pipe[1])
    text = Numbered(os.fdopen(pipe[0], "rb"), encoding="utf-8")
    assert stream_file(text) is None
    assert await trio.wrap_file(text).readline() == "1 line\n"
    assert await anyio.wrap_file(text).readline() == "1 "
    assert threads() == 2
    text.close()


async def test_closing_wakes_the_reader(pipe: tuple[int, int]) -> None:
    binary = opened(pipe[0], "rb")
    caught: list[str] = []

    async def read() -> None:
        with pytest.raises(ValueError, match="closed file"):
            await binary.read(1)
        caught.append("closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await binary.aclose()
    assert caught
    os.close(pipe[1])


async def test_one_call_at_a_time_in_the_order_of_the_calls(pipe: tuple[int, int]) -> None:
    binary = opened(pipe[0], "rb")
    lines: list[tuple[int, bytes]] = []

    async def read(number: int) -> None:
        lines.append((number, await binary.readline()))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(read, number)
            await wait_all_tasks_blocked()
        os.write(pipe[1], b"a\nb\nc\n")
    assert lines == [(0, b"a\n"), (1, b"b\n"), (2, b"c\n")]
    os.close(pipe[1])
    binary.wrapped.close()


# --- Writing --------------------------------------------------------------------------------


async def test_a_write_that_waits_is_not_interleaved_and_not_cancelled(
    pipe: tuple[int, int],
) -> None:
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    text = opened(pipe[1], "w", encoding="utf-8")
    scope = trio.CancelScope()

    async def write() -> None:
        with scope:
            await text.write("a" * 50_000)
            await text.flush()

    def read(into: list[bytes]) -> None:
        while len(b"".join(into)) < 50_002:
            into.append(os.read(pipe[0], 4096))

    received: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        reader = threading.Thread(target=read, args=(received,))
        reader.start()
        print("b", file=text.wrapped, flush=True)
    await trio.to_thread.run_sync(reader.join)
    assert b"".join(received) == b"a" * 50_000 + b"b\n"
    assert threads() == 0
    text.wrapped.close()
    os.close(pipe[0])


@pytest.mark.parametrize("waits", [False, True])
async def test_a_broken_pipe_is_reported(pipe: tuple[int, int], *, waits: bool) -> None:
    binary = opened(pipe[1], "wb", buffering=0)
    if waits:
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with pytest.raises(BrokenPipeError):
                    await binary.write(bytes(1_000_000))

            nursery.start_soon(write)
            await wait_all_tasks_blocked()
            os.close(pipe[0])
    else:
        os.close(pipe[0])
    with pytest.raises(BrokenPipeError):
        await binary.write(b"x")
    binary.wrapped.close()


async def test_many_lines_and_a_socket_without_sight_of_the_reader() -> None:
    with ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        ours.shutdown(socket.SHUT_WR)  # now each poll of the other side reports that
        sink = opened(os.dup(theirs.fileno()), "wb")
        size = 500_000
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                await sink.writelines([b"x" * 1000] * (size // 1000))
                await sink.flush()

            nursery.start_soon(write)
            received = 0
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours.dup()))
            while received < size:
                received += len(await stream.receive_some())
            await stream.aclose()
        assert threads() == 0
        await sink.aclose()


# --- Terminals ------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    settings = termios.tcgetattr(slave)
    settings[1] &= ~termios.OPOST
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    yield master, slave
    os.close(master)


async def test_input_of_a_terminal_may_be_stolen_while_a_task_waits(
    terminal: tuple[int, int],
) -> None:
    master, slave = terminal
    text = opened(slave, "r", encoding="utf-8")

    def steal() -> None:
        os.write(master, b"stolen\n")
        assert os.read(slave, 100) == b"stolen\n"

    await cancelled(text.readline, before=steal)
    os.write(master, b"mine\n")
    assert await text.readline() == "mine\n"
    os.write(master, b"\x04")
    assert await text.readline() == ""  # the end, once
    os.write(master, b"more\n")
    assert await text.readline() == "more\n"
    assert os.get_blocking(slave)
    assert threads() == 0
    text.wrapped.close()


async def test_a_terminal_that_does_not_read_holds_up_no_other_task(
    terminal: tuple[int, int],
) -> None:
    master, slave = terminal
    text = opened(slave, "w", encoding="utf-8")
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            await text.write("x" * 100_000)
            await text.flush()

        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        received = 0
        while received < 100_000:
            received += len(in_thread(lambda: os.read(master, 65536)))
            await trio.lowlevel.checkpoint()
    assert threads() == 0
    text.wrapped.close()


async def test_a_terminal_that_counts_bytes_or_time_is_read_in_a_thread(
    terminal: tuple[int, int],
) -> None:
    master, slave = terminal
    settings = termios.tcgetattr(slave)
    settings[3] &= ~termios.ICANON
    settings[6][termios.VMIN] = 2
    settings[6][termios.VTIME] = 0
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    binary = opened(slave, "rb", buffering=0)
    os.write(master, b"ab")
    assert await binary.read(2) == b"ab"
    assert threads() == 1
    settings[6][termios.VMIN] = 1
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    os.write(master, b"c")
    assert await binary.read(2) == b"c"
    assert threads() == 1
    binary.wrapped.close()


async def test_nothing_is_read_from_an_unbuffered_pipe(pipe: tuple[int, int]) -> None:
    binary = opened(pipe[0], "rb", buffering=0)
    os.write(pipe[1], b"abc")
    with trio.fail_after(CHILD_SECONDS):
        assert await binary.read(1) == b"a"
        assert await binary.read(0) == b""
        assert await binary.readinto(bytearray()) == 0
        assert await binary.read(9) == b"bc"
    binary.wrapped.close()
    os.close(pipe[1])
