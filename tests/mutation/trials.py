"""Runs for each mutant of Python the tests that reach its line, the quickest first.

Starting Python and collecting the tests would take longer than most of these tests do. So one
pytest process collects all of them, and forks for each mutant. The child gives the functions that
are loaded the code of the mutant, and its file has the mutant, too, for the Pythons that the tests
start. What is done at import, such as a default argument, needs a Python of its own.

Which tests reach a line is measured once, and kept in a file: by the line's text, so that most of
it remains true when lines are added. Delete the file when that is not enough.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Final, TextIO

import reached
from trio._core._ki import _CODE_KI_PROTECTION_STATUS_WMAP as PROTECTED_CODE

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

    import pytest

# A mutant that makes a test hang is noticed after this, and some times what the test takes.
HANGS_AFTER: Final = 10
HANGS_AFTER_TIMES: Final = 5

# A test may take this when it is measured.
MEASURED_MAX: Final = 60

PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass
class Mutant:
    """A change to one file below the root."""

    id: str
    name: str
    key: str  # in equivalent.toml
    file: Path
    changed: str
    lines: Sequence[str]  # that it changes, as `labels` has them
    at_import: bool  # whether it changes no function


def labels(text: str) -> list[str]:
    """Return for each line of a file its text, and which line with that text it is."""
    seen: Counter[str] = Counter()
    found = []
    for line in map(str.strip, text.splitlines()):
        seen[line] += 1
        found.append(f"{line} #{seen[line]}")
    return found


@dataclass
class Reach:
    """Which tests reach a line, and how long they take."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    by_line: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    by_file: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    # How many mutants of a file, below the root, a test has noticed.
    noticed: Counter[tuple[Path, str]] = field(default_factory=Counter)

    def read(self) -> None:
        """Read what was measured before."""
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            self._add(json.loads(line))

    def write(self, measured: dict[str, Any]) -> None:
        """Add what was measured of a test."""
        with self.path.open("a") as file:
            file.write(json.dumps(measured) + "\n")
        self._add(measured)

    def _add(self, measured: dict[str, Any]) -> None:
        test = measured["test"]
        self.seconds[test] = measured["seconds"]
        for spot in () if measured["failed"] else measured["spots"]:
            self.by_line[spot].add(test)
            self.by_file[spot.partition(": ")[0]].add(test)

    def tests_of(self, mutant: Mutant, among: Container[str], seconds: float) -> list[str]:
        """Return tests that reach the lines of *mutant*, and take *seconds* in all.

        The quickest come first, but not many of the same test file in a row, because those notice
        much the same. One counts as quicker that has noticed others of the mutated file.
        """
        file = "/".join(mutant.file.parts[1:])
        tests = {test for line in mutant.lines for test in self.by_line.get(f"{file}: {line}", ())}
        if mutant.at_import or not tests:
            tests = self.by_file[file]
        costs: dict[str, float] = {}
        of_file: Counter[str] = Counter()
        for test in sorted(filter(among.__contains__, tests), key=self.seconds.__getitem__):
            test_file = test.partition("::")[0]
            of_file[test_file] += 1
            noticed = self.noticed[mutant.file, test]
            costs[test] = self.seconds[test] * of_file[test_file] / (1 + noticed)
        chosen, total = [], 0.0
        for test in sorted(costs, key=costs.__getitem__):
            total += self.seconds[test]
            if chosen and total > seconds:
                break
            chosen.append(test)
        return chosen


class Trials:
    """A pytest plugin: tries *mutants* in the place of running all tests once."""

    def __init__(
        self,
        root: Path,
        reach: Reach,
        mutants: Sequence[Mutant],
        *,
        seconds: float,
        afresh: Callable[[Sequence[str]], str],
        tell: Callable[[Mutant, str], object],
        out: TextIO,
    ) -> None:
        self.root = root
        self.reach = reach
        self.mutants = mutants
        self.seconds = seconds
        self.afresh = afresh  # runs tests in a new Python, and returns which failed
        self.tell = tell
        self.out = out
        self._functions: defaultdict[str, list[FunctionType]] = defaultdict(list)
        self._passed: set[str] = set()  # alone, with nothing broken
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try the mutants: called by pytest when all tests are collected."""
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        items = {item.nodeid: item for item in session.items}
        for function in gc.get_objects():
            if type(function) is FunctionType:
                self._functions[function.__code__.co_filename].append(function)
        gc.freeze()  # so that the children need no copy of it all
        self.reach.read()
        self._measure([item for name, item in items.items() if name not in self.reach.seconds])
        for mutant in self.mutants:
            while True:
                tests = self.reach.tests_of(mutant, items, self.seconds)
                noticed = self._try([items[test] for test in tests], mutant)
                test = noticed.rpartition(": ")[0]
                if test not in items or self._passes_alone(items[test]):
                    break
                del items[test]
            self.reach.noticed[mutant.file, test] += 1
            self.tell(mutant, noticed)
        return True

    def _passes_alone(self, item: pytest.Item) -> bool:
        """Return whether *item* passes with nothing broken, if no others ran before."""
        if item.nodeid not in self._passed:
            failure = self._try_in_child([item], ())
            if failure:
                print(f"fails with nothing broken: {failure}", file=self.out)
                return False
            self._passed.add(item.nodeid)
        return True

    # ---- Which tests reach a line --------------------------------------------------------

    def _measure(self, items: list[pytest.Item]) -> None:
        package = self.root / "trio_uring"
        lines = {
            str(path.relative_to(package)): labels(path.read_text())
            for path in package.rglob("*.py")
        }
        while items:
            ended = ""
            for line in self._forked(items, self._measure_in_child, lambda _: MEASURED_MAX):
                if not line.startswith("{"):
                    ended = line
                    continue
                measured = json.loads(line)
                if measured["failed"]:
                    print(f"fails with nothing broken: {measured['test']}", file=self.out)
                places = [spot.rpartition(":") for spot in measured["spots"]]
                spots = {f"{file}: {lines[file][int(at) - 1]}" for file, _, at in places}
                self.reach.write({**measured, "spots": sorted(spots)})
                items = items[1:]
            if items:  # the first one ended the process, or hung
                print(f"cannot be measured: {items[0].nodeid}: {ended}", file=self.out)
                self.reach.write(
                    {"test": items[0].nodeid, "seconds": 0, "failed": True, "spots": []}
                )
                items = items[1:]

    def _measure_in_child(self, items: Sequence[pytest.Item]) -> Iterator[str]:
        others = self.root / "reached.txt"
        os.environ[reached.VARIABLE] = str(others)
        reached.start(self.root / "trio_uring", os.getpid())
        for item, following in zip(items, (*items[1:], None), strict=True):
            others.write_text("")
            self._failed = False
            reached.begin_again()
            start = time.monotonic()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds = time.monotonic() - start
            spots = sorted({*reached.spots, *others.read_text().split()})
            measured = {"test": item.nodeid, "seconds": seconds, "failed": self._failed}
            yield json.dumps({**measured, "spots": spots})

    # ---- One mutant ----------------------------------------------------------------------

    def _try(self, items: Sequence[pytest.Item], mutant: Mutant) -> str:
        """Return which test notices *mutant*, or an empty string."""
        if not items:
            return ""
        path = self.root / mutant.file
        original, before = path.read_text(), path.stat()
        path.write_text(mutant.changed)
        try:
            codes = None
            if not mutant.at_import:
                modules = (compile(text, path, "exec") for text in (original, mutant.changed))
                codes = _new_codes(self._functions[str(path)], *modules)
            if codes is None:
                return self.afresh([item.nodeid for item in items])
            return self._try_in_child(items, codes)
        finally:
            path.write_text(original)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _try_in_child(
        self, items: Sequence[pytest.Item], codes: Iterable[tuple[FunctionType, CodeType]]
    ) -> str:
        def run(items: Sequence[pytest.Item]) -> Iterator[str]:
            for function, code in codes:
                function.__code__ = code
            end = time.monotonic() + HANGS_AFTER + HANGS_AFTER_TIMES * self.seconds
            for item, following in zip(items, (*items[1:], None), strict=True):
                if time.monotonic() > end:
                    break  # it makes all tests slow, and none fail
                yield item.nodeid
                self._failed = False
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                if self._failed:
                    yield "failed"
                    return
            yield "passed"

        def patience(test: str) -> float:
            return HANGS_AFTER + HANGS_AFTER_TIMES * self.reach.seconds.get(test, 0)

        *_, test, ended = ["the first test", *self._forked(items, run, patience)]
        return "" if ended == "passed" else f"{test}: {ended}"

    # ---- A forked child --------------------------------------------------------------------

    def _forked(
        self,
        items: Sequence[pytest.Item],
        run: Callable[[Sequence[pytest.Item]], Iterator[str]],
        patience: Callable[[str], float],
    ) -> Iterator[str]:
        """Yield what *run* yields in a child process, or how the child ended."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                os.close(reader)
                for line in run(items):
                    os.write(writer, line.encode() + b"\n")
                os.write(writer, b"\n")
            finally:
                os._exit(0)
        os.close(writer)
        try:
            yield from _lines(reader, patience)
        finally:
            os.close(reader)
            _end_children()


def _lines(reader: int, patience: Callable[[str], float]) -> Iterator[str]:
    buffer, last = b"", ""
    while True:
        if not select.select([reader], [], [], patience(last))[0]:
            yield "hung"
            return
        data = os.read(reader, 1 << 20)
        *lines, buffer = (buffer + data).split(b"\n")
        for line in map(bytes.decode, lines):
            if not line:
                return
            yield line
            last = line
        if not data:
            yield "ended the process"
            return


def _end_children() -> None:
    """End what a child has left: all of it becomes a child of this process."""
    children = Path("/proc/thread-self/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


# ---- Code of functions ---------------------------------------------------------------------


def _new_codes(
    functions: Iterable[FunctionType], before: CodeType, after: CodeType
) -> list[tuple[FunctionType, CodeType]] | None:
    """Return which of the *functions* of a module are changed, and their new code.

    None if there is no such function, or one that would have other variables.
    """
    news = _by_name(after)
    new = {
        (name, old.co_firstlineno): code
        for name, olds in _by_name(before).items()
        if len(olds) == len(news[name])
        for old, code in zip(olds, news[name], strict=True)
        if old != code
    }
    pairs = []
    for function in functions:
        old = function.__code__
        code = new.get((old.co_qualname, old.co_firstlineno))
        if code is not None:
            if code.co_freevars != old.co_freevars:
                return None
            pairs.append((function, _like(old, code)))
    return pairs or None


def _by_name(module: CodeType) -> defaultdict[str, list[CodeType]]:
    codes: defaultdict[str, list[CodeType]] = defaultdict(list)
    to_look_at = [module]
    while to_look_at:
        code = to_look_at.pop()
        codes[code.co_qualname].append(code)
        to_look_at += [const for const in code.co_consts if isinstance(const, CodeType)]
    return codes


def _like(old: CodeType, new: CodeType) -> CodeType:
    """Protect *new* from KeyboardInterrupt if *old* is: Trio knows that by the code."""
    with suppress(KeyError):
        PROTECTED_CODE[new] = PROTECTED_CODE[old]
    return new
