"""Random calls on files of `trio.open_file` and of `open` have equal results.

The tests compare results, exceptions, the position after each call, and the contents of the file at
the end. In each call, only a random part of the data can be read without a bridge. A second test
injects short transfers, interruptions and a full disk. In a third test, others use the position of
the open file too: by a duplicate of the fd, in a thread, or in a child.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import random
import tempfile
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings, strategies as st
from races import failing_sqe

import trio_uring
from trio_uring import RingConfig
from trio_uring._engine._ring import Ring
from trio_uring._files import _unbuffered
from trio_uring._files._bridge import INLINE_MAX
from trio_uring._files._methods import raw_of
from trio_uring._files._raw import RingFileIO
from trio_uring._kernel.uapi import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio_uring.lowlevel import Operation

# For each mode. The long profile, `nox -s fuzz`, has 20,000 examples for the suite's machines;
# here a hundredth of that, with more calls in each, makes 300,000 calls.
LONG = "TRIO_URING_FUZZ_EXAMPLES" in os.environ
EXAMPLES = max(int(os.environ.get("TRIO_URING_FUZZ_EXAMPLES", "0")) // 100, 8)
CALLS = (30, 80) if LONG else (6, 30)

# Python 3.12 warns of forks beside threads: the child makes a few calls and exits.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.usefixtures("no_deterministic_scheduling"),
]

MODES = [base + plus + kind for base in "rwxa" for plus in ("", "+") for kind in ("b", "t")]
ENCODINGS = ["utf-8", "utf-16", "iso2022_jp", "latin-1", "utf-8-sig"]
NEWLINES = [None, "", "\n", "\r", "\r\n"]

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

Call = tuple[str, tuple[Any, ...]]
CLOSE: Call = ("close", ())


# --- What is called -------------------------------------------------------------------------

SIZES = st.sampled_from([-1, None, 0, 1, 2, 3, 7, 64, 100, 4095, 4096, 4097, 20000])
OFFSETS = st.sampled_from([-3, -1, 0, 1, 2, 5, 64, 100, 4096, 9999])


def texts(encoding: str) -> st.SearchStrategy[str]:
    """Return texts, most of which *encoding* can encode. Others are an error on both sides."""
    alphabet = {"latin-1": "ab\n\r \xe9", "iso2022_jp": "ab\n\r \u3042\u3044"}.get(
        encoding, "ab\n\r \u3042\xe9\U0001f600"
    )
    return st.builds(
        lambda text, times: text * times,
        st.text(alphabet=alphabet, max_size=30),
        st.sampled_from([1, 1, 1, 3, 300]),
    )


def data() -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda part, times: part * times,
        st.binary(max_size=30) | st.sampled_from([b"\n", b"line\n", b"a\r\nb\rc\n"]),
        st.sampled_from([1, 1, 1, 3, 300]),
    )


def calls(pieces: st.SearchStrategy[Any], *, binary: bool) -> st.SearchStrategy[list[Call]]:
    """Return lists of calls that a file of this kind supports, and a few that it doesn't."""
    sized = ["read", "readline", "read1", "peek"] if binary else ["read", "readline"]
    call: st.SearchStrategy[Call] = st.one_of(
        st.tuples(st.sampled_from(sized), st.tuples(SIZES)),
        st.tuples(
            st.sampled_from(["read", "readline", "readlines", "flush", "tell", "readall"]),
            st.just(()),
        ),
        st.tuples(st.just("readlines"), st.tuples(SIZES)),
        st.tuples(st.sampled_from(["readinto", "readinto1"]), st.tuples(st.integers(0, 5000))),
        st.tuples(st.just("write"), st.tuples(pieces)),
        st.tuples(st.just("write"), st.tuples(pieces)),
        st.tuples(st.just("writelines"), st.tuples(st.lists(pieces, max_size=3))),
        st.tuples(st.just("seek"), st.tuples(OFFSETS, st.sampled_from([0, 0, 0, 1, 2, 3, 9]))),
        st.tuples(st.just("seek back"), st.tuples(st.integers(0, 5))),
        st.tuples(st.just("truncate"), st.tuples(st.sampled_from([None, 0, 3, 70, 5000, -1]))),
        st.tuples(st.sampled_from(["write", "read", "seek"]), st.just((1.5,))),
        st.sampled_from([CLOSE] + [("tell", ())] * 20),
    )
    return st.lists(call, min_size=CALLS[0], max_size=CALLS[1])


@st.composite
def scenarios(draw: st.DrawFn, mode: str) -> tuple[dict[str, Any], bytes, list[Call]]:
    """Draw the arguments of open, the initial contents of the file, and calls."""
    binary = "b" in mode
    if binary:
        arguments = {"buffering": draw(st.sampled_from([-1, 0, 2, 7, 64, 4096]))}
        return arguments, draw(data()), draw(calls(data(), binary=True))
    encoding = draw(st.sampled_from(ENCODINGS))
    arguments = {
        "buffering": draw(st.sampled_from([-1, 1, 2, 64, 4096])),
        "encoding": encoding,
        "newline": draw(st.sampled_from(NEWLINES)),
        "errors": draw(st.sampled_from([None, "strict", "replace"])),
    }
    content = draw(texts(encoding)).encode(encoding, "replace")
    return arguments, content, draw(calls(texts(encoding), binary=False))


# --- Both sides -----------------------------------------------------------------------------


def outcome_of(exc: BaseException) -> tuple[object, ...]:
    """Return the parts of an exception that must be equal."""
    if isinstance(exc, AttributeError):
        return (AttributeError,)
    return (
        type(exc),
        str(exc),
        getattr(exc, "errno", None),
        getattr(exc, "characters_written", None),
    )


class Reference:
    """A file of the standard library, called synchronously."""

    def __init__(self, file: Any) -> None:
        self.file = file

    async def call(self, name: str, args: tuple[Any, ...]) -> object:
        return getattr(self.file, name)(*args)


class Ours:
    """Our file, called as in a Trio program.

    Args:
      file: The file of `trio.open_file`.
      budgets: How many bytes each call may read without a bridge; 0 is as if none were cached.
    """

    def __init__(self, file: Any, budgets: Iterator[int]) -> None:
        self.wrapper = file
        self.file = file.wrapped
        self.budgets = budgets

    async def call(self, name: str, args: tuple[Any, ...]) -> object:
        method = getattr(self.wrapper, "aclose" if name == "close" else name)
        hit = getattr(getattr(method, "__self__", None), "hit", None)
        if hit is not None:
            hit.budget = next(self.budgets)
        return await method(*args)


# Half of the calls can read all that they need.
BUDGETS = (0, 1, 2, 7, 64, 4096, INLINE_MAX, INLINE_MAX, INLINE_MAX, INLINE_MAX)


def fd_of(file: Any) -> int:
    """Return the fd of *file*, without `fileno`, after which our file would not be private."""
    raw = getattr(file, "buffer", file)
    return io.FileIO.fileno(getattr(raw, "raw", raw))


def use_elsewhere(file: Any, who: str, what: Callable[[int], object]) -> object:
    """Do *what* with the open file of *file*, as *who*."""
    fd = os.dup(file.fileno())
    found: list[object] = []

    def use() -> None:
        try:
            found.append(what(fd))
        except OSError as exc:
            found.append(exc.errno)

    if who == "child":
        child = os.fork()
        if not child:
            try:
                use()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    elif who == "thread":
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    else:
        use()
    os.close(fd)
    return found


async def outcomes(side: Reference | Ours, sequence: list[Call]) -> list[object]:
    """Make the calls. Return the outcome of each, and the position after it."""
    results: list[object] = []
    cookies: list[int] = [0]
    for name, args in sequence:
        buffer: bytearray | None = None
        arguments = args
        if name == "seek back":  # to where a tell() was; for text, that is a cookie
            arguments = (cookies[args[0] % len(cookies)],)
        elif name.startswith("readinto"):
            buffer = bytearray(args[0])
            arguments = (buffer,)
        result: object
        try:
            if name == "other":
                result = use_elsewhere(side.file, *args)
            else:
                method = "seek" if name == "seek back" else name
                result = await side.call(method, arguments)
        except Exception as exc:  # noqa: BLE001 (whichever it is, it must be the same)
            result = outcome_of(exc)
        else:
            if name == "tell":
                cookies.append(result)
        position = None if side.file.closed else os.lseek(fd_of(side.file), 0, os.SEEK_CUR)
        results.append((name, args, result, buffer and bytes(buffer), position))
    return results


calls_made: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _counts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print how many calls were made in each mode."""
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        counts = ", ".join(f"{mode} {n}" for mode, n in calls_made.items())
        print(f"\ncalls compared: {calls_made.total()} ({counts})")


Scenario = tuple[dict[str, Any], bytes, list[Call]]


def crashes(mode: str, scenario: Scenario, open_reference: Callable[..., Any]) -> bool:
    """Return whether CPython crashes, as 3.11 does in some reads of text after a failed one."""
    arguments, content, sequence = scenario
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "reference")
        if "x" not in mode:
            path.write_bytes(content)
        child = os.fork()
        if not child:
            try:
                faulthandler.disable()
                reference = Reference(open_reference(path, mode, **arguments))
                outcomes(reference, [*sequence, CLOSE]).send(None)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def compare(
    mode: str,
    scenario: Scenario,
    open_reference: Callable[..., Any] = open,
    name_of: Callable[[Path], Path | int] = lambda path: path,
) -> None:
    """Make the same calls on both, each on a new file, and compare everything."""
    arguments, content, sequence = scenario
    if "b" not in mode and crashes(mode, scenario, open_reference):
        calls_made["calls that crash CPython"] += len(sequence)
        return
    with tempfile.TemporaryDirectory() as directory:
        ours_path, reference_path = Path(directory, "ours"), Path(directory, "reference")
        if "x" not in mode:
            ours_path.write_bytes(content)
            reference_path.write_bytes(content)

        async def main() -> tuple[object, object]:
            budgets = random.Random(len(content) + len(sequence))
            ours = Ours(
                await trio.open_file(name_of(ours_path), mode, **arguments),
                iter(partial(budgets.choice, BUDGETS), None),
            )
            assert raw_of(ours.file) is not None
            got = await outcomes(ours, [*sequence, CLOSE])
            reference = Reference(open_reference(name_of(reference_path), mode, **arguments))
            expected = await outcomes(reference, [*sequence, CLOSE])
            return got, expected

        got, expected = trio_uring.run(main, ring=RingConfig(require=True))
        calls_made[mode] += len(sequence)
        assert got == expected
        assert ours_path.read_bytes() == reference_path.read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_calls_are_those_of_the_standard_library(mode: str) -> None:
    @fuzzed
    @given(scenarios(mode))
    def check(scenario: Scenario) -> None:
        compare(mode, scenario)

    check()


# --- Others who have the open file ---------------------------------------------------------


USES = st.one_of(
    data().map(lambda piece: lambda fd: os.write(fd, piece)),
    st.sampled_from([0, 1, 5, 100, 5000]).map(lambda size: lambda fd: os.read(fd, size)),
    st.sampled_from([0, 1, 5, 100, 5000]).map(lambda to: lambda fd: os.lseek(fd, to, os.SEEK_SET)),
)
# A child takes a millisecond.
WHO = st.sampled_from([*["duplicate"] * 8, *["thread"] * 8, "child"])


@st.composite
def shared_scenarios(draw: st.DrawFn, mode: str) -> Scenario:
    """Draw a scenario in which others, which share the file, make some of the calls."""
    arguments, content, sequence = draw(scenarios(mode))
    # Where CPython keeps a part of what it read or wrote, the others' moves are not seen at once.
    for index in draw(st.lists(st.integers(0, len(sequence)), max_size=8)):
        other = ("other", (draw(WHO), draw(USES)))
        sequence = [*sequence[:index], other, *sequence[index:]]
    # Once closed, there is nothing to duplicate.
    return arguments, content, [call for call in sequence if call != CLOSE]


def open_by_number(mode: str) -> Callable[[Path], int]:
    """Return a function that opens a file, so that `open` is called with its fd."""

    def opened(path: Path) -> int:
        with path.open(mode) as file:
            return os.dup(file.fileno())

    return opened


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("opened", ["by path", "by number"])
def test_others_use_the_position_as_with_the_standard_library(mode: str, opened: str) -> None:
    name_of = open_by_number(mode) if opened == "by number" else lambda path: path

    @fuzzed
    @given(shared_scenarios(mode))
    def check(scenario: Scenario) -> None:
        compare(mode, scenario, name_of=name_of)

    check()


# --- Faults ---------------------------------------------------------------------------------


class Plan:
    """The faults of the first raw transfers, some of which have none. Later ones have none."""

    def __init__(self, faults: list[int | str | None]) -> None:
        self._faults = list(reversed(faults))

    def next(self) -> int | str | None:
        return self._faults.pop() if self._faults else None


def is_transfer(raw: io.FileIO, buffer: Any, *, reading: bool) -> bool:
    """Return whether a raw call gets as far as to transfer bytes."""
    if raw.closed or type(buffer) is float or not memoryview(buffer).nbytes:
        return False
    return raw.readable() if reading else raw.writable()


class FaultyFileIO(io.FileIO):
    """The reference. It ignores interruptions, because CPython itself tries again."""

    plan: Plan

    def readinto(self, buffer: Any, /) -> int:
        if not is_transfer(self, buffer, reading=True):
            return super().readinto(buffer)
        fault = self.plan.next()
        if fault == "full":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(memoryview(buffer)[:fault] if type(fault) is int else buffer)

    def write(self, data: Any, /) -> int:
        if not is_transfer(self, data, reading=False):
            return super().write(data)
        fault = self.plan.next()
        if fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(memoryview(data).cast("B")[:fault] if type(fault) is int else data)


def open_faulty(
    plan: Plan, path: Path, mode: str, buffering: int = -1, **arguments: Any
) -> io.IOBase:
    raw = FaultyFileIO(path, mode.replace("b", "").replace("t", ""))
    raw.plan = plan
    size = buffering if buffering > 1 else raw._blksize  # type: ignore[attr-defined]
    if buffering == 0:
        return raw
    plain = io.BufferedReader if mode[0] == "r" else io.BufferedWriter
    buffered = (io.BufferedRandom if "+" in mode else plain)(raw, size)
    if "b" in mode:
        return buffered
    return io.TextIOWrapper(buffered, **arguments, line_buffering=buffering == 1)


def inject_into_ours(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernel transfer less, or return an error, according to *plan*."""
    fault: list[int | str | None] = [None]

    def planned(method: Callable[..., Any], *, reading: bool) -> Callable[..., Any]:
        def call(self: RingFileIO, buffer: Any, /) -> object:
            if self.bridge is not None and is_transfer(self, buffer, reading=reading):
                fault[0] = plan.next()
            try:
                return method(self, buffer)
            finally:
                fault[0] = None

        return call

    append = _unbuffered._append

    async def planned_append(*args: Any) -> object:
        fault[0] = plan.next()
        try:
            return await append(*args)
        finally:
            fault[0] = None

    push = Ring.push

    def push_faulty(self: Ring, operation: Operation[Any], user_data: int) -> bool:
        now, sqe = fault[0], operation.sqe
        errors = {Opcode.READ: errno.EIO, Opcode.WRITE: errno.ENOSPC}
        error = errors.get(Opcode(operation.opcode))
        if error is None or now is None:
            return push(self, operation, user_data)
        fault[0] = None
        if type(now) is int:
            operation.sqe = (*sqe[:6], min(now, sqe[6]), *sqe[7:])  # type: ignore[assignment]
        else:
            code = errno.EINTR if now == "interrupted" else error
            operation.sqe = failing_sqe(code)
        try:
            return push(self, operation, user_data)
        finally:
            operation.sqe = sqe

    monkeypatch.setattr(Ring, "push", push_faulty)
    monkeypatch.setattr(RingFileIO, "_nowait_read", False)
    monkeypatch.setattr(RingFileIO, "nowait_write", False)
    monkeypatch.setattr(RingFileIO, "readinto", planned(RingFileIO.readinto, reading=True))
    monkeypatch.setattr(RingFileIO, "write", planned(RingFileIO.write, reading=False))
    monkeypatch.setattr(_unbuffered, "_append", planned_append)


FAULTS = st.lists(st.sampled_from([None, None, 1, 2, 7, 100, "interrupted", "full"]), max_size=12)


@pytest.mark.parametrize("mode", MODES)
def test_faults_are_met_as_the_standard_library_meets_them(mode: str) -> None:
    @fuzzed
    @given(scenarios(mode), FAULTS)
    def check(scenario: Scenario, faults: list[int | str | None]) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            inject_into_ours(Plan(faults), monkeypatch)
            compare(mode, scenario, lambda *a, **k: open_faulty(Plan(faults), *a, **k))

    check()
