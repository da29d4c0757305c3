"""Several loops at once, which of them have a ring, and worker threads."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
from accounting import open_fds
from children import in_thread
from scenarios import cancel, close, datagrams, echo, others
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig, _run
from trio_uring._statistics import totals
from trio_uring.lowlevel import on_ring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Runner = Callable[..., Any]

REQUIRED = RingConfig(require=True)


async def backend() -> str:
    assert on_ring() == (io_statistics().backend == "io_uring")
    return str(io_statistics().backend)


def io_statistics() -> Any:
    return trio.lowlevel.current_statistics().io_statistics


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    """Uninstall after each test, so that it doesn't affect the next."""
    yield
    trio_uring.uninstall()
    assert trio.run(backend) == "epoll"
    assert in_thread(lambda: trio.run(backend)) == "epoll"


# --- Several loops at once ------------------------------------------------------------------


def test_loops_of_three_kinds_in_threads() -> None:
    async def on_asyncio() -> str:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            for _ in range(20):
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                writer.write(b"x")
                assert await reader.read(1) == b"x"
                writer.close()
                await writer.wait_closed()
        return "asyncio"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1))
        writer.close()
        await writer.wait_closed()

    async def on_trio() -> str:
        for scenario in (echo, cancel, close, datagrams):
            await scenario()
        return await backend()

    def run(kind: str) -> None:
        start.wait()
        for _ in range(3):
            if kind == "asyncio":
                ended = asyncio.run(on_asyncio())
            elif kind == "io_uring":
                ended = trio_uring.run(on_trio, ring=REQUIRED)
            else:
                ended = trio.run(on_trio)
            results.append((kind, ended))

    kinds = ["io_uring", "epoll", "asyncio", "io_uring", "epoll"]
    start = threading.Barrier(len(kinds))
    results: list[tuple[str, str]] = []
    threads = [threading.Thread(target=run, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted((kind, kind) for kind in kinds for _ in range(3))


def test_install_and_uninstall_while_others_start() -> None:
    """Each run has a ring from start to end, or none. Those that asked for one have it."""

    def switch() -> None:
        for _ in range(50):
            trio_uring.install(REQUIRED)
            trio_uring.uninstall()
        finished.set()

    async def main() -> str:
        a, b = trio.socket.socketpair()
        with a, b:
            await a.send(b"x")
            assert await b.recv(1) == b"x"
        return await backend()

    finished = threading.Event()
    switching = threading.Thread(target=switch)
    switching.start()
    seen = set()
    while not finished.is_set():
        seen.add(trio.run(main))
        assert trio_uring.run(main, ring=REQUIRED) == "io_uring"
    switching.join()
    assert seen <= {"io_uring", "epoll"}


def test_installing_is_for_every_thread_and_later_runs() -> None:
    async def main() -> str:
        trio_uring.install()  # runs that have begun are not changed
        return await backend()

    assert trio.run(main) == "epoll"
    assert trio.run(backend) == "io_uring"
    assert in_thread(lambda: trio.run(backend)) == "io_uring"
    assert trio_uring.run(backend) == "io_uring"
    trio_uring.uninstall()
    assert trio.run(backend) == "epoll"


def test_the_last_installation_counts() -> None:
    async def entries() -> int:
        return int(io_statistics().entries)

    for number in (8, 16, 8):
        trio_uring.install(RingConfig(entries=number))
        assert trio.run(entries) == number
    assert trio_uring.run(entries, ring=RingConfig(entries=32)) == 32
    assert trio.run(entries) == 8


# --- A choice is for one run ----------------------------------------------------------------


async def test_a_run_in_a_worker_thread_makes_its_own_choice() -> None:
    assert on_ring()
    assert await trio.to_thread.run_sync(trio.run, backend) == "epoll"
    assert await trio.to_thread.run_sync(trio_uring.run, backend) == "io_uring"
    assert on_ring()


async def test_a_run_in_a_run() -> None:
    for run in (trio_uring.run, trio.run):
        with pytest.raises(RuntimeError, match=r"Attempted to call run\(\) from inside a run\(\)"):
            run(backend)
    # It was not left for the next that starts in this thread, and for no other.
    assert await trio.to_thread.run_sync(trio.run, backend) == "epoll"


def test_a_run_in_a_run_leaves_no_choice_behind() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="from inside a run"):
            trio_uring.run(backend)

    trio_uring.run(main)
    assert trio.run(backend) == "epoll"


@pytest.mark.parametrize(
    "arguments",
    [
        {"ring": 7},
        {"instruments": 7},
        {"clock": 7},
        {"nonsense": 7},
    ],
)
def test_a_run_that_cannot_start_leaves_no_choice_behind(arguments: dict[str, Any]) -> None:
    before = open_fds()
    with pytest.raises((TypeError, AttributeError, trio.TrioInternalError)):
        trio_uring.run(backend, **arguments)
    assert trio.run(backend) == "epoll"
    assert open_fds() == before


def test_what_is_not_async_leaves_no_choice_behind() -> None:
    with pytest.raises(TypeError, match="expected an async function"):
        trio_uring.run(lambda: 7)  # type: ignore[arg-type, return-value]
    assert trio.run(backend) == "epoll"


@pytest.mark.parametrize("number", [7, "entries", {"entries": 8}])
def test_what_is_no_config(number: object) -> None:
    for call in (trio_uring.install, lambda ring: trio_uring.run(backend, ring=ring)):
        with pytest.raises(
            TypeError, match=f"ring must be a RingConfig, .*, not {type(number).__name__}"
        ):
            call(number)  # type: ignore[arg-type]


def test_totals_count_only_runs_on_the_ring() -> None:
    before = (totals.ring_runs, totals.completed["RECV"])
    trio_uring.run(echo, ring=REQUIRED)
    trio.run(echo)
    assert totals.ring_runs == before[0] + 1
    assert totals.completed["RECV"] > before[1]


# --- Threads that a loop works with ---------------------------------------------------------


async def test_tasks_and_threads_call_each_other() -> None:
    async def on_the_ring(number: int) -> int:
        a, b = trio.socket.socketpair()
        with a, b:
            await a.send(b"%d" % number)
            return int(await b.recv(10))

    def in_worker(number: int) -> int:
        assert trio.from_thread.run(on_the_ring, number) == number
        return trio.from_thread.run_sync(lambda: number)

    async def hop(number: int) -> None:
        assert await trio.to_thread.run_sync(in_worker, number) == number
        results.append(number)

    results: list[int] = []
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(hop, number)
    assert sorted(results) == list(range(100))


async def test_another_thread_wakes_the_loop() -> None:
    """Many times, both while the loop sleeps in the kernel and while it does not."""
    token = trio.lowlevel.current_trio_token()
    send, receive = trio.open_memory_channel[int](1000)

    def work() -> None:
        for number in range(1000):
            token.run_sync_soon(send.send_nowait, number)

    thread = threading.Thread(target=work)
    thread.start()
    with trio.fail_after(30):
        for number in range(1000):
            assert await receive.receive() == number
    thread.join()


async def test_a_thread_that_is_abandoned() -> None:
    release = threading.Event()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                await trio.to_thread.run_sync(release.wait, abandon_on_cancel=True)

            nursery.start_soon(work)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    release.set()
    await others()


# --- The environment ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "on_request", "installed"),
    [
        ("", "io_uring", "io_uring"),
        ("1", "io_uring", "io_uring"),
        ("On", "io_uring", "io_uring"),
        ("require", "io_uring", "io_uring"),
        ("off", "epoll", "epoll"),
        ("0", "epoll", "epoll"),
        (" OFF ", "epoll", "epoll"),
    ],
)
def test_the_environment_chooses_the_backend(
    setting: str, on_request: str, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_URING", setting)
    assert trio.run(backend) == "epoll"  # it is read when Python starts, not by each run
    assert trio_uring.run(backend) == on_request
    assert trio_uring.run(backend, ring=REQUIRED) == on_request
    trio_uring.install(REQUIRED)
    assert trio.run(backend) == installed


@pytest.mark.parametrize("word", ["false", "no", "none", "disabled", "requird", "2", "true", "yes"])
def test_an_unknown_word_in_the_environment_is_an_error(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a wish to switch io_uring off nor a wish to require it is misread."""
    trio_uring.install()
    monkeypatch.setenv("TRIO_URING", word)
    for start in (
        lambda: trio.run(backend),
        lambda: trio_uring.run(backend),
        lambda: trio_uring.run(backend, ring=REQUIRED),
        trio_uring.install,
    ):
        with pytest.raises(ValueError, match=f"TRIO_URING is '{word}': it takes 1, on, require"):
            start()
    trio_uring.uninstall()
    assert trio.run(backend) == "epoll"  # asked for nothing


def test_off_is_looked_at_when_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    trio_uring.install()
    monkeypatch.setenv("TRIO_URING", "off")
    assert trio.run(backend) == "epoll"
    monkeypatch.delenv("TRIO_URING")
    assert trio.run(backend) == "io_uring"


async def completed_opcodes() -> set[str]:
    await echo()
    await others()
    return set(io_statistics().completed)


SOCKETS = {"RECV", "SEND", "CONNECT"}
FILES = {"OPENAT", "READ"}


@pytest.mark.parametrize(
    ("disabled", "without"),
    [
        ("", set()),
        (",", set()),
        ("sockets", SOCKETS),
        ("files", {"OPENAT"}),
        (" files , sockets ", SOCKETS | FILES),
    ],
)
def test_layers_that_are_disabled(
    disabled: str, without: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_URING_DISABLE", disabled)
    completed = trio_uring.run(completed_opcodes, ring=REQUIRED)
    assert completed & without == set()
    assert (SOCKETS - without) <= completed
    assert "POLL_ADD" in completed  # the loop itself is on the ring


@pytest.mark.parametrize(
    ("disabled", "named"),
    [("socket", "socket"), ("files,nonsense,more", "more, nonsense"), ("Files", "Files")],
)
def test_a_layer_that_is_unknown(
    disabled: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()
    monkeypatch.setenv("TRIO_URING_DISABLE", disabled)
    message = f"TRIO_URING_DISABLE names {named}: it takes a list, separated by commas, of files"
    for _ in range(3):
        with pytest.raises(ValueError, match=message):
            trio_uring.run(backend)
    assert open_fds() == before
    assert trio.run(backend) == "epoll"  # a run without a ring does not care


@pytest.mark.parametrize(
    "start",
    [
        "trio_uring.run(trio.sleep, 0)",
        "trio_uring.install(); trio.run(trio.sleep, 0)",
        "trio_uring.install(); anyio.run(anyio.sleep, 0, backend='trio')",
    ],
)
def test_the_warning_of_a_fallback_names_the_line_that_starts_the_run(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = f"there is no ring for {start}"  # each reason is told once
    monkeypatch.setattr(_run, "why_no_core", reason)
    program = compile(start, "the_program.py", "exec")
    names = {"__name__": "__main__", "trio": trio, "trio_uring": trio_uring, "anyio": anyio}
    with pytest.warns(RuntimeWarning, match="falls back") as caught:
        exec(program, names)
    assert [(str(each.message)[-len(reason) :], each.filename) for each in caught] == [
        (reason, "the_program.py")
    ]
