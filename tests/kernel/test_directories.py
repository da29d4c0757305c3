"""Directories through Trio's and AnyIO's paths: the same as without a ring, call by call."""

from __future__ import annotations

import os
import pathlib
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
from races import current_files
from trio.testing import assert_checkpoints

import trio_uring
from trio_uring._files import ReadAhead, _directories, _routes
from trio_uring._files._directories import AHEAD_MAX, CAN_MAKE_PATHS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from typing_extensions import Self

pytestmark = pytest.mark.usefixtures("fd_ledger")


@pytest.fixture
def tree(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A directory with a little of everything, which is the current directory too."""
    tree = tmp_path / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    for name in (
        "one.txt",
        "two.txt",
        ".hidden",
        "deep/three.txt",
        "deep/deeper/four.txt",
        "~",
        "a b",
    ):
        (tree / name).touch()
    (tree / os.fsdecode(b"not \xff utf-8")).touch()
    (tree / "link").symlink_to("deep")
    (tree / "broken").symlink_to("nowhere")
    (tree / "empty").mkdir()
    monkeypatch.chdir(tree)
    return tree


class Route:
    """How many calls of a block took which route."""

    def __enter__(self) -> Self:
        self._before = current_files().routes()
        return self

    def __exit__(self, *_exc: object) -> None:
        after = current_files().routes()
        self.calls = {
            name: after[name] - self._before[name]
            for name in after
            if after[name] != self._before[name]
        }


async def outcome(call: Callable[[], Awaitable[Any]]) -> object:
    """What came of a call, and of each step of what it returned."""
    try:
        with assert_checkpoints():
            value = await call()
    except Exception as exc:  # noqa: BLE001 (whatever it is, it is the outcome)
        return described(exc)
    if isinstance(value, map):
        return type(value), [described(item) for item in value]
    return described(value)


async def outcomes(make: Callable[[], AsyncIterator[Any]]) -> list[object]:
    """What each step of an async iterator came to."""
    found: list[object] = []
    try:
        async for item in make():
            found.append(described(item))  # noqa: PERF401 (it keeps what came before an error)
    except Exception as exc:  # noqa: BLE001
        found.append(described(exc))
    return found


def described(value: object) -> object:
    if isinstance(value, BaseException):
        number, name = getattr(value, "errno", None), getattr(value, "filename", None)
        return type(value), value.args, number, type(name), name
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    parts = getattr(value, "parts", None)
    return type(value), repr(value), str(value), parts, hash(value)


async def same(run: Callable[[], Awaitable[Any]]) -> None:
    """Fail if *run* comes to something else on plain Trio, in a thread, than here."""
    found = await run()
    assert found == await trio.to_thread.run_sync(trio.run, run)


PATHS = [
    "",
    ".",
    "deep",
    "./deep/../deep",
    "link",
    "empty",
    "/",
    "//",
    "missing",
    "one.txt",
    "a\0b",
]


# --- Trio -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_iterdir_of_trio(tree: pathlib.Path, path: str) -> None:
    await same(lambda: outcome(trio.Path(path).iterdir))
    await same(lambda: outcome(trio.Path(tree, path).iterdir))
    await same(lambda: outcome(lambda: trio.Path.iterdir(trio.Path(path), True)))  # type: ignore[call-arg]


@pytest.mark.parametrize("call", ["glob", "rglob"])
@pytest.mark.parametrize("pattern", ["*", "*.txt", "**", "**/*", "deep/*", "", "/absolute"])
async def test_globs_of_trio(tree: pathlib.Path, call: str, pattern: str) -> None:
    await same(lambda: outcome(lambda: getattr(trio.Path(tree), call)(pattern)))


@pytest.mark.skipif(not CAN_MAKE_PATHS, reason="paths are made by the standard library")
async def test_a_listing_is_one_hop_and_makes_the_paths_itself(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = _directories._path

    def recording(string: str) -> trio.PosixPath:
        made.append(string)
        return make(string)

    monkeypatch.setattr(_directories, "_path", recording)
    with Route() as route:
        paths = await trio.Path(tree).iterdir()
    assert route.calls == {"thread": 1}
    assert made == []
    assert sorted(str(path) for path in paths) == sorted(made) != []


async def test_paths_of_a_listing_are_paths(tree: pathlib.Path) -> None:
    [path] = [path for path in await trio.Path(tree).iterdir() if path.name == "one.txt"]
    assert path == trio.Path(tree, "one.txt")
    assert hash(path) == hash(trio.Path(tree, "one.txt"))
    assert path.parent == trio.Path(tree)
    assert path.with_suffix(".py") == trio.Path(tree, "one.py")
    assert path / "more" == trio.Path(tree, "one.txt", "more")
    assert await path.read_bytes() == b""


async def test_a_cancelled_listing_does_not_begin(tree: pathlib.Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.Path(tree / "missing").iterdir()
    assert scope.cancelled_caught


@pytest.mark.skipif(not CAN_MAKE_PATHS, reason="paths are made by the standard library")
async def test_audit_events_are_those_of_pathlib(tree: pathlib.Path) -> None:
    assert await trio.to_thread.run_sync(_audited, pathlib.Path(tree).iterdir) == (
        await trio.to_thread.run_sync(_audited, lambda: _directories.iterdir(trio.PosixPath(tree)))
    )


_events: list[tuple[str, tuple[Any, ...]]] = []
_listening = threading.local()


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if getattr(_listening, "on", False) and event.startswith("os."):
        _events.append((event, args))


def _audited(call: Callable[[], Any]) -> list[tuple[str, tuple[Any, ...]]]:
    if not hasattr(_audited, "installed"):
        sys.addaudithook(_listen)
        setattr(_audited, "installed", True)  # noqa: B010
    _events.clear()
    _listening.on = True
    list(call())
    _listening.on = False
    return list(_events)


# --- Without a thread -----------------------------------------------------------------------


async def test_what_asks_for_the_directory_only(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/some one")
    calls: list[Callable[[], Awaitable[Any]]] = [
        *(trio.Path(path).absolute for path in PATHS),
        *(anyio.Path(path).absolute for path in PATHS if "\0" not in path),
        trio.Path.cwd,
        trio.PosixPath.cwd,
        trio.Path.home,
        anyio.Path.cwd,
        anyio.Path.home,
    ]
    for call in calls:
        await same(lambda call=call: outcome(call))
    with Route() as route:
        for call in calls:
            await call()
    assert route.calls == {"inline": len(calls)}
    removed = tree / "removed"
    removed.mkdir()
    monkeypatch.chdir(removed)
    removed.rmdir()
    for call in (trio.Path("x").absolute, trio.Path.cwd, anyio.Path.cwd):
        await same(lambda call=call: outcome(call))


async def test_what_may_take_longer_is_in_a_thread(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MyPath(pathlib.PosixPath):
        pass

    files = current_files()
    assert _routes.route(files, pathlib.Path.home) is not None
    assert _routes.route(files, MyPath.cwd) is None
    assert _routes.route(files, MyPath("x").absolute) is None
    assert _routes.route(files, pathlib.Path("x").absolute, (1,)) is None
    monkeypatch.delenv("HOME")
    assert _routes.route(files, pathlib.Path.home) is None
    with Route() as route:
        await trio.Path.home()
    assert route.calls == {"thread": 1}
    monkeypatch.setenv("HOME", "/home")
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("/elsewhere"))
    with Route() as route:
        assert await trio.Path.home() == trio.Path("/elsewhere")
    assert route.calls == {"thread": 1}


async def test_a_cancelled_call_without_a_thread() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.Path("x").absolute()
    assert scope.cancelled_caught


# --- AnyIO ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in PATHS if "\0" not in path])
async def test_iterdir_of_anyio(tree: pathlib.Path, path: str) -> None:
    await same(lambda: outcomes(anyio.Path(path).iterdir))
    await same(lambda: outcomes(anyio.Path(tree, path).iterdir))


@pytest.mark.parametrize("call", ["glob", "rglob"])
@pytest.mark.parametrize("pattern", ["*", "*.txt", "**", "**/*", "deep/*", "", "/absolute"])
async def test_globs_of_anyio(tree: pathlib.Path, call: str, pattern: str) -> None:
    await same(lambda: outcomes(lambda: getattr(anyio.Path(tree), call)(pattern)))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a method since Python 3.12")
@pytest.mark.parametrize("top_down", [True, False])
async def test_walks_of_anyio(tree: pathlib.Path, top_down: bool) -> None:
    path: Any = anyio.Path(tree)
    await same(lambda: outcomes(partial(path.walk, top_down)))

    async def prune() -> list[str]:
        roots = []
        async for root, directories, _ in path.walk():
            roots.append(str(root))
            directories.clear()
        return roots

    assert await prune() == [str(tree)]


async def test_entries_come_in_batches(tmp_path: pathlib.Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}").touch()
    for iterate in (anyio.Path(tmp_path).iterdir, lambda: anyio.Path(tmp_path).glob("*")):
        with Route() as route:
            found = [str(path) async for path in iterate()]
        assert found == [str(path) for path in tmp_path.iterdir()]
        # On a slow machine a batch can be short, as its time is limited.
        assert sum(route.calls.values()) in {101, 102}  # the end is one, and iterdir() another
        assert route.calls["inline"] > 50


async def test_each_entry_is_a_checkpoint(tree: pathlib.Path) -> None:
    iterator = anyio.Path(tree).glob("*")
    for _ in range(3):
        with assert_checkpoints():
            await anext(iterator)


async def test_a_cancelled_entry_is_not_lost(tree: pathlib.Path) -> None:
    iterator = anyio.Path(tree).glob("*")
    found = [str(await anext(iterator))]
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(iterator)
    assert scope.cancelled_caught
    found += [str(path) async for path in iterator]
    assert sorted(found) == sorted(map(str, tree.glob("*")))


async def test_a_limiter_of_the_programs_own_means_threads(tree: pathlib.Path) -> None:
    make: Any = anyio.Path
    try:
        path = make(tree, limiter=anyio.CapacityLimiter(1))
    except TypeError:
        pytest.skip("needs a newer AnyIO")
    with Route() as route:
        found = [str(path) async for path in path.glob("*")]
    assert sorted(found) == sorted(map(str, tree.glob("*")))
    assert "inline" not in route.calls


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_without_a_ring_anyio_is_as_it_was(tree: pathlib.Path, backend: str) -> None:
    async def main() -> None:
        iterator: Any = anyio.Path(tree).glob("*")
        found = [str(path) async for path in iterator]
        assert sorted(found) == sorted(map(str, tree.glob("*")))
        assert type(iterator.iterator) is not ReadAhead

    anyio.run(main, backend=backend)


def test_an_iterator_of_a_run_with_a_ring_in_one_without(tree: pathlib.Path) -> None:
    found: list[str] = []

    async def begin() -> Any:
        iterator = anyio.Path(tree).glob("*")
        found.append(str(await anext(iterator)))
        return iterator

    async def go_on(iterator: Any) -> None:
        found.extend([str(path) async for path in iterator])

    trio.run(go_on, trio_uring.run(begin))
    assert sorted(found) == sorted(map(str, tree.glob("*")))


async def test_anyio_truncates_on_the_ring(tmp_path: pathlib.Path) -> None:
    for mode in ("wb", "w", "r+b", "r+"):
        async with await anyio.open_file(tmp_path / "file", mode) as file:
            with Route() as route:
                assert await file.truncate(5) == 5
            assert "thread" not in route.calls
    assert (tmp_path / "file").read_bytes() == bytes(5)


# --- Reading ahead --------------------------------------------------------------------------


def numbers(count: int) -> Iterator[int]:
    yield from range(count)
    raise OSError(5, "Input/output error", "name")


def test_what_was_read_ahead_comes_before_the_error() -> None:
    ahead = ReadAhead(numbers(3))
    assert not ahead.is_ready
    while ahead._failure is None:
        ahead.read()
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    assert ahead.is_ready
    with pytest.raises(OSError, match="Input/output error"):
        next(ahead)
    assert list(ahead) == []


def test_a_batch_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = ReadAhead(iter(range(10_000)))
    monkeypatch.setattr(_directories, "_AHEAD_SECONDS", 1000)
    ahead.read()
    assert len(ahead._items) == AHEAD_MAX
    ahead = ReadAhead(iter(range(10_000)))
    monkeypatch.setattr(_directories, "_AHEAD_SECONDS", -1)
    ahead.read()
    assert len(ahead._items) == 1
    assert list(ahead) == list(range(10_000))


def test_the_end_is_known() -> None:
    ahead: ReadAhead[int] = ReadAhead(iter(()))
    ahead.read()
    assert ahead.is_ready
    assert list(ahead) == []
