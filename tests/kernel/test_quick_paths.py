"""Calls on paths that the kernel's cache can answer."""

from __future__ import annotations

import errno
import os
import pathlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
import trio
from accounting import steps_beside
from races import current_files
from trio.testing import assert_checkpoints

from trio_uring._files import _quick
from trio_uring._files._raw import RingFileIO

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[[Any], Any]

pytestmark = pytest.mark.usefixtures("fd_ledger", "no_deterministic_scheduling")

AMPLE: Final = 1.0  # seconds

CALLS: Final[dict[str, Call]] = {
    "stat": lambda path: path.stat(),
    "stat of a link": lambda path: path.stat(follow_symlinks=False),
    "lstat": lambda path: path.lstat(),
    "exists": lambda path: path.exists(),
    "is_dir": lambda path: path.is_dir(),
    "is_file": lambda path: path.is_file(),
    "is_symlink": lambda path: path.is_symlink(),
    "is_fifo": lambda path: path.is_fifo(),
    "is_socket": lambda path: path.is_socket(),
    "is_block_device": lambda path: path.is_block_device(),
    "is_char_device": lambda path: path.is_char_device(),
    "read_bytes": lambda path: path.read_bytes(),
    "read_text": lambda path: path.read_text(),
    "read_text with an encoding": lambda path: path.read_text("latin-1"),
    "read_text of ASCII": lambda path: path.read_text(encoding="ascii", errors="replace"),
    "read_text of no ASCII": lambda path: path.read_text(encoding="ascii"),
    "open": lambda path: path.open(),
    "open a missing directory": lambda path: (path / "below").open("rb"),
}


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "file").write_bytes(b"text \xc3\xa9\r\n")
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(os.urandom(200_000))
    (tmp_path / "limit").write_bytes(bytes(65536))
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


NAMES: Final = (
    *("file", "empty", "large", "limit", "directory", "link", "dangling", "loop", "fifo"),
    *("missing", "file/below", "file/", "directory/.."),
)


def outcome(result: object) -> object:
    if isinstance(result, os.stat_result):
        return {name: getattr(result, name) for name in dir(result) if name.startswith("st_")}
    return result


def failure(exc: Exception) -> object:
    return (type(exc), str(exc), getattr(exc, "errno", None), getattr(exc, "filename", None))


# --- What they return -----------------------------------------------------------------------


def without_times(result: object) -> object:
    """Drop the time of the last access, which reading changes."""
    if isinstance(result, dict):
        return {name: value for name, value in result.items() if "atime" not in name}
    return result


@pytest.mark.parametrize("call", [name for name in CALLS if "open" not in name])
async def test_results_and_errors_are_those_of_pathlib(tree: pathlib.Path, call: str) -> None:
    for name in NAMES:
        if name == "fifo" and "read" in call:
            continue
        expected: object
        try:
            expected = without_times(outcome(CALLS[call](tree / name)))
        except (OSError, ValueError) as exc:
            expected = failure(exc)
        for kind in (trio.Path, anyio.Path):
            for _ in range(2):  # the first may ask the disk
                got: object
                try:
                    got = without_times(outcome(await CALLS[call](kind(tree / name))))
                except (OSError, ValueError) as exc:
                    got = failure(exc)
                assert got == expected, name


@pytest.mark.parametrize("mode", ["r", "rb", "rt", "r+", "w"])
async def test_opened_files_are_those_of_pathlib(tree: pathlib.Path, mode: str) -> None:
    for name in NAMES:
        if name == "fifo":
            continue
        try:
            with (tree / name).open(mode) as file:
                expected: object = (file.name, file.mode, type(file))
        except OSError as exc:
            expected = failure(exc)
        for _ in range(2):
            try:
                async with await trio.Path(tree / name).open(mode) as opened:
                    got: object = (opened.name, opened.mode, type(opened.wrapped))
            except OSError as exc:
                got = failure(exc)
            assert got == expected, name


async def test_relative_paths(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert await trio.Path("file").read_bytes() == b"text \xc3\xa9\r\n"
    assert not await trio.Path("missing").exists()
    for odd in ("./file", "directory/../file", "directory//../file", ".//directory/./../file"):
        for path in (trio.Path(odd), trio.Path("directory", "..", "file"), trio.Path(tree / odd)):
            assert await path.is_file()
        with pytest.raises(NotADirectoryError) as caught:
            await trio.Path(odd, "x").stat()
        assert caught.value.filename == str(pathlib.Path(odd, "x"))
        with pytest.raises(FileNotFoundError) as missing:
            await trio.Path(odd + ".x").read_bytes()
        assert missing.value.filename == str(pathlib.Path(odd + ".x"))
    assert await trio.Path().is_dir()


async def test_a_missing_file_is_a_known_answer(tree: pathlib.Path) -> None:
    path = trio.Path(tree / "missing")
    assert not await path.exists()  # asks the disk
    before = current_files().on_ring + current_files().in_thread
    for _ in range(10):
        assert not await path.exists()
        with pytest.raises(FileNotFoundError):
            await path.stat()
        with pytest.raises(FileNotFoundError):
            await path.read_bytes()
        with pytest.raises(FileNotFoundError):
            await trio.open_file(path)
    assert current_files().on_ring + current_files().in_thread == before
    (tree / "missing").touch()
    assert await path.exists()
    (tree / "missing").unlink()
    assert not await path.exists()


@pytest.mark.parametrize("size", [1, 4096, 60_000])
async def test_pages_that_are_not_cached_are_read_on_the_ring(
    tree: pathlib.Path, size: int
) -> None:
    data = os.urandom(size)
    path = tree / "cold"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, data)
    os.fsync(fd)
    assert await trio.Path(path).exists()
    for _ in range(5):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert await trio.Path(path).read_bytes() == data
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert await trio.Path(path).read_text("latin-1", newline="") == data.decode("latin-1")
    os.close(fd)


@pytest.mark.usefixtures("no_native_paths")
async def test_the_rest_of_a_file(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Part:
        def read(self, path: str) -> tuple[bytes, int]:
            return os.urandom(0), os.open(path, os.O_RDONLY)

    monkeypatch.setattr(_quick, "_reader", Part)
    before = current_files().on_ring
    assert await trio.Path(tree / "file").read_bytes() == b"text \xc3\xa9\r\n"
    assert await trio.Path(tree / "file").read_text("utf-8") == "text \xe9\n"
    assert current_files().on_ring == before + 2


@pytest.mark.usefixtures("no_native_paths")
async def test_a_file_that_disappears(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = _quick.mode_cached(os.fsencode(tree / "file"), 0)
    monkeypatch.setattr(_quick, "mode_cached", lambda *_args: mode)
    for call in (trio.Path.read_bytes, trio.Path.open):
        with pytest.raises(FileNotFoundError) as caught:
            await call(trio.Path(tree / "missing"))
        assert caught.value.filename == str(tree / "missing")
        with pytest.raises(NotADirectoryError):
            await call(trio.Path(tree / "file" / "below"))


# --- Checkpoints ----------------------------------------------------------------------------


async def check_checkpoints(tree: pathlib.Path) -> None:
    for call in CALLS.values():
        for name in ("file", "directory", "missing"):
            for _ in range(3):
                with assert_checkpoints():
                    try:
                        result = await call(trio.Path(tree / name))
                    except (OSError, ValueError):
                        continue
                if hasattr(result, "aclose"):
                    await result.aclose()


@pytest.mark.ring(turn_budget=0)
async def test_every_call_is_a_checkpoint(tree: pathlib.Path) -> None:
    await check_checkpoints(tree)


@pytest.mark.ring(turn_budget=AMPLE)
async def test_every_call_counts_as_a_checkpoint(tree: pathlib.Path) -> None:
    await check_checkpoints(tree)


@pytest.mark.parametrize("call", CALLS)
async def test_a_cancelled_call_does_nothing(tree: pathlib.Path, call: str) -> None:
    heard: list[str] = []
    listen(heard)
    try:
        with trio.CancelScope() as scope:
            scope.cancel()
            await CALLS[call](trio.Path(tree / "file"))
    finally:
        listen(None)
    assert scope.cancelled_caught
    assert "open" not in heard


@pytest.mark.ring(turn_budget=AMPLE)
async def test_calls_share_an_iteration_within_the_turn_budget(tree: pathlib.Path) -> None:
    for name in ("stat", "exists", "read_bytes"):
        call = partial(CALLS[name], trio.Path(tree / "file"))
        await call()
        assert await steps_beside(call, 50) == 0


@pytest.mark.ring(turn_budget=0)
async def test_without_a_budget_each_call_lets_others_run(tree: pathlib.Path) -> None:
    for name in ("stat", "exists", "read_bytes"):
        call = partial(CALLS[name], trio.Path(tree / "file"))
        assert await steps_beside(call, 10) >= 9


# --- Audit events ---------------------------------------------------------------------------

_heard: list[str] | None = None
_refuse = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _heard is not None and event == "open":
        _heard.append(event)
        _heard.append(repr(args))
        if _refuse:
            raise PermissionError("refused by the hook")


def listen(heard: list[str] | None, *, refuse: bool = False) -> None:
    global _heard, _refuse
    if not hasattr(listen, "installed"):
        sys.addaudithook(_hook)
        setattr(listen, "installed", True)  # noqa: B010
    _heard, _refuse = heard, refuse


@pytest.mark.parametrize("call", ["read_bytes", "read_text", "open"])
async def test_audit_events_come_once(tree: pathlib.Path, call: str) -> None:
    await trio.Path(tree / "file").read_bytes()  # asks for the file system
    for name in ("file", "missing", "directory", "large", "empty"):
        events: list[list[str]] = [[], []]
        for which, path in enumerate((tree / name, trio.Path(tree / name))):
            listen(events[which])
            try:
                result = CALLS[call](path)
                if which:
                    result = await result
            except (OSError, ValueError):
                continue
            finally:
                listen(None)
            if hasattr(result, "aclose"):
                await result.aclose()
            elif hasattr(result, "close"):
                result.close()
        assert events[0] == events[1], name


@pytest.mark.usefixtures("no_native_paths")
@pytest.mark.parametrize("call", ["read_bytes", "read_text", "open"])
async def test_an_audit_hook_can_refuse(
    tree: pathlib.Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await trio.Path(tree / "file").read_bytes()
    monkeypatch.setattr(_quick, "_reader", None)
    heard: list[str] = []
    listen(heard, refuse=True)
    try:
        with pytest.raises(PermissionError, match="refused by the hook"):
            await CALLS[call](trio.Path(tree / "file"))
    finally:
        listen(None)
    assert len(heard) == 2


# --- What is called in another way ----------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, no_native_paths: None) -> list[str]:
    """Note for which paths the cache is asked."""
    asked: list[str] = []
    mode_cached = _quick.mode_cached

    def noting(path: bytes, *args: int) -> int:
        asked.append(os.fsdecode(path))
        return mode_cached(path, *args)

    monkeypatch.setattr(_quick, "mode_cached", noting)
    return asked


async def test_replaced_methods_are_called(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch, quick: list[str]
) -> None:
    monkeypatch.setattr(pathlib.Path, "stat", lambda _self, **_keywords: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await trio.Path(tree / "file").exists()
    monkeypatch.undo()
    assert not quick


async def test_subclasses_and_unusual_arguments(tree: pathlib.Path, quick: list[str]) -> None:
    class MyPath(type(tree)):  # type: ignore[misc]
        pass

    files = current_files()
    path = str(tree / "file")
    unusual: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (MyPath(tree).exists, ()),
        (tree.exists, (1, 2, 3)),
        (open, ()),
        (open, (path + "\0",)),
        (open, (path, "w")),
        (open, (path, "r", -1, "no such codec")),
        (open, (path, "r", -1, None, None, None, True, os.open)),
        (partial(open, path, opener=os.open), ()),
        (open, (MyPath(path),)),
        (len, ("abc",)),
        (lambda: None, ()),
    ]
    for function, args in unusual:
        assert await _quick.quick_call(files, function, args) is _quick.OTHERWISE
    assert not quick


@pytest.mark.usefixtures("no_native_paths")
async def test_a_path_that_is_not_cached(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_quick, "mode_cached", lambda *_args: -errno.EAGAIN)
    for name in ("exists", "read_bytes", "read_text", "open"):
        before = current_files().inline
        result = await CALLS[name](trio.Path(tree / "file"))
        if name == "open":
            assert type(result.buffer.raw) is RingFileIO
            await result.aclose()
        assert result
        assert before <= current_files().inline


async def test_warnings_about_the_default_encoding(tree: pathlib.Path) -> None:
    if not sys.flags.warn_default_encoding:
        program = (
            "import trio, trio_uring, warnings\n"
            f"path = trio.Path({str(tree / 'file')!r})\n"
            "async def main():\n"
            "    await path.exists()\n"
            "    with warnings.catch_warnings(record=True) as caught:\n"
            "        warnings.simplefilter('always')\n"
            "        await path.read_text()\n"
            "    assert [w.category for w in caught] == [EncodingWarning], caught\n"
            "trio_uring.run(main)\n"
        )
        result = await trio.run_process(
            [sys.executable, "-X", "warn_default_encoding", "-c", program], check=False
        )
        assert result.returncode == 0


async def test_a_path_that_has_no_bytes_does_not_exist() -> None:
    path = pathlib.Path("\ud800")
    assert await trio.Path(path).exists() is path.exists() is False
    assert await anyio.Path(path).is_file() is path.is_file() is False
    with pytest.raises(UnicodeEncodeError):
        await trio.Path(path).stat()
