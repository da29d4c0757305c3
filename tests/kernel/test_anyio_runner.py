"""The runner for AnyIO's pytest plugin: one run, driven in the calling thread."""

from __future__ import annotations

import subprocess
import sys
import threading
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sniffio
import trio
from children import CHILD_SECONDS, in_child
from trio.testing import MockClock

import trio_uring
from trio_uring import RingConfig
from trio_uring._run import RunIOManager
from trio_uring._trio_private import count_thread_hops
from trio_uring.anyio_backend import RingAwareBackend, TrioUringBackend, UringTestRunner
from trio_uring.lowlevel import on_ring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from anyio.abc import TestRunner


@pytest.fixture
def runner() -> Iterator[TestRunner]:
    with TrioUringBackend.create_test_runner({"ring": RingConfig(require=True)}) as runner:
        yield runner


def test_one_run_in_this_thread(runner: TestRunner) -> None:
    tokens: list[object] = []
    threads: list[int] = []

    class Watch(trio.abc.Instrument):
        def after_io_wait(self, timeout: float) -> None:
            threads.append(threading.get_ident())

    async def test() -> None:
        assert on_ring()
        assert sniffio.current_async_library() == "trio"
        trio.lowlevel.add_instrument(Watch())
        tokens.append(trio.lowlevel.current_trio_token())
        await trio.lowlevel.checkpoint()

    hops = count_thread_hops()
    runner.run_test(test, {})
    runner.run_test(test, {})
    assert tokens[0] is tokens[1]
    assert set(threads) == {threading.get_ident()}
    assert hops() == 0


def test_fixtures(runner: TestRunner) -> None:
    async def value(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return number

    events: list[object] = []

    async def opened(number: int) -> AsyncIterator[int]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            yield number
            tasks.cancel_scope.cancel()
        events.append("closed")

    async def test(number: int) -> None:
        events.append(number)

    assert runner.run_fixture(value, {"number": 3}) == 3
    for number in runner.run_asyncgen_fixture(opened, {"number": 4}):
        runner.run_test(test, {"number": number})
    assert events == [4, "closed"]


def test_exceptions(runner: TestRunner) -> None:
    async def fail(exc: BaseException) -> None:
        raise exc

    for exc in (LookupError("mine"), KeyboardInterrupt("mine"), SystemExit("mine")):
        with pytest.raises(type(exc), match="mine"):
            runner.run_test(fail, {"exc": exc})

    async def wait() -> None:
        await trio.lowlevel.checkpoint()

    runner.run_test(wait, {})


def test_sockets_between_two_tests(runner: TestRunner) -> None:
    """An operation is in flight while nobody drives the loop."""

    async def connected() -> AsyncIterator[tuple[Any, Any]]:
        left, right = trio.socket.socketpair()
        received: list[bytes] = []

        async def receive() -> None:
            received.append(await right.recv(100))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            yield left, received
        left.close()
        right.close()

    for left, received in runner.run_asyncgen_fixture(connected, {}):

        async def test(left: Any = left, received: Any = received) -> None:
            await left.send(b"data")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert received == [b"data"]

        runner.run_test(test, {})


def test_outside_nothing_runs(runner: TestRunner) -> None:
    async def test() -> None:
        assert trio.lowlevel.in_trio_task()

    assert not trio.lowlevel.in_trio_task()
    runner.run_test(test, {})
    assert not trio.lowlevel.in_trio_task()
    with pytest.raises(sniffio.AsyncLibraryNotFoundError):
        sniffio.current_async_library()


def test_time_passes_between_tests() -> None:
    clock = MockClock(autojump_threshold=0)

    async def sleep() -> float:
        await anyio.sleep(1000)
        return anyio.current_time()

    with UringTestRunner(clock=clock) as runner:
        assert runner.run_fixture(sleep, {}) == 1000
        clock.jump(500)
        assert runner.run_fixture(sleep, {}) == 2500


def test_nothing_to_run() -> None:
    with UringTestRunner():
        pass


def test_a_run_that_ends_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends(self: UringTestRunner) -> None:
        send, receive = anyio.create_memory_object_stream[Any](1)
        self._send_stream = send
        awaitable, _outcomes = await receive.receive()
        awaitable.close()
        receive.close()
        send.close()

    async def test() -> None:
        raise AssertionError

    def run() -> None:
        with UringTestRunner() as runner, pytest.raises(RuntimeError, match="in the middle"):
            runner.run_test(test, {})

    monkeypatch.setattr(UringTestRunner, "_run_tests_and_fixtures", ends)
    # Trio complains of its broken tasks when they are collected.
    assert in_child(run) == 0


def test_a_run_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        await trio.lowlevel.checkpoint()

    def crash(self: RunIOManager, events: object) -> None:
        raise LookupError("broken")

    def run() -> None:
        with UringTestRunner() as runner:
            runner.run_test(test, {})
            monkeypatch.setattr(RunIOManager, "process_events", crash)
            with pytest.raises(trio.TrioInternalError):
                runner.run_test(test, {})
            monkeypatch.undo()
            runner.run_test(test, {})  # a new run

    assert in_child(run) == 0  # as above


def test_which_runner_for_trio() -> None:
    assert not isinstance(RingAwareBackend.create_test_runner({}), UringTestRunner)
    trio_uring.install()
    try:
        assert isinstance(RingAwareBackend.create_test_runner({}), UringTestRunner)
    finally:
        trio_uring.uninstall()


def test_anyios_plugin(tmp_path: Path) -> None:
    """With AnyIO's plugin and fixtures, and with AnyIO's own runner, which uses guest mode."""
    (tmp_path / "test_it.py").write_text(
        dedent("""
        import anyio, pytest, trio_uring
        from trio_uring.lowlevel import on_ring

        RING = {"ring": trio_uring.RingConfig(require=True)}

        @pytest.fixture(scope="module", params=["trio_uring", ("trio_uring", RING), "trio"])
        def anyio_backend(request):
            return request.param

        @pytest.fixture(scope="module")
        async def ends(anyio_backend):
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
            async with listener:
                yield listener

        @pytest.mark.anyio
        async def test_ends(ends, anyio_backend_name):
            assert on_ring() == (anyio_backend_name == "trio_uring")
            assert await anyio.Path(__file__).exists()

        def test_plain(ends):
            assert ends
        """)
    )
    ran = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-W",
                "error",
                tmp_path,
            )
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    assert "6 passed" in ran.stdout, ran.stdout + ran.stderr
