"""`fsync`, `fdatasync` and ``dsync``: what was written is on the disk when they return."""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
from races import current_files

import trio_uring
from trio_uring import fdatasync, fsync, open_positional
from trio_uring._engine import _file_calls
from trio_uring._engine._file_systems import FileSystem
from trio_uring._engine._ring import Ring
from trio_uring._files._raw import RingFileIO
from trio_uring._kernel.uapi import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio_uring.lowlevel import Operation

FSYNC_DATASYNC = 1  # of io_uring.h
MODES = ["wb", "w", "ab", "a", "r+b", "r+"]
SYNCS = [(fsync, "fsync"), (fdatasync, "fdatasync")]

pytestmark = pytest.mark.usefixtures("fd_ledger")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Operation[Any]]:
    """Every operation that starts."""
    found: list[Operation[Any]] = []
    push = Ring.push

    def recording(ring: Ring, operation: Operation[Any], user_data: int) -> bool:
        found.append(operation)
        return push(ring, operation, user_data)

    monkeypatch.setattr(Ring, "push", recording)
    return found


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """Which of os's functions was called, and what the file held then."""
    found: list[tuple[str, bytes]] = []
    for name in ("fsync", "fdatasync"):

        def call(name: str, real: Callable[[int], None], fd: int) -> None:
            with open(f"/proc/self/fd/{fd}", "rb") as file:
                found.append((name, file.read()))
            real(fd)

        monkeypatch.setattr(os, name, partial(call, name, getattr(os, name)))
    return found


def written(mode: str) -> Any:
    return b"data" if "b" in mode else "data"


# --- On the ring ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("sync", "name"), SYNCS)
async def test_what_was_buffered_is_written_first(
    tmp_path: Path,
    mode: str,
    sync: Callable[[Any], Any],
    name: str,
    started: list[Operation[Any]],
    synced: list[tuple[str, bytes]],
) -> None:
    path = tmp_path / "file"
    path.touch()
    async with await trio.open_file(path, mode) as file:
        await file.write(written(mode))
        assert path.read_bytes() == b""
        await sync(file)
        assert path.read_bytes() == b"data"
        await file.write(written(mode))
        await getattr(file, name)()
        assert path.read_bytes() == b"datadata"
    syncs = [operation for operation in started if operation.opcode == Opcode.FSYNC]
    flags = FSYNC_DATASYNC if sync is fdatasync else 0
    assert [operation.sqe[7] for operation in syncs] == [flags, flags]
    assert synced == []
    assert current_files().routes()["thread"] == 0


async def test_a_file_stays_private(tmp_path: Path) -> None:
    async with await trio.open_file(tmp_path / "file", "w+b") as file:
        await fsync(file)
        raw: Any = file.wrapped.raw
        assert not raw.is_shared


async def test_any_file_that_is_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"some bytes")
    async with await trio.open_file(path, "rb") as file:
        assert await file.read(4) == b"some"
        await fsync(file)
        assert await file.read() == b" bytes"
    async with await trio.open_file(path, "r+b", buffering=0) as raw:
        await raw.write(b"more")
        await fdatasync(raw)
    assert path.read_bytes() == b"more bytes"


async def test_a_file_of_anyio(tmp_path: Path, started: list[Operation[Any]]) -> None:
    async with await anyio.open_file(tmp_path / "file", "wb") as file:
        await file.write(b"data")
        await fdatasync(file)
        assert (tmp_path / "file").read_bytes() == b"data"
    assert [op.opcode for op in started].count(Opcode.FSYNC) == 1


@pytest.mark.parametrize("sync", [fsync, fdatasync])
async def test_what_may_ask_a_server_is_in_a_thread(
    tmp_path: Path,
    sync: Callable[[Any], Any],
    started: list[Operation[Any]],
    synced: list[tuple[str, bytes]],
) -> None:
    async with await trio.open_file(tmp_path / "file", "wb") as file:
        raw: Any = file.wrapped.raw
        raw.file_system = FileSystem.SERVER
        await file.write(b"data")
        await sync(file)
    assert synced == [(sync.__name__, b"data")]
    assert Opcode.FSYNC not in [operation.opcode for operation in started]


@pytest.mark.parametrize("sync", [fsync, fdatasync])
async def test_a_file_opened_by_other_means(
    tmp_path: Path, sync: Callable[[Any], Any], synced: list[tuple[str, bytes]]
) -> None:
    async with trio.wrap_file((tmp_path / "file").open("wb")) as file:
        await file.write(b"data")
        before = current_files().routes()["thread"]
        await sync(file)
        assert current_files().routes()["thread"] == before + 1
    assert synced == [(sync.__name__, b"data")]


async def test_a_file_that_is_used_waits_for_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RingFileIO, "nowait_write", False)
    order: list[str] = []
    async with await trio.open_file(tmp_path / "file", "wb", buffering=0) as file:

        async def write() -> None:
            await file.write(b"data")
            order.append("write")

        async def sync() -> None:
            await fsync(file)
            order.append("fsync")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(sync)
    assert order == ["write", "fsync"]


# --- Cancellation and errors, with a ring and without ---------------------------------------


async def check_cancellation(path: Path) -> None:
    async with await trio.open_file(path, "wb") as file:
        await file.write(b"data")
        with trio.CancelScope() as scope:
            scope.cancel()
            await fsync(file)
        assert scope.cancelled_caught
        assert path.read_bytes() == b""
        begun = trio.Event()

        async def sync() -> None:
            begun.set()
            await fsync(file)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync)
            await begun.wait()
            nursery.cancel_scope.cancel()
        assert path.read_bytes() == b"data"
        with trio.testing.assert_checkpoints():
            await fdatasync(file)


async def check_errors(path: Path) -> None:
    file = await trio.open_file(path, "wb")
    await file.aclose()
    with pytest.raises(ValueError, match="closed file"):
        await fsync(file)
    read_end, write_end = os.pipe()
    async with await trio.open_file(read_end, "rb") as pipe:
        for sync, real in ((fsync, os.fsync), (fdatasync, os.fdatasync)):
            with pytest.raises(OSError, match="Invalid") as expected:
                real(read_end)
            with pytest.raises(OSError, match="Invalid") as found:
                await sync(pipe)
            assert found.value.args == expected.value.args
            assert found.value.errno == errno.EINVAL
    os.close(write_end)
    text = await trio.open_file(path, "w")
    text.wrapped.detach().close()
    with pytest.raises(ValueError, match="detached"):
        await fsync(text)


async def check_full_disk(_path: Path) -> None:
    file = await trio.open_file("/dev/full", "wb")
    await file.write(b"data")
    with pytest.raises(OSError, match="No space") as error:
        await fsync(file)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        await file.aclose()


CHECKS = [check_cancellation, check_errors, check_full_disk]


@pytest.mark.parametrize("check", CHECKS)
async def test_on_the_ring(tmp_path: Path, check: Callable[[Path], Any]) -> None:
    await check(tmp_path / "file")


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_ring(tmp_path: Path, check: Callable[[Path], Any]) -> None:
    trio.run(check, tmp_path / "file")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("sync", "name"), SYNCS)
def test_threads_flush_too(
    tmp_path: Path,
    mode: str,
    sync: Callable[[Any], Any],
    name: str,
    synced: list[tuple[str, bytes]],
) -> None:
    (tmp_path / "file").touch()

    async def main() -> None:
        async with await trio.open_file(tmp_path / "file", mode) as file:
            await file.write(written(mode))
            await sync(file)
            assert not hasattr(file, name)  # the run did not ask for a ring

    trio.run(main)
    assert synced == [(name, b"data")]


def test_files_have_the_methods_only_in_runs_that_asked_for_a_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> list[bool]:
        async with await trio.open_file(tmp_path / "file", "wb") as file:
            if hasattr(file, "fsync"):
                await file.fsync()
                await file.fdatasync()
            return [hasattr(file, name) for _, name in SYNCS]

    assert trio_uring.run(main, ring=trio_uring.RingConfig(require=True)) == [True, True]
    assert trio.run(main) == [False, False]
    monkeypatch.setenv("TRIO_URING", "off")
    assert trio_uring.run(main) == [True, True]


def test_a_file_of_a_run_with_a_ring_in_one_without(tmp_path: Path) -> None:
    async def main() -> Any:
        file = await trio.open_file(tmp_path / "file", "wb")
        await file.write(b"data")
        return file

    file = trio_uring.run(main)
    trio.run(fsync, file)
    assert (tmp_path / "file").read_bytes() == b"data"
    file.wrapped.close()


# --- Positional files -----------------------------------------------------------------------


async def write_durably(path: Path) -> None:
    async with await open_positional(path, "w+") as file:
        assert await file.write_at(b"0123", 0, dsync=True) == 4
        assert await file.writev_at([b"45", b"67"], 4, dsync=True) == 4
        assert await file.write_at(b"89", 8) == 2
        with trio.testing.assert_checkpoints():
            await file.write_at(b"", 0, dsync=True)
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.write_at(b"no", 0, dsync=True)
        assert scope.cancelled_caught
        with pytest.raises(ValueError, match="offset"):
            await file.write_at(b"no", -1, dsync=True)
    assert path.read_bytes() == b"0123456789"


async def test_dsync_on_the_ring(tmp_path: Path, started: list[Operation[Any]]) -> None:
    await write_durably(tmp_path / "file")
    writes = [op for op in started if op.opcode in {Opcode.WRITE, Opcode.WRITEV}]
    assert [op.sqe[7] for op in writes[:2]] == [os.RWF_DSYNC] * 2
    assert current_files().routes()["thread"] == 0


def test_dsync_without_a_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    pwritev = os.pwritev

    def recording(fd: int, buffers: Any, offset: int, flag: int = 0) -> int:
        flags.append(flag)
        return pwritev(fd, buffers, offset, flag)

    monkeypatch.setattr(os, "pwritev", recording)
    trio.run(partial(write_durably, tmp_path / "file"))
    assert flags == [os.RWF_DSYNC, os.RWF_DSYNC, 0, os.RWF_DSYNC]


def test_without_the_core_space_is_reserved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("w+b") as file:
        monkeypatch.setattr(_file_calls, "why_no_core", "no core, for a test")
        _file_calls.fallocate(file.fileno(), 0, 4096, 0)
        assert os.fstat(file.fileno()).st_size == 4096
        with pytest.raises(OSError, match="no C core") as caught:
            _file_calls.fallocate(file.fileno(), 0, 4096, 1)
        assert caught.value.errno == errno.EOPNOTSUPP
        _file_calls.sync_file_range(file.fileno(), 0, 1, 1 << 10)  # without flags
        monkeypatch.undo()
        with pytest.raises(OSError, match="Invalid argument"):
            _file_calls.sync_file_range(file.fileno(), 0, 1, 1 << 10)
