"""The interpreter exits while daemon threads use files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio
from children import in_thread, output_of, run_python
from trio.testing import wait_all_tasks_blocked

from trio_uring._files._bridge import _exit, current_files

if TYPE_CHECKING:
    from pathlib import Path

# Half of the calls wait in the kernel's workers, half complete at once.
DAEMONS = """
import sys, threading
import trio, trio_uring

async def main():
    path = trio.Path(sys.argv[1])
    for calls in range(1000000):
        await path.write_bytes(bytes(300000))
        for _ in range(10):
            await path.read_bytes()
        if calls == 2:
            {then}

many = threading.Semaphore(0)
for _ in range(2):
    threading.Thread(target=trio_uring.run, args=(main,), daemon=True).start()
for _ in range(2):
    many.acquire()
print("end")
"""


@pytest.mark.parametrize("number", range(3))
def test_exit_while_daemon_threads_use_files(tmp_path: Path, number: int) -> None:
    program = DAEMONS.format(then="many.release()")
    assert output_of(run_python(program, f"{tmp_path}/file")) == ["end"]


async def test_the_exit_does_not_wait_for_pipes() -> None:
    read_end, write_end = os.pipe()
    files = current_files()
    assert files is not None
    async with await trio.open_file(read_end, "rb", 0) as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read, 1)
            await wait_all_tasks_blocked()
            assert files.running == 0
            os.write(write_end, b"1")
            os.close(write_end)
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.read(1)
    assert files.running == 0


async def test_the_exit_waits_for_other_threads_only(tmp_path: Path) -> None:
    files = current_files()
    assert files is not None
    async with await trio.open_file(tmp_path / "file", "wb", 0) as file, trio.open_nursery() as n:
        n.start_soon(file.write, bytes(300_000))
        await wait_all_tasks_blocked()
        assert files.running == 1
        assert not _exit.must_wait()
        assert in_thread(_exit.must_wait)
    assert files.running == 0


async def test_after_the_exit_began_no_call_uses_a_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trio.Path(tmp_path, "file")
    files = current_files()
    assert files is not None
    async with await path.open("wb") as file:
        await file.write(b"buffered")
        monkeypatch.setattr(_exit, "thread", None)
        in_thread(_exit.begin)
        assert files.is_exiting
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(path.with_name("new").mkdir)
                nursery.start_soon(file.flush)
                await wait_all_tasks_blocked()
                assert len(nursery.child_tasks) == 2
                scope.cancel()
    assert file.closed
    assert (tmp_path / "file").read_bytes() == b"buffered"
    assert not (tmp_path / "new").exists()
    assert files.running == 0
