"""``trio-uring dump``: what another process sees of a run, and who may look."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
import trio
from children import (
    CHILD_SECONDS,
    clean_environment,
    output_of,
    run_python,
    said_by_command,
)
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring._cli._observed import NotObservedError, look_at
from trio_uring._inspection import address_of, inspection_is_on
from trio_uring.lowlevel import operations

if TYPE_CHECKING:
    from collections.abc import Iterator

ALL = 1000

# It prints a line when it waits, and ends when its standard input does.
PROGRAM = """
import os, sys, threading
import trio, trio_uring
from trio.testing import wait_all_tasks_blocked
from trio_uring.lowlevel import operations, perform

async def receive(stream):
    await stream.receive_some()

async def tick():
    await perform(operations.timeout(3600 * 10**9))

async def wait(event):
    await event.wait()

async def spin():
    while True:
        await trio.lowlevel.checkpoint()

async def main():
    left, right = trio.socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive, trio.SocketStream(left))
        if trio_uring.lowlevel.on_ring():
            nursery.start_soon(tick)
        nursery.start_soon(wait, trio.Event())
        await wait_all_tasks_blocked()
        {then}
        nursery.cancel_scope.cancel()

if __name__ == "__main__":
    trio_uring.run(main)
"""
SAY = "print('ready', flush=True)"
WAIT = f"{SAY}; await trio.to_thread.run_sync(sys.stdin.read)"
BLOCK = f"{SAY}; sys.stdin.read()"


@contextmanager
def program(code: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run *code*, and yield when it waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(code)],
        env={**clean_environment(), "TRIO_URING_INSPECT": "1", **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
            process.communicate(timeout=CHILD_SECONDS)
            assert process.returncode == 0
        finally:
            process.kill()  # nothing if it has ended


def dump(*arguments: object, status: int = 0) -> str:
    """Return what the command prints: its report, or why there is none."""
    return said_by_command("dump", *arguments, status=status)


def waits(run: dict[str, Any]) -> dict[str, str]:
    """Return what each task of the program waits for."""
    return {task["name"]: task["waits_for"] for task in run["tasks"]}


def test_what_each_task_waits_for() -> None:
    with program(PROGRAM.format(then=WAIT)) as process:
        [run] = json.loads(dump(process.pid, "--json"))
        text = dump(process.pid)
    found = waits(run)
    assert found["<init>"] == "its children"
    assert found["__main__.main"] == "trio.to_thread_run_sync"
    assert found["__main__.receive"].startswith("RECV fd ")
    assert found["__main__.tick"] == "TIMEOUT"
    assert found["__main__.wait"].endswith("wait")
    # Operations are timed, and nothing else is.
    seconds = {task["name"]: task["seconds"] for task in run["tasks"]}
    assert 0 < seconds.pop("__main__.receive") < CHILD_SECONDS
    assert 0 < seconds.pop("__main__.tick") < CHILD_SECONDS
    assert {*seconds.values()} == {None}
    assert run["in_flight"] == {"RECV": 1, "TIMEOUT": 1}
    assert run["statistics"]["in_flight"] == 2
    assert run["statistics"]["backend"] == "io_uring"
    assert run["tasks_total"] == len(run["tasks"])
    assert run["busy_in"] == []

    [line] = [line for line in text.splitlines() if "__main__.tick" in line]
    assert re.match(r" +__main__\.tick  \[TIMEOUT, [\d.]+ (µs|ms|s)\]  <string>:", line)
    assert line.endswith(" in tick")
    main = next(line for line in text.splitlines() if "__main__.main" in line)
    assert len(line) - len(line.lstrip()) > len(main) - len(main.lstrip())  # it is its child
    assert f"run in MainThread: io_uring, {run['statistics']['engine']} engine; " in text


def test_an_operation_that_tasks_wait_for_again_and_again() -> None:
    code = f"""
        import sys, trio, trio.testing, trio_uring

        async def accept(listener):
            async with trio_uring.accept_many(listener) as connections:
                async for connection in connections:
                    await connection.aclose()

        async def main():
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept, listener)
                await trio.testing.wait_all_tasks_blocked()
                {WAIT}
                nursery.cancel_scope.cancel()

        trio_uring.run(main)
    """
    with program(code) as process:
        [run] = look_at(process.pid, ALL)
    [accept] = [task for task in run["tasks"] if task["name"] == "__main__.accept"]
    assert accept["waits_for"].startswith("ACCEPT")
    assert accept["seconds"] is None  # that it was in flight for, not that the task waits


def test_an_operation_of_a_run_that_is_not_shown_is_not_timed() -> None:
    async def main() -> None:
        async def perform() -> None:
            await trio_uring.lowlevel.perform(operations.timeout(3600 * 10**9))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform)
            await wait_all_tasks_blocked()
            [task] = nursery.child_tasks
            assert task.custom_sleep_data.since == 0
            nursery.cancel_scope.cancel()

    trio_uring.run(main)


def test_a_task_that_is_cancelled_and_waits_all_the_same() -> None:
    code = f"""
        import os, sys, trio, trio.testing, trio_uring
        from trio_uring.lowlevel import operations, perform

        async def write(fd):
            operation = operations.read(fd, bytearray(1), -1)
            operation.cancellable = False  # as reads of regular files are not
            await perform(operation)

        async def main():
            reader, writer = os.pipe()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, reader)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    {WAIT}
                os.write(writer, b"x")

        trio_uring.run(main)
    """
    with program(code) as process:
        [run] = look_at(process.pid, ALL)
    [cancelled] = [task["waits_for"] for task in run["tasks"] if task["cancelled"]]
    assert cancelled.startswith("READ")


def test_a_loop_that_is_busy() -> None:
    with program(PROGRAM.format(then=BLOCK)) as process:
        text = dump(process.pid)
    assert "the loop does not answer; its thread is in:" in text
    assert "in main\n" in text
    assert "__main__.tick  [TIMEOUT, " in text
    assert "__main__.main  [its turn]" in text


def test_a_task_that_never_waits() -> None:
    then = f"nursery.start_soon(spin); {WAIT}"
    with program(PROGRAM.format(then=then)) as process:
        [run] = look_at(process.pid, ALL)
        # Of the next iteration, it may see what is before the task's step.
        [_], [later] = look_at(process.pid, ALL), look_at(process.pid, ALL)
    steps = [{task["name"]: task["steps"] for task in each["tasks"]} for each in (run, later)]
    assert waits(run)["__main__.spin"] == "its turn"
    assert steps[0]["__main__.spin"] < steps[1]["__main__.spin"]
    assert steps[0]["__main__.tick"] == steps[1]["__main__.tick"]


def test_no_more_tasks_than_were_asked_for() -> None:
    with program(PROGRAM.format(then=WAIT)) as process:
        [run] = look_at(process.pid, 2)
    assert [task["name"] for task in run["tasks"]] == ["<init>", "__main__.main"]
    assert run["tasks_total"] > 2


def test_a_run_without_a_ring() -> None:
    with program(PROGRAM.format(then=WAIT), TRIO_URING="off") as process:
        [run] = look_at(process.pid, ALL)
        text = dump(process.pid)
    assert run["statistics"]["backend"] == "epoll"
    assert run["in_flight"] == {}
    assert "run in MainThread: epoll; " in text


def test_runs_of_several_threads_and_runs_that_have_ended() -> None:
    code = """
        import sys, threading, trio, trio_uring

        both = threading.Barrier(2, lambda: print("ready", flush=True))
        event = threading.Event()

        async def main():
            await trio.to_thread.run_sync(both.wait)
            await trio.to_thread.run_sync(event.wait)

        trio_uring.run(trio.sleep, 0)
        threading.Thread(target=trio_uring.run, args=(main,), name="second").start()
        threading.Thread(target=lambda: (sys.stdin.read(), event.set())).start()
        trio_uring.run(main)
    """
    with program(code) as process:
        runs = look_at(process.pid, ALL)
    assert sorted(each["thread"] for each in runs) == ["MainThread", "second"]


def test_a_forked_child_shows_its_own_runs() -> None:
    code = f"""
        import os, sys, trio, trio_uring

        async def child(): {WAIT}
        async def parent(): await trio.to_thread.run_sync(os.waitpid, pid, 0)

        trio_uring.run(trio.sleep, 0)
        pid = os.fork()
        trio_uring.run(parent if pid else child)
    """
    with program(code) as process:
        [run] = look_at(process.pid, ALL)
        assert "__main__.parent" in waits(run)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        pid = int(children)
        [run] = look_at(pid, ALL)
        assert "__main__.child" in waits(run)


def test_a_process_without_a_run() -> None:
    code = f"import sys, trio, trio_uring; trio_uring.run(trio.sleep, 0); {BLOCK}"
    with program(code) as process:
        assert look_at(process.pid, ALL) == []
        assert dump(process.pid).endswith("it has no Trio run that asked for a ring just now\n")


# --- Who may look ---------------------------------------------------------------------------


def test_it_is_off_unless_asked_for() -> None:
    for off in "", "0", "off":
        with program(PROGRAM.format(then=WAIT), TRIO_URING_INSPECT=off) as process:
            [line] = dump(process.pid, status=1).splitlines()
        assert line.startswith(f"trio-uring: process {process.pid} shows no run: ")
        assert "start it with TRIO_URING_INSPECT=1" in line


@pytest.mark.parametrize("word", ["yes", "2"])
@pytest.mark.usefixtures("fd_ledger")
def test_an_unknown_word_is_an_error(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_URING_INSPECT", word)
    with pytest.raises(ValueError, match=f"TRIO_URING_INSPECT is '{word}': it takes 1, on, 0 or"):
        inspection_is_on()
    for setting in "on", "off":
        monkeypatch.setenv("TRIO_URING", setting)
        with pytest.raises(ValueError, match="TRIO_URING_INSPECT"):
            trio_uring.run(trio.sleep, 0)


def test_there_is_no_such_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert dump(child.pid, status=1) == f"trio-uring: there is no process {child.pid}\n"


def test_another_process_has_taken_the_name() -> None:
    with (
        program(PROGRAM.format(then=WAIT), TRIO_URING_INSPECT="0") as process,
        socket.socket(socket.AF_UNIX) as thief,
    ):
        thief.bind(address_of(process.pid))
        thief.listen()
        with pytest.raises(NotObservedError, match=f"process {os.getpid()} has taken the place"):
            look_at(process.pid, ALL)


@pytest.mark.parametrize(
    ("obstacle", "why"),
    [
        ("thief.bind(address_of(os.getpid()))", "[Errno 98] Address already in use"),
        ("sys.modules['trio_uring._inspection'] = None", "import of trio_uring._inspection halted"),
        ("_inspection.threading.Thread = refuse", "can't start new thread"),
    ],
    ids=["name taken", "module missing", "no threads"],
)
def test_what_cannot_be_shown_runs_all_the_same(obstacle: str, why: str) -> None:
    code = f"""
        import os, socket, sys, warnings
        import trio, trio_uring
        from trio_uring import _inspection
        from trio_uring._inspection import address_of

        def refuse(**kwargs):
            raise RuntimeError("can't start new thread")

        with socket.socket(socket.AF_UNIX) as thief, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            {obstacle}
            trio_uring.run(trio.sleep, 0)
            trio_uring.run(trio.sleep, 0)
        [warning] = caught
        print(warning.filename, warning.message)
    """
    [line] = output_of(run_python(code, environment={"TRIO_URING_INSPECT": "1"}))
    assert line.startswith(f"<string> TRIO_URING_INSPECT has no effect: {why}")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_refused() -> None:
    code = """
        import os, sys
        from trio_uring._cli._observed import NotObservedError, look_at
        os.setuid(int(sys.argv[2]))
        try:
            print(len(look_at(int(sys.argv[1]), 10)))
        except NotObservedError as exc:
            print(exc)
    """
    with program(PROGRAM.format(then=WAIT)) as process:
        [refused] = output_of(run_python(code, process.pid, 65534))
        [seen] = output_of(run_python(code, process.pid, 0))
    assert refused.startswith(f"process {process.pid} answers only the user that it runs as")
    assert seen == "1"


def test_a_peer_that_asks_nonsense_or_goes_away() -> None:
    with program(PROGRAM.format(then=WAIT)) as process:
        for request in (b"", b"x", b"-", b"\xff" * 16):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(address_of(process.pid))
                peer.sendall(request)
                peer.shutdown(socket.SHUT_WR)
                assert peer.recv(1) == b""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(address_of(process.pid))
            peer.sendall(b"9")
        assert len(look_at(process.pid, ALL)) == 1
