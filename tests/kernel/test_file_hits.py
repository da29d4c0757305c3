"""Calls on files that need neither the ring nor a bridge, as what they read is in memory."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
import trio
from accounting import steps_beside
from races import current_files
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

import trio_uring
from trio_uring._files._bridge import INLINE_MAX
from trio_uring._files._hits import PythonHit
from trio_uring._files._raw import RingFileIO

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Call = Callable[[Any], Awaitable[object]]

pytestmark = pytest.mark.usefixtures("fd_ledger", "no_deterministic_scheduling")

LINES: Final = b"".join(b"line %d\n" % number for number in range(5000))
AMPLE: Final = 1.0  # seconds

CALLS: Final[dict[str, tuple[tuple[str, ...], Call]]] = {
    # name: the modes of files that have it, and a call
    "read": (("rb", "r", "raw", "r+b", "r+"), lambda file: file.read(10)),
    "read all": (("rb", "r", "raw", "r+b", "r+"), lambda file: file.read()),
    "read none": (("rb", "r", "raw", "r+b", "r+"), lambda file: file.read(0)),
    "read text": (("rb",), lambda file: file.read("10")),
    "read1": (("rb", "r+b"), lambda file: file.read1(10)),
    "readall": (("raw",), lambda file: file.readall()),
    "readinto": (("rb", "raw", "r+b"), lambda file: file.readinto(bytearray(10))),
    "readinto1": (("rb", "r+b"), lambda file: file.readinto1(bytearray(10))),
    "readinto bytes": (("rb", "raw"), lambda file: file.readinto(b"read-only")),
    "peek": (("rb", "r+b"), lambda file: file.peek()),
    "readline": (("rb", "r", "raw", "r+b", "r+"), lambda file: file.readline()),
    "readlines": (("rb", "r", "raw", "r+b", "r+"), lambda file: file.readlines(100)),
    "seek": (("rb", "r", "raw", "r+b", "r+", "wb"), lambda file: file.seek(0)),
    "seek wrongly": (("rb", "r", "raw", "r+b", "r+", "wb"), lambda file: file.seek(0, 99)),
    "tell": (("rb", "r", "raw", "r+b", "r+", "wb"), lambda file: file.tell()),
    "flush": (("rb", "r", "raw", "r+b", "r+", "wb"), lambda file: file.flush()),
    "write bytes": (("r+b", "wb", "rb"), lambda file: file.write(b"bytes")),
    "write text": (("r+", "r"), lambda file: file.write("text")),
    "writelines": (("r+b", "wb", "rb"), lambda file: file.writelines([b"bytes"])),
    "truncate": (("r+b", "r+", "wb", "rb"), lambda file: file.truncate(100)),
    "fsync": (("r+b", "r+", "wb", "rb"), trio_uring.fsync),
    "aclose": (("rb", "r", "raw", "r+b", "r+", "wb"), lambda file: file.aclose()),
}
CASES: Final = [(name, mode) for name, (modes, _) in CALLS.items() for mode in modes]


async def opened(path: Path, mode: str) -> Any:
    if mode == "raw":
        return await trio.open_file(path, "rb", buffering=0)
    return await trio.open_file(path, mode)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(LINES)
    return path


def bridged() -> int:
    """Return how many calls did not run inline."""
    files = current_files()
    return files.on_ring + files.in_thread


def hit_of(method: Any) -> Any:
    return method.__self__.hit


# --- Checkpoints ----------------------------------------------------------------------------


async def check_every_method(path: Path) -> None:
    for name, mode in CASES:
        call = CALLS[name][1]
        file = await opened(path, mode)
        for _ in range(3):
            with assert_checkpoints(), suppress(OSError, ValueError, TypeError):
                await call(file)
        await file.aclose()
        with assert_checkpoints(), suppress(OSError, ValueError, TypeError):
            await call(file)
        with assert_checkpoints(), trio.CancelScope() as scope:
            scope.cancel()
            await call(file)
        path.write_bytes(LINES)


@pytest.mark.ring(turn_budget=0)
async def test_every_method_is_a_checkpoint(path: Path) -> None:
    await check_every_method(path)


@pytest.mark.ring(turn_budget=AMPLE)
async def test_every_method_counts_as_a_checkpoint_within_the_turn_budget(path: Path) -> None:
    await check_every_method(path)


@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if case[0] != "aclose"])
async def test_a_cancelled_call_did_nothing(path: Path, name: str, mode: str) -> None:
    call = CALLS[name][1]
    async with await opened(path, mode) as file:
        for _ in range(2):
            before = await file.tell()
            with trio.CancelScope() as scope:
                scope.cancel()
                await call(file)
            assert scope.cancelled_caught
            assert await file.tell() == before
            if mode != "wb" and "write" not in name:
                assert await file.readline()  # there is something buffered now


async def read_lines(path: Path, mode: str, times: int) -> int:
    async with await opened(path, mode) as file:
        await file.readline()
        return await steps_beside(file.readline, times)


@pytest.mark.ring(turn_budget=AMPLE)
async def test_what_need_not_wait_continues_within_the_turn_budget(path: Path) -> None:
    assert await read_lines(path, "r", 100) == 0
    assert await read_lines(path, "rb", 100) == 0
    async with await opened(path, "rb") as file:
        assert await steps_beside(partial(file.seek, 0), 100) == 0
        assert await steps_beside(partial(file.read, 100), 100) == 0


@pytest.mark.ring(turn_budget=0)
async def test_without_a_budget_each_call_lets_others_run(path: Path) -> None:
    assert await read_lines(path, "r", 10) >= 9
    assert await read_lines(path, "rb", 10) >= 9


@pytest.mark.ring(turn_budget=AMPLE)
async def test_with_an_instrument_each_call_lets_others_run(path: Path) -> None:
    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            pass

    instrument = Steps()
    trio.lowlevel.add_instrument(instrument)
    try:
        assert await read_lines(path, "rb", 10) >= 9
    finally:
        trio.lowlevel.remove_instrument(instrument)


def test_under_a_mock_clock_each_call_lets_others_run(path: Path) -> None:
    config = trio_uring.RingConfig(require=True, turn_budget=AMPLE)
    clock = trio.testing.MockClock(rate=1)
    for mode in ("r", "rb"):
        assert trio_uring.run(read_lines, path, mode, 10, ring=config, clock=clock) >= 9


@pytest.mark.ring(turn_budget=AMPLE)
async def test_an_error_is_raised_by_the_direct_call(path: Path) -> None:
    async with await opened(path, "rb") as file:
        await file.readline()
        with pytest.raises(ValueError, match="whence"):
            await file.seek(0, 99)
    with pytest.raises(ValueError, match="closed"):
        await file.read(1)
    with pytest.raises(ValueError, match="closed"):
        await file.seek(0)


# --- What is not in memory ------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 3, 4096, INLINE_MAX])
@pytest.mark.parametrize("mode", ["rb", "raw"])
async def test_a_part_and_its_rest(path: Path, mode: str, budget: int) -> None:
    """The hit reads as much as its budget allows; a bridge reads the rest."""
    whole = LINES * 20
    path.write_bytes(whole)
    async with await opened(path, mode) as file:
        for method in (file.read, file.readinto):
            hit_of(method).budget = budget
        done = 0
        for size in (10, 100, 4096, 5000, 300_000):
            assert await file.read(size) == whole[done : done + size]
            done += size
            buffer = bytearray(size)
            assert await file.readinto(buffer) == size
            assert buffer == whole[done : done + size]
            done += size
        assert await file.read() == whole[done:]
        assert await file.read() == b""


@pytest.mark.parametrize("budget", [0, 3, 4096, INLINE_MAX])
async def test_lines_in_parts(path: Path, budget: int) -> None:
    long = b"x" * 20_000 + b"\n"
    path.write_bytes(LINES + long + b"the end")
    async with await opened(path, "rb") as file:
        hit_of(file.readline).budget = budget
        hit_of(file.read1).budget = hit_of(file.peek).budget = budget
        start = await file.peek(1)
        assert start
        assert LINES.startswith(start)
        start = await file.read1(4)
        assert LINES.startswith(start)
        start += await file.readline(2)
        assert await file.tell() == len(start) <= 6
        whole = start + b"".join([line async for line in file])
        assert whole == LINES + long + b"the end"


@pytest.mark.parametrize("budget", [0, 3, INLINE_MAX])
async def test_readinto1_reads_as_much_as_the_standard_library(path: Path, budget: int) -> None:
    async with await trio.open_file(path, "rb", buffering=16) as file:
        hit_of(file.readinto1).budget = budget
        with path.open("rb", buffering=16) as expected:
            for size in (10, 100, 10, 10):  # 100 bytes: what is buffered, and one read of the rest
                found, buffer = bytearray(size), bytearray(size)
                assert await file.readinto1(found) == expected.readinto1(buffer)
                assert found == buffer
                assert await file.tell() == expected.tell()


async def test_a_part_in_hand_is_not_lost_if_cancelled(path: Path) -> None:
    async with await opened(path, "raw") as file:
        hit_of(file.read).budget = 3
        assert await file.read(10) == LINES[:10]
        file.wrapped._nowait_read = False  # the rest is read on the ring
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel, nursery.cancel_scope)
            data = await file.read(10)
            await trio.sleep_forever()
        assert data == LINES[10:20]


async def cancel(scope: trio.CancelScope) -> None:
    scope.cancel()


async def test_evicted_pages_are_read_on_the_ring(path: Path) -> None:
    path.write_bytes(bytes(1 << 20))
    async with await opened(path, "raw") as file:
        fd = io.FileIO.fileno(file.wrapped)
        os.fsync(fd)
        before = bridged()
        for _ in range(20):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            await file.seek(0)
            assert await file.read(1 << 15) == bytes(1 << 15)
            assert await file.tell() == 1 << 15
        if bridged() == before:
            pytest.skip("this file system does not evict pages")


# --- What must not be read directly ---------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Make hits that read note that they do."""
    made: list[object] = []
    readinto = PythonHit.readinto

    def noting(self: PythonHit, buffer: Any) -> int | None:
        made.append(self)
        return readinto(self, buffer)

    monkeypatch.setattr(PythonHit, "readinto", noting)
    return made


@pytest.fixture
def python_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the hits in Python, whose calls a test can watch."""
    monkeypatch.setattr("trio_uring._files._hits.native", type("", (), {"FileHit": PythonHit}))


def by_number(path: Path, _opener: object) -> Any:
    return trio.open_file(os.open(path, os.O_RDONLY), "rb")


def by_opener(path: Path, _opener: object) -> Any:
    return trio.open_file(path, "rb", opener=os.open)


async def after_fileno(path: Path, _opener: object) -> Any:
    file = await trio.open_file(path, "rb")
    file.fileno()
    return file


async def after_a_fork(path: Path, _opener: object) -> Any:
    file = await trio.open_file(path, "rb")
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return file


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("python_hits")
@pytest.mark.parametrize("how", [by_number, by_opener, after_fileno, after_a_fork])
async def test_a_position_that_others_may_move(
    path: Path, how: Callable[..., Any], tried: list[object]
) -> None:
    async with await how(path, None) as file:
        assert await file.read(5) == LINES[:5]
        assert await file.readline() == b"0\n"
        assert await file.seek(0) == 0
        assert await file.read() == LINES
    assert not tried


@pytest.mark.usefixtures("python_hits")
async def test_a_private_file_is_read_directly(path: Path, tried: list[object]) -> None:
    async with await opened(path, "rb") as file:
        assert await file.read(5) == LINES[:5]
    assert tried


@pytest.mark.usefixtures("python_hits")
async def test_a_pipe(tried: list[object]) -> None:
    read_end, write_end = os.pipe()
    async with await trio.open_file(read_end, "rb") as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read, 3)
            await wait_all_tasks_blocked()
            os.write(write_end, b"abc")
        os.close(write_end)
        assert await file.read() == b""
    assert not tried


@pytest.mark.parametrize("kind", [type("MyInt", (int,), {}), bool])
async def test_unusual_arguments(path: Path, kind: type[int]) -> None:
    async with await opened(path, "rb") as file:
        assert await file.read(kind(1)) == LINES[:1]
        with pytest.raises(TypeError):
            await file.read(1, 2)
        with pytest.raises(TypeError):
            await file.read("1")
        with pytest.raises(OverflowError):
            await file.read(1 << 70)


async def test_a_method_is_a_coroutine_function_named_as_in_trio(path: Path) -> None:
    async with await opened(path, "rb") as file:
        assert file.read.__name__ == "read"
        assert file.read.__qualname__ == "AsyncIOWrapper.read"
        assert "BufferedReader.read" in file.read.__doc__


# --- Lines of text --------------------------------------------------------------------------


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16", "utf-8-sig"])
async def test_lines_of_text_are_the_standard_librarys(
    tmp_path: Path, newline: str | None, encoding: str
) -> None:
    text = "".join(f"{number}\xe9\r\n{number}\r{number}\n" for number in range(3000))
    path = tmp_path / "text"
    path.write_bytes(text.encode(encoding))
    async with await trio.open_file(path, encoding=encoding, newline=newline) as file:
        with path.open(encoding=encoding, newline=newline) as expected:
            assert [line async for line in file] == list(expected)
            expected.seek(await file.seek(0))
            for _ in range(3000):
                assert await file.readline(3) == expected.readline(3)


async def test_lines_read_elsewhere_are_not_counted_on(path: Path) -> None:
    """What the program reads through ``wrapped`` is missing from the count of decoded lines."""
    expected = LINES.decode().splitlines(keepends=True)
    async with await opened(path, "r") as file:
        assert await file.readline() == expected[0]
        done = 1
        for wanted in expected[1:2500]:
            assert file.wrapped.readline() == wanted
            done += 1
        assert [line async for line in file] == expected[done:]


@pytest.mark.parametrize("name", ["read", "readlines", "seek", "tell", "truncate", "write"])
async def test_other_calls_between_lines_of_text(path: Path, name: str) -> None:
    calls: dict[str, Callable[[Any], Any]] = {
        "read": lambda file: file.read(1000),
        "readlines": lambda file: file.readlines(1000),
        "seek": lambda file: file.seek(100),
        "tell": lambda file: file.tell(),
        "truncate": lambda file: file.truncate(30_000),
        "write": lambda file: file.write("written\n" * 200),
    }
    results: list[list[object]] = []
    copy = path.with_name("copy")
    copy.write_bytes(LINES)
    async with await opened(path, "r+") as file:
        ours: list[object] = [await file.readline() for _ in range(10)]
        ours.append(await calls[name](file))
        ours.extend([line async for line in file])
    with copy.open("r+") as file:
        results.append([file.readline() for _ in range(10)])
        results[0].append(calls[name](file))
        results[0].extend(iter(file.readline, ""))
    assert ours == results[0]
    assert path.read_bytes() == copy.read_bytes()


async def test_a_task_that_waits_for_the_file_sees_no_lines_of_others(path: Path) -> None:
    expected = LINES.decode().splitlines(keepends=True)
    seen: list[str] = []
    async with await opened(path, "r") as file:

        async def read() -> None:
            while line := await file.readline():
                seen.append(line)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(read)
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("errors", ["strict", "replace"])
async def test_undecodable_lines(tmp_path: Path, errors: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"good\n" * 3000 + b"\xff\n" + b"good\n" * 3000)
    results: list[list[object]] = [[], []]
    async with await trio.open_file(path, encoding="utf-8", errors=errors) as file:
        for _ in range(6002):
            try:
                results[0].append(await file.readline())
            except UnicodeDecodeError as exc:
                results[0].append(str(exc))
    with path.open(encoding="utf-8", errors=errors) as file:
        for _ in range(6002):
            try:
                results[1].append(file.readline())
            except UnicodeDecodeError as exc:
                results[1].append(str(exc))
    assert results[0] == results[1]


# --- All of a text --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 8191, 65535, 65536, 65537, 300_000])
@pytest.mark.parametrize("budget", [0, 3, INLINE_MAX])
async def test_all_of_a_text_is_the_standard_librarys(path: Path, size: int, budget: int) -> None:
    path.write_bytes((b"line\r\n" * (size // 6 + 1))[:size])
    async with await trio.open_file(path) as file:
        hit_of(file.read).budget = budget
        with path.open() as expected:
            for start, more in ((0, 0), (0, 1), (3, 0), (3, 5), (size, 0)):
                assert await file.seek(start) == expected.seek(start)
                for _ in range(more):
                    assert await file.readline() == expected.readline()
                assert await file.read() == expected.read()
                assert await file.tell() == expected.tell()
                assert await file.read(None) == await file.read(-1) == ""
                assert await file.readline() == ""
            assert file.newlines == expected.newlines


async def test_a_short_text_is_read_directly(path: Path) -> None:
    async with await trio.open_file(path) as file:
        before = bridged(), current_files().idle[:]
        assert await file.read() == LINES.decode()
        assert before == (bridged(), current_files().idle)


async def test_a_text_with_something_to_write_is_read_afterwards(path: Path) -> None:
    async with await trio.open_file(path, "r+") as file:
        assert await file.write("LINE") == 4
        assert await file.read() == LINES[4:].decode()
        await file.seek(0)
        assert await file.read() == "LINE" + LINES[4:].decode()


async def test_a_text_that_cannot_be_decoded(path: Path) -> None:
    path.write_bytes(b"good\n\xff\nbad")
    async with await trio.open_file(path, encoding="utf-8") as file:
        with path.open(encoding="utf-8") as expected:
            with pytest.raises(UnicodeDecodeError) as caught:
                await file.read()
            with pytest.raises(UnicodeDecodeError) as wanted:
                expected.read()
            assert caught.value.args == wanted.value.args
            assert await file.read() == expected.read()
            assert await file.tell() == expected.tell()


async def test_a_closed_text_is_not_read(path: Path) -> None:
    file = await trio.open_file(path)
    await file.aclose()
    with pytest.raises(ValueError, match="closed file"):
        await file.read()


async def test_finalisers_of_other_files_block_as_always(path: Path) -> None:
    """`RingFileIO` reads without waiting only inside its own file's call."""
    other = RingFileIO(str(path), "r")
    async with await opened(path, "rb") as file:
        assert await file.readline() == b"line 0\n"
        assert other.readall() == LINES
    other.close()


# --- AnyIO ----------------------------------------------------------------------------------


async def open_with_anyio(path: Path, mode: str) -> Any:
    if mode == "raw":
        return await anyio.open_file(path, "rb", buffering=0)
    return await anyio.open_file(path, mode)


async def use_async_file(path: Path) -> None:
    async with await open_with_anyio(path, "rb") as file:
        assert await file.read(5) == LINES[:5]
        assert await file.readline() == b"0\n"
        assert await file.tell() == 7
        assert await file.seek(-7, os.SEEK_END) == len(LINES) - 7
        assert await file.seek(offset=2) == 2
        assert await file.read1(size=2) == b"ne"
        buffer = bytearray(4)
        assert await file.readinto(buffer) == await file.readinto1(buffer) == 4
        await file.seek(0)
        assert await file.read() == LINES
        await file.seek(0)
        assert b"".join([line async for line in file]) == LINES
        for call in (file.readline, file.tell, file.flush):
            with pytest.raises(TypeError):
                await call(1)
        with pytest.raises(TypeError):
            await file.read("1")
    with pytest.raises(ValueError, match="closed"):
        await file.read()
    async with await open_with_anyio(path, "r") as file:
        assert [line async for line in file] == LINES.decode().splitlines(keepends=True)


async def test_files_of_anyio(path: Path) -> None:
    before = bridged()
    await use_async_file(path)
    async with await open_with_anyio(path, "rb") as file:
        assert file.read.__name__ == "read"
        count = current_files().routes()["inline"]
        for _ in range(10):
            await file.read(10)
        assert current_files().routes()["inline"] == count + 10
    assert bridged() - before < 300


def test_files_of_anyio_without_a_ring(path: Path) -> None:
    for backend in ("asyncio", "trio"):
        anyio.run(use_async_file, path, backend=backend)


async def test_a_file_of_anyio_that_is_used_on_asyncio_too(path: Path) -> None:
    file = await open_with_anyio(path, "rb")
    assert await file.read(5) == LINES[:5]
    assert await trio.to_thread.run_sync(partial(anyio.run, file.read, 2)) == LINES[5:7]
    assert await trio.to_thread.run_sync(partial(anyio.run, file.readline)) == b"line 1\n"
    assert await file.read(4) == b"line"
    await file.aclose()


@pytest.mark.ring(turn_budget=AMPLE)
async def test_every_method_of_anyio_counts_as_a_checkpoint(path: Path) -> None:
    for name, mode in CASES:
        if name in {"peek", "readall", "fsync"} or name.startswith("readlines"):
            continue
        call = CALLS[name][1]
        file = await open_with_anyio(path, mode)
        for _ in range(3):
            with assert_checkpoints(), suppress(OSError, ValueError, TypeError):
                await call(file)
        await file.aclose()
        with assert_checkpoints(), trio.CancelScope() as scope:
            scope.cancel()
            await call(file)
        path.write_bytes(LINES)


async def test_a_file_of_anyio_with_a_limiter_is_used_in_threads(path: Path) -> None:
    try:
        file = await anyio.open_file(path, "rb", limiter=anyio.CapacityLimiter(1))
    except TypeError:
        pytest.skip("this AnyIO has no limiters for files")
    count = current_files().routes()["inline"]
    async with file:
        assert await file.read(5) == LINES[:5]
        assert await file.tell() == 5
    assert current_files().routes()["inline"] == count


async def test_a_replaced_method_of_anyios_files(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def replaced(_self: object, *_args: int) -> str:
        return "replaced"

    async with await open_with_anyio(path, "rb") as file:
        assert await file.read(5) == LINES[:5]
        monkeypatch.setattr(anyio.AsyncFile, "read", replaced)
        assert await file.read(5) == "replaced"


REPLACED: Final[tuple[tuple[str, str, tuple[object, ...]], ...]] = (
    ("r", "read", ()),
    ("r", "readline", ()),
    ("rb", "readinto", (bytearray(2),)),
    ("rb", "seek", (0,)),
    ("raw", "read", ()),
    ("raw", "readinto", (bytearray(2),)),
    ("raw append", "write", (b"more",)),
)


@pytest.mark.parametrize("library", ["trio", "anyio"])
@pytest.mark.parametrize(("mode", "name", "args"), REPLACED)
async def test_a_replaced_method_of_one_file(
    path: Path, mode: str, name: str, args: tuple[object, ...], library: str
) -> None:
    """Tests of programs do this."""
    module: Any = {"trio": trio, "anyio": anyio}[library]
    modes = {"raw": ("rb", 0), "raw append": ("ab", 0)}
    async with await module.open_file(path, *modes.get(mode, (mode,))) as file:
        if name == "write":
            await file.write(b"first")  # from now on, such a write needs no bridge
        file.wrapped.__dict__[name] = lambda *_args: "replaced"
        assert await getattr(type(file)(file.wrapped), name)(*args) == "replaced"


@pytest.mark.parametrize("mode", ["r", "rb", "raw"])
async def test_a_replaced_close_is_called_once(path: Path, mode: str) -> None:
    file = await opened(path, mode)
    closed: list[str] = []
    file.wrapped.close = lambda: closed.append("once") or "closed"
    await file.aclose()
    assert closed == ["once"]
    del file.wrapped.close
    await file.aclose()
    assert file.closed
