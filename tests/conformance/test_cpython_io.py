"""CPython's own tests of `open` and `io.FileIO`, with our files.

Each test runs on a bridge: every file that it opens is a `RingFileIO`, whose reads and writes use
the ring. What opens files runs again in a thread, where each method of a file is a call of the
method of `trio.open_file`'s, as a program awaits it. If Python is installed without its tests, as
on Debian, they are skipped.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import random
import sys
import unittest
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from races import current_files

from trio_uring._files._open import is_plain, open_file
from trio_uring._files._raw import RingFileIO

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

    from typing_extensions import Self

test_io = pytest.importorskip("test.test_io")
test_fileio = pytest.importorskip("test.test_fileio")
test_file = pytest.importorskip("test.test_file")

BASES = (
    *(test_io.CIOTest, test_io.CMiscIOTest),
    *(test_io.CBufferedReaderTest, test_io.CBufferedWriterTest, test_io.CBufferedRandomTest),
    test_io.CTextIOWrapperTest,
    *(test_fileio.CAutoFileTests, test_fileio.COtherFileTests),
    *(test_file.CAutoFileTests, test_file.COtherFileTests),
)

# Of each mock, the one for C. The tests expect it under the name that it has in both.
MOCKS = {
    name[1:]: value
    for name, value in vars(test_io).items()
    if name.startswith("C")
    and name[1:] in vars(test_io)
    and not issubclass(value, unittest.TestCase)
}

# What is about something else, with its reason.
NOT_OURS = {
    "test_large_file_ops": "writes 2 GiB",
}
if sys.version_info >= (3, 13):
    named = "compares the repr, which has the name of the class since Python 3.13"
    NOT_OURS |= {
        "testRepr": named,
        "testReprNoCloseFD": named,
        "testBooleanFd": "compares where a warning points to: one frame up, into our subclass",
    }


def open_ours(file: Any, *args: Any, **keywords: Any) -> Any:
    """Return the file that `trio.open_file` would wrap."""
    name = file if isinstance(file, int | str | bytes) else None
    if name is None and hasattr(type(file), "__fspath__"):
        try:
            name = os.fspath(file)
        except Exception:  # noqa: BLE001 (open finds the same)
            name = None
    try:
        plain = is_plain(name, *args, **keywords)
    except TypeError:
        plain = False
    return open_file(name, *args, **keywords) if plain else open(file, *args, **keywords)


def cases(
    bases: Iterable[type[unittest.TestCase]], opener: Callable[..., Any]
) -> Iterator[unittest.TestCase]:
    loader = unittest.TestLoader()
    for base in bases:
        members = {name: getattr(io, name) for name in io.__all__}
        members |= {"FileIO": RingFileIO, "open": staticmethod(opener), "is_C": True}
        members |= MOCKS
        ours = type(base.__name__, (base,), members)
        yield from (
            test
            for test in loader.loadTestsFromTestCase(ours)
            if isinstance(test, unittest.TestCase)
        )


def name_of(case: unittest.TestCase) -> str:
    return case.id().rpartition("test_")[2]


async def check(
    case: unittest.TestCase,
    run: Callable[[unittest.TestCase, unittest.TestResult], Awaitable[object]],
    reasons: Mapping[str, str],
) -> None:
    name = case.id().rpartition(".")[2]
    if name in reasons:
        pytest.skip(reasons[name])
    result = unittest.TestResult()
    await run(case, result)
    for _, traceback in (*result.errors, *result.failures):
        raise AssertionError(traceback)
    if result.skipped:
        pytest.skip(result.skipped[0][1])


@pytest.mark.parametrize("case", list(cases(BASES, open_ours)), ids=name_of)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
async def test_cpython(
    case: unittest.TestCase, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def run(case: unittest.TestCase, result: unittest.TestResult) -> None:
        await current_files().call(case.run, (result,))

    await check(case, run, NOT_OURS)


# ---- The methods of Trio's files -----------------------------------------------------------

AWAITED = frozenset(
    (
        *("flush", "peek", "read", "read1", "readall", "readinto", "readinto1", "readline"),
        *("readlines", "seek", "tell", "truncate", "write", "writelines"),
    )
)

# A test can only run where it meets no more than the methods of a file.
NOT_OF_METHODS = NOT_OURS | {
    "test_abc_inheritance": "asks for the class of the file",
    "test_abc_inheritance_official": "asks for the class of the file",
    "test_io_after_close": "calls __iter__ and __next__",
    "test_seek_and_tell": "makes tens of thousands of calls",
    "test_seeking_too": "uses a private attribute",
    "test_telling": "calls __next__",
    "test_threads": "makes tens of thousands of calls",
    "test_threads_write": "uses a private attribute",
    "testMethods": "calls __iter__ and __next__",
}


class AwaitedFile:
    """A file of `trio.open_file`, for synchronous code in a thread: its methods run on the loop."""

    token: trio.lowlevel.TrioToken

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._file = self._run(partial(trio.open_file, *args, **keywords))

    def _run(self, function: Callable[[], Awaitable[Any]]) -> Any:
        async def call() -> Any:
            return await function()

        # The tests have threads of their own.
        return trio.from_thread.run(call, trio_token=self.token)

    def __getattr__(self, name: str) -> Any:
        if name not in AWAITED or not hasattr(self._file.wrapped, name):
            return getattr(self._file, name)
        # Taken where it is awaited, as in a program.
        return lambda *args, **keywords: self._run(
            lambda: getattr(self._file, name)(*args, **keywords)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_file":
            super().__setattr__(name, value)
        else:
            setattr(self._file.wrapped, name, value)

    def close(self) -> None:
        self._run(self._file.aclose)

    def __enter__(self) -> Self:
        self._file.wrapped.__enter__()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        line = self.readline()
        if not line:
            raise StopIteration
        return line


def opens_files(case: unittest.TestCase) -> bool:
    method = getattr(case, case.id().rpartition(".")[2])
    return isinstance(case, test_file.AutoFileTests) or "self.open(" in inspect.getsource(method)


def refuse_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let half of the calls that must not wait find that they would have to."""
    decide = random.Random(0)

    def refusing(function: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
            if flags & os.RWF_NOWAIT and decide.random() < 0.5:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return function(fd, buffers, offset, flags)

        return call

    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.parametrize(
    "case", [case for case in cases(BASES, AwaitedFile) if opens_files(case)], ids=name_of
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
async def test_cpython_by_methods(
    case: unittest.TestCase, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AwaitedFile, "token", trio.lowlevel.current_trio_token(), raising=False)
    refuse_at_random(monkeypatch)

    async def run(case: unittest.TestCase, result: unittest.TestResult) -> None:
        await trio.to_thread.run_sync(case.run, result)

    await check(case, run, NOT_OF_METHODS)
