"""CPython's own tests of `open` and `io.FileIO`, with our files. Each runs on a bridge.

Every file that a test opens is a `RingFileIO`, and its reads and writes use the ring. If Python is
installed without its tests, as on Debian, they are skipped.
"""

from __future__ import annotations

import io
import os
import sys
import unittest
from typing import TYPE_CHECKING, Any

import pytest
from races import current_files

from trio_uring._files._open import is_plain, open_file
from trio_uring._files._raw import RingFileIO

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def cases() -> Iterator[unittest.TestCase]:
    loader = unittest.TestLoader()
    for base in BASES:
        members = {name: getattr(io, name) for name in io.__all__}
        members |= {"FileIO": RingFileIO, "open": staticmethod(open_ours), "is_C": True}
        members |= MOCKS
        ours = type(base.__name__, (base,), members)
        yield from (
            test
            for test in loader.loadTestsFromTestCase(ours)
            if isinstance(test, unittest.TestCase)
        )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id().rpartition("test_")[2])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
async def test_cpython(
    case: unittest.TestCase, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = case.id().rpartition(".")[2]
    if name in NOT_OURS:
        pytest.skip(NOT_OURS[name])
    monkeypatch.chdir(tmp_path)
    result = unittest.TestResult()
    files = current_files()
    await files.call(case.run, (result,))
    for _, traceback in (*result.errors, *result.failures):
        raise AssertionError(traceback)
    if result.skipped:
        pytest.skip(result.skipped[0][1])
