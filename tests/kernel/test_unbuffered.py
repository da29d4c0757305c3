"""Calls on unbuffered files that need no bridge: appending, `fsync` and `fdatasync`."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from races import current_files
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_uring import fdatasync, fsync
from trio_uring._files import _unbuffered
from trio_uring._files._bridge import FilesRun

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fd_ledger")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@asynccontextmanager
async def appending(path: Path) -> AsyncIterator[Any]:
    """An unbuffered file to append to, which has done so once, and gets no bridge from now on."""
    async with await trio.open_file(path, "a+b", buffering=0) as file:
        await file.write(b"first ")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FilesRun, "call", None)
            yield file


async def test_they_need_no_bridge(path: Path) -> None:
    async with appending(path) as file:
        before = current_files().routes()["ring"]
        for call in (lambda: file.write(b"second"), lambda: fsync(file), lambda: fdatasync(file)):
            with assert_checkpoints():
                await call()
        assert path.read_bytes() == b"first second"
        assert current_files().routes()["ring"] == before + 3


async def test_one_call_after_the_other(path: Path) -> None:
    async with appending(path) as file:

        async def append(number: int) -> None:
            assert await file.write(b"%d" % number) == 1

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(append, number)
                nursery.start_soon(fdatasync, file)
        found = path.read_bytes()
        assert found[:6] == b"first "
        assert sorted(found[6:]) == sorted(b"0123456789")


async def test_what_is_written_in_part_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with appending(path) as file:
        real = _unbuffered.operations.write

        def write_half(fd: int, data: bytes, *args: Any, **keywords: Any) -> Any:
            return real(fd, data[: len(data) // 2], *args, **keywords)

        monkeypatch.setattr(_unbuffered.operations, "write", write_half)
        assert await file.write(b"second") == 3
        monkeypatch.undo()
        assert path.read_bytes() == b"first sec"
        assert await file.tell() == 9


@pytest.mark.parametrize("call", ["write", "fsync"])
async def test_cancelled_before_it_begins_it_does_nothing(path: Path, call: str) -> None:
    async with appending(path) as file:
        args = (b"second",) if call == "write" else ()
        before = current_files().routes()["ring"]
        with trio.CancelScope() as scope:
            scope.cancel()
            await getattr(file, call)(*args)
        assert scope.cancelled_caught
        assert path.read_bytes() == b"first "
        assert current_files().routes()["ring"] == before


async def test_cancelled_while_it_waits_for_its_turn(path: Path) -> None:
    async with appending(path) as file:
        raw = file.wrapped
        raw.busy = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.write, b"second")
            nursery.start_soon(fsync, file)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        raw.release()
        assert path.read_bytes() == b"first "
        await file.write(b"third")
        assert path.read_bytes() == b"first third"


async def test_once_begun_it_completes(path: Path) -> None:
    async with appending(path) as file:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def _() -> None:
                    await wait_all_tasks_blocked()
                    scope.cancel()

                assert await file.write(bytes(1 << 20)) == 1 << 20
        assert path.stat().st_size == 6 + (1 << 20)


async def test_closed(path: Path) -> None:
    async with appending(path) as file:
        file.wrapped.close()
        for call in (lambda: file.write(b"second"), lambda: fsync(file)):
            with pytest.raises(ValueError, match="I/O operation on closed file"):
                await call()


@pytest.mark.parametrize(
    "data", [b"", bytearray(b"second"), memoryview(b"second"), "text", 5, None]
)
async def test_other_data_is_written_as_by_the_standard_library(path: Path, data: Any) -> None:
    def outcome(call: Callable[[], object]) -> object:
        try:
            return call()
        except TypeError as exc:
            return repr(exc)

    async with await trio.open_file(path, "ab", buffering=0) as file:
        await file.write(b"first ")
        try:
            found: object = await file.write(data)
        except TypeError as exc:
            found = repr(exc)
    written = path.read_bytes()
    path.unlink()
    with path.open("ab", buffering=0) as expected:
        expected.write(b"first ")
        assert found == outcome(lambda: expected.write(data))
    assert written == path.read_bytes()


async def test_a_file_that_is_shared_is_appended_to_in_a_thread(path: Path) -> None:
    async with appending(path) as file:
        fd = file.fileno()  # from now on others may have it
        before = current_files().routes()["ring"]
        with pytest.raises(TypeError, match="not callable"):
            await file.write(b"second")  # on the bridge, which was removed
        os.write(fd, b"other")
        assert path.read_bytes() == b"first other"
        assert current_files().routes()["ring"] == before


async def test_a_file_that_becomes_shared_while_the_append_waits(path: Path) -> None:
    async with appending(path) as file:
        before = current_files().routes()
        file.wrapped.busy = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.write, b"second")
            await wait_all_tasks_blocked()
            file.fileno()  # from now on others may have it
            file.wrapped.release()
        assert path.read_bytes() == b"first second"
        assert current_files().routes() == {**before, "thread": before["thread"] + 1}
