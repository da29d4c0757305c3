"""Calls on paths that the native engine makes in C, and when it leaves them to Python."""

from __future__ import annotations

import errno
import io
import os
import pathlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
import trio
import trio.testing
from children import output_of, run_python
from races import current_files

from trio_uring._files import OTHERWISE
from trio_uring._files._quick import call_path
from trio_uring._kernel import native, why_no_native
from trio_uring._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.no_audit_hooks,
    pytest.mark.usefixtures("fd_ledger", "no_deterministic_scheduling"),
    pytest.mark.skipif(bool(why_no_native), reason=why_no_native or "-"),
]

AMPLE: Final = 1.0  # seconds
SIZE_MAX: Final = 256 * 1024


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "file").write_bytes(b"some bytes")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("file")
    return tmp_path


async def begin(tree: pathlib.Path) -> None:
    """Have the kind of the file system be known."""
    manager: Any = current_io_manager()
    if manager.native is None:
        pytest.skip("the run is on the Python engine")
    await trio.Path(tree / "file").read_bytes()
    await trio.Path(tree / "missing").exists()


def read(path: os.PathLike[str]) -> object:
    return call_path(pathlib.Path(path).read_bytes, ())


# --- What it answers ------------------------------------------------------------------------


@pytest.mark.ring(turn_budget=AMPLE)
async def test_it_answers_all_that_the_cache_knows(tree: pathlib.Path) -> None:
    await begin(tree)
    path = tree / "file"
    assert call_path(path.read_bytes, ()) == b"some bytes"
    assert call_path((tree / "empty").read_bytes, ()) == b""
    assert call_path(path.read_text, ()) == "some bytes"
    assert call_path(path.read_text, ("utf-8",)) == "some bytes"
    assert call_path(partial(path.read_text, encoding="UTF-8"), ()) == "some bytes"
    assert call_path(path.exists, ()) is True
    assert call_path(path.is_file, ()) is True
    assert call_path(path.is_dir, ()) is False
    assert call_path(tree.is_dir, ()) is True
    assert call_path((tree / "link").is_symlink, ()) is True
    assert call_path((tree / "missing").exists, ()) is False
    (tree / "link").stat()  # the first use of a link changes the time of its last access
    for function in (os.stat, os.lstat, partial(os.stat, follow_symlinks=False)):
        link: Any = call_path(function, (tree / "link",))
        assert link.st_ino == function(tree / "link").st_ino
    with pytest.raises(FileNotFoundError) as caught:
        call_path(os.stat, (str(tree / "missing"),))
    assert caught.value.filename == str(tree / "missing")
    with pytest.raises(FileNotFoundError):
        read(tree / "missing")


@pytest.mark.ring(turn_budget=AMPLE)
@pytest.mark.parametrize(
    "arguments", [("rb",), ("rb", -1), ("rb", -1, None, None, None, True, None)]
)
async def test_an_opened_file_is_that_of_open(
    tree: pathlib.Path, arguments: tuple[Any, ...]
) -> None:
    await begin(tree)
    for path in (str(tree / "file"), tree / "file"):
        opened: Any = call_path(io.open, (path, *arguments))
        with opened as file, open(path, "rb") as theirs:
            assert type(file) is type(theirs)
            assert (file.name, file.mode, file.raw.mode) == (theirs.name, "rb", "rb")
            assert file.raw.closefd
            assert not os.get_inheritable(file.fileno())
            assert os.get_blocking(file.fileno())
            assert file.read() == b"some bytes"


@pytest.mark.ring(turn_budget=AMPLE)
@pytest.mark.parametrize(
    "parts", ["a", "a/b", "./a", "a/.", "a//b", "a/../a", ".", "..", "é", "a."]
)
async def test_paths_are_parsed_as_by_pathlib(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch, parts: str
) -> None:
    await begin(tree)
    monkeypatch.chdir(tree)
    absolute = str(tree / "file")
    for name in "ax":  # from now on the cache knows that they are missing
        assert not pathlib.Path(name).exists()
    for odd in (
        *((parts, "missing"), ("x", parts), (parts,), ("x/", parts), (str(tree), parts)),
        *((parts, absolute), ("a", absolute), (absolute, parts)),
    ):
        for kind in (pathlib.PosixPath, trio.PosixPath):
            path = kind(*odd)
            try:
                value = call_path(os.stat, (path,))
            except OSError as exc:
                assert exc.filename == str(kind(*odd))  # noqa: PT017 (there may be none)
            else:
                assert value is OTHERWISE or value == os.stat(kind(*odd))


@pytest.mark.ring(turn_budget=AMPLE)
@pytest.mark.parametrize(
    "data", [b"\xff", b"one\r\ntwo\rthree\n", b"\xef\xbb\xbfmark", "é\u20ac".encode(), b"\0\n"]
)
async def test_text_is_that_of_pathlib(tree: pathlib.Path, data: bytes) -> None:
    await begin(tree)
    (tree / "text").write_bytes(data)
    for encoding in (None, "utf-8", "latin-1"):
        try:
            expected: object = (tree / "text").read_text(encoding)
        except UnicodeDecodeError as exc:
            expected = exc.args
        for _ in range(2):
            try:
                assert await trio.Path(tree / "text").read_text(encoding) == expected
            except UnicodeDecodeError as exc:
                assert exc.args == expected  # noqa: PT017 (there may be none)


@pytest.mark.ring(turn_budget=AMPLE)
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, SIZE_MAX - 1, SIZE_MAX, SIZE_MAX + 1])
async def test_files_up_to_a_size(tree: pathlib.Path, size: int) -> None:
    await begin(tree)
    data = os.urandom(size)
    (tree / "sized").write_bytes(data)
    assert read(tree / "sized") == (data if size <= SIZE_MAX else OTHERWISE)
    assert await trio.Path(tree / "sized").read_bytes() == data


# --- What it leaves to Python ---------------------------------------------------------------


@pytest.mark.ring(turn_budget=AMPLE)
async def test_it_leaves_what_is_unusual_to_python(tree: pathlib.Path) -> None:
    await begin(tree)
    path = tree / "file"

    class MyPath(type(tree)):  # type: ignore[misc]
        pass

    async def asynchronous() -> None:
        pass

    unusual: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (MyPath(path).exists, ()),
        (MyPath(path).read_bytes, ()),
        (path.stat, (False,)),
        (partial(path.stat, follow_symlinks=1), ()),
        (partial(path.lstat, follow_symlinks=False), ()),
        (partial(path.read_bytes, follow_symlinks=False), ()),
        (partial(path.stat, encoding="utf-8"), ()),
        (partial(path.exists), (1,)),
        (partial(path.read_text, "utf-8", encoding="utf-8"), ()),
        (path.read_text, ("utf-8", "strict")),
        (path.read_text, ("no such codec",)),
        (path.read_text, (1,)),
        (path.write_bytes, (b"",)),
        (tree.read_bytes, ()),
        ((tree / "file\0b").exists, ()),
        (pathlib.PosixPath("/proc/self/status").read_bytes, ()),
        (pathlib.PosixPath("\udcff" * 5000).exists, ()),
        (os.stat, ()),
        (os.stat, (0,)),
        (os.stat, (os.fsencode(path),)),
        (os.stat, (path, 1)),
        (open, ()),
        (open, (path, "rt")),
        (open, (path, "r", 1)),
        (open, (path, "r", -1, "latin-1")),
        (open, (path, "r", -1, None, "ignore")),
        (open, (path, "r", -1, None, None, "")),
        (open, (path, b"rb")),
        (open, (path, "rb", 0)),
        (open, (path, "rb", True)),
        (open, (path, "rb", 1 << 100)),
        (open, (path, "rb", -1 << 100)),
        (open, (path, "rb", -1, "utf-8")),
        (open, (path, "rb", -1, None, None, None, False)),
        (open, (path, "rb", -1, None, None, None, True, os.open)),
        (open, (path, "rb", -1, None, None, None, True, None, None)),
        (open, (tree, "rb")),
        (open, (MyPath(path), "rb")),
        (partial(open, path, mode="rb"), ()),
        (len, ("abc",)),
        ("abc".join, ([],)),
        (lambda: None, ()),
        (lambda _path: None, (path,)),
        (asynchronous, (path,)),
        (MyPath, (path,)),
    ]
    for function, args in unusual:
        assert call_path(function, args) is OTHERWISE, (function, args)


@pytest.mark.parametrize("arguments", [(), (open,), (open, []), (open, (), 1)])
def test_wrong_arguments(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="takes a function and a tuple"):
        native.call_path(*arguments)


def test_outside_a_run() -> None:
    assert call_path(pathlib.Path(__file__).exists, ()) is OTHERWISE


@pytest.mark.ring(turn_budget=AMPLE)
async def test_replaced_functions_are_called(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(tree)
    path = tree / "file"
    for owner, name, call in (
        (os, "stat", path.stat),
        (os, "stat", path.exists),
        (pathlib.Path, "stat", path.exists),
        (io, "open", path.read_bytes),
        (pathlib.Path, "open", path.read_text),
    ):
        assert call_path(call, ()) is not OTHERWISE
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_args, **_keywords: 1 / 0)
            assert call_path(call, ()) is OTHERWISE
            patch.delattr(owner, name)
            assert call_path(call, ()) is OTHERWISE


async def test_a_cancelled_task_gets_no_answer(tree: pathlib.Path) -> None:
    await begin(tree)
    with trio.CancelScope() as scope:
        scope.cancel()
        assert read(tree / "file") is OTHERWISE
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_a_fifo_is_not_opened(tree: pathlib.Path) -> None:
    await begin(tree)
    os.mkfifo(tree / "fifo")
    assert read(tree / "fifo") is OTHERWISE
    with pytest.raises(OSError, match="No such device"):  # there is no reader
        os.open(tree / "fifo", os.O_WRONLY | os.O_NONBLOCK)


@pytest.mark.ring(turn_budget=AMPLE)
async def test_a_file_without_permission(tree: pathlib.Path) -> None:
    await begin(tree)
    (tree / "file").chmod(0)
    if os.geteuid():
        assert read(tree / "file") is OTHERWISE
        with pytest.raises(PermissionError):
            await trio.Path(tree / "file").read_bytes()


@pytest.mark.ring(turn_budget=AMPLE)
async def test_pages_that_are_not_cached(tree: pathlib.Path) -> None:
    await begin(tree)
    data = os.urandom(100_000)
    path = tree / "cold"
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        for start in (0, 50_000):
            os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)
            assert read(path) in (data, OTHERWISE)  # a file system in memory keeps them
            assert await trio.Path(path).read_bytes() == data


# --- The schedule point ---------------------------------------------------------------------


@pytest.mark.ring(turn_budget=0)
async def test_a_schedule_point_is_left(tree: pathlib.Path) -> None:
    await begin(tree)
    task = trio.lowlevel.current_task()
    before = task._cancel_points, task._schedule_points
    assert read(tree / "file") == (b"some bytes",)
    nothing, error = call_path((tree / "missing").stat, ())  # type: ignore[misc]
    assert nothing is None
    assert type(error) is FileNotFoundError
    after = task._cancel_points, task._schedule_points
    assert after == (before[0] + 2, before[1])
    await trio.lowlevel.checkpoint()


async def test_an_instrument_sees_each_step(tree: pathlib.Path) -> None:
    await begin(tree)

    class Instrument(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            pass

    instrument = Instrument()
    trio.lowlevel.add_instrument(instrument)
    assert read(tree / "file") == (b"some bytes",)
    await trio.lowlevel.checkpoint()
    assert read(tree / "file") is OTHERWISE  # Trio's own loop runs the tasks
    trio.lowlevel.remove_instrument(instrument)
    await trio.lowlevel.checkpoint()


# --- Short reads, and files that change meanwhile -------------------------------------------

PROGRAM: Final = """
import os, pathlib, sys, trio, trio_uring
from trio_uring._files import OTHERWISE, call_path
async def main():
    path = pathlib.Path(sys.argv[1])
    expected = path.read_bytes()
    assert await trio.Path(path).read_bytes() == expected
    value = call_path(path.read_bytes, ())
    value = value[0] if type(value) is tuple else value
    assert value is OTHERWISE or value == expected, (value, expected)
    print("otherwise" if value is OTHERWISE else len(value))
trio_uring.run(main, ring=trio_uring.RingConfig(require=True))
"""


@pytest.mark.parametrize(
    ("what", "size", "answer"),
    [
        ({"reads": errno.EAGAIN}, 4096, "otherwise"),
        ({"reads": errno.EIO}, 4096, "otherwise"),
        ({"reads": errno.EOPNOTSUPP}, 4096, "otherwise"),
        ({"beyond": 4095}, 4096, "otherwise"),
        ({"beyond": 4096}, 4096, "4096"),
        ({"beyond": 1}, 4096, "otherwise"),
        ({"beyond": 1}, 1, "1"),
        ({"beyond": 1}, 0, "0"),
        # As the file was looked up, it was larger or smaller.
        ({"size": 5000}, 4096, "4096"),
        ({"size": 4000}, 4096, "otherwise"),
        ({"size": 4095}, 4096, "otherwise"),
        ({"size": 0}, 4096, "otherwise"),
        ({"size": 4096}, 0, "0"),
    ],
)
def test_unusual_reads(
    tmp_path: pathlib.Path, refuse: Any, what: dict[str, int], size: int, answer: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    result = run_python(
        PROGRAM, path, environment={**refuse(**what), "TRIO_URING_ENGINE": "native"}
    )
    assert output_of(result) == [answer]


@pytest.mark.ring(turn_budget=AMPLE)
async def test_files_that_grow(tree: pathlib.Path) -> None:
    await begin(tree)
    path = tree / "grows"
    expected = b""
    with path.open("ab", buffering=0) as file:
        for number in range(300):
            assert read(path) == expected
            more = b"%d" % number * number
            file.write(more)
            expected += more
        file.truncate(1)
        assert read(path) == expected[:1]


def test_audit_events_come_first_and_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"some bytes")
    program = (
        PROGRAM
        + """
events = []
sys.addaudithook(lambda event, args: events.append(args[0]) if event == "open" else None)
async def again():
    path = pathlib.Path(sys.argv[1])
    await trio.Path(path).read_bytes()
    events.clear()
    assert call_path(path.read_bytes, ()) is OTHERWISE
    assert not events
    assert await trio.Path(path).read_bytes() == b"some bytes"
    assert events == [str(path)], events
trio_uring.run(again, ring=trio_uring.RingConfig(require=True))
"""
    )
    result = run_python(program, path, environment={"TRIO_URING_ENGINE": "native"})
    assert output_of(result) == ["10"]


# --- Closing --------------------------------------------------------------------------------


def open_to_read(path: pathlib.Path) -> Any:
    file = call_path(io.open, (str(path), "rb"))
    assert file is not OTHERWISE
    return file


@pytest.mark.ring(turn_budget=AMPLE)
async def test_files_that_are_only_read_are_closed(tree: pathlib.Path) -> None:
    await begin(tree)
    file = open_to_read(tree / "file")
    assert file.read(4) == b"some"
    assert native.close_file(file) is None
    assert file.closed
    assert native.close_file(file) is OTHERWISE
    text = io.TextIOWrapper(open_to_read(tree / "file"), "utf-8")
    assert native.close_file(text) is None
    assert text.closed
    raw = open_to_read(tree / "file").detach()
    assert native.close_file(raw) is None
    assert raw.closed


@pytest.mark.ring(turn_budget=AMPLE)
async def test_closing_by_the_bound_method(tree: pathlib.Path) -> None:
    await begin(tree)
    for file in (
        open_to_read(tree / "file"),
        io.TextIOWrapper(open_to_read(tree / "file"), "utf-8"),
    ):
        assert call_path(file.close, (1,)) is OTHERWISE
        assert call_path(file.close, ()) is None
        assert file.closed
        assert call_path(file.close, ()) is OTHERWISE
    assert call_path(io.BytesIO().close, ()) is OTHERWISE
    assert call_path(os.close, ()) is OTHERWISE
    files = current_files()
    before = files.inline + files.in_thread + files.on_ring
    async with await anyio.open_file(tree / "file", "rb") as opened:
        assert await opened.read() == b"some bytes"
    assert opened.wrapped.closed
    assert files.inline + files.in_thread + files.on_ring == before


@pytest.mark.ring(turn_budget=AMPLE)
async def test_other_files_are_closed_by_python(tree: pathlib.Path) -> None:
    await begin(tree)
    path = tree / "file"
    assert native.close_file(None) is OTHERWISE
    with path.open("rb") as theirs:
        assert native.close_file(theirs) is OTHERWISE
        assert native.close_file(theirs.raw) is OTHERWISE
    async with await trio.open_file(path, "r+b") as both:
        assert native.close_file(both.wrapped) is OTHERWISE
    async with await trio.open_file(path, "r+b", buffering=0) as unbuffered:
        assert native.close_file(unbuffered.wrapped) is OTHERWISE
    for name, value in (("busy", True), ("used_ring", True), ("direct", None)):
        file = open_to_read(path)
        before = getattr(file.raw, name)
        setattr(file.raw, name, value)
        assert native.close_file(file) is OTHERWISE
        setattr(file.raw, name, before)
        assert native.close_file(file) is None
    detached = open_to_read(path)
    raw = detached.detach()
    assert native.close_file(detached) is OTHERWISE
    assert native.close_file(raw) is None
    with open_to_read(path) as shared:
        shared.fileno()  # somebody may have a duplicate now
        assert native.close_file(shared) is OTHERWISE
    with trio.CancelScope() as scope, open_to_read(path) as uncancelled:
        scope.cancel()
        assert native.close_file(uncancelled) is OTHERWISE
        assert not uncancelled.closed
        await trio.lowlevel.checkpoint()


@pytest.mark.ring(turn_budget=0)
async def test_closing_leaves_a_schedule_point(tree: pathlib.Path) -> None:
    await begin(tree)
    opened: Any = call_path(io.open, (str(tree / "file"), "rb"))
    [file] = opened
    assert native.close_file(file) == (None,)
    assert file.closed
    async with await trio.open_file(tree / "file", "rb") as wrapped:
        with trio.testing.assert_checkpoints():
            await wrapped.aclose()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_file_is_closed_also_if_its_task_is_cancelled(
    tree: pathlib.Path, cancelled: bool
) -> None:
    await begin(tree)
    file = await trio.open_file(tree / "file", "rb")
    with trio.CancelScope() as scope:
        if cancelled:
            scope.cancel()
        await file.aclose()
    assert file.closed
    assert scope.cancelled_caught == cancelled


@pytest.mark.ring(turn_budget=AMPLE)
async def test_an_error_while_closing_is_raised(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(tree)

    def close(raw: io.FileIO) -> None:
        io.FileIO.close(raw)
        raise OSError(errno.EIO, "no luck")

    file = await trio.open_file(tree / "file", "rb")
    monkeypatch.setattr(type(file.wrapped.raw), "close", close)
    with pytest.raises(OSError, match="no luck"):
        await file.aclose()
    assert file.closed
