"""Break the code on purpose, and see that the tests notice: ``nox -s mutation``.

    python mutate.py promises [NAME...]           the breaks of promises.toml, or those with NAME
    python mutate.py c [NAME...]                  those of c_breaks.toml
    python mutate.py python [--each N] [FILE...]  N generated mutants of each file (--seed S)
    python mutate.py python --all [FILE...]       all of them

It copies the checkout, builds it there in place, and makes one change after the other. After each
it runs tests: those that are named with a break, or those that reach the line of a mutant, the
quickest first, for at most --seconds (see trials.py). A change that they do not notice survives,
and then this program fails, unless equivalent.toml says why the change makes no difference.

What became of each mutant is kept in the directory --results, and which tests reach which line.
Started again, this program tries only mutants that have survived, or were not tried.

Why mutants of Python are made here and not by mutmut or cosmic-ray: mutmut replaces a function by
one that calls a mutant, leaves out decorated functions, which are most of the hot path, and runs
tests in forks of one process, where the native engine has already put its own methods into the
classes. cosmic-ray changes type annotations, and deletes no statement, which is what shows most.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import tomllib
from trials import Mutant, Reach, Trials, labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE: Final = Path(__file__).parent.resolve()
ROOT: Final = HERE.parents[1]
PACKAGE: Final = "trio_uring"
COPIED: Final = ("trio_uring", "tests", "examples", "setup.py", "pyproject.toml", "README.md")

# A mutant that makes tests hang is noticed after this, each test and all together.
TEST_SECONDS: Final = 120
SECONDS: Final = 1200

# The same for a mutant that needs a Python of its own.
AFRESH_SECONDS: Final = 120

# Fails where the package is not installed.
NEEDS_WHEEL: Final = "tests/kernel/test_processes.py::test_multiprocessing"

# The tests that may notice a mutant. The others need the package installed, or notice little.
TESTS: Final = ("unit", "kernel", "conformance", "fuzz")

# A mutant is tried on one after the other until a test notices it.
ENGINES: Final = ("python", "native")

# Whose mutants are made.
MUTATED: Final = ("_engine", "_streams")


@dataclass
class Break:
    """A change to one file, and the tests that must notice it."""

    name: str
    file: Path  # below the root
    changed: str
    tests: Sequence[str]
    equivalent: str = ""  # why it makes no difference, if it makes none
    engine: str = "native"


# ---- Breaks by name --------------------------------------------------------------------------

# Of each list, the folder below which its files are.
LISTS: Final = {
    "c": ("c_breaks.toml", Path(PACKAGE, "_kernel")),
    "promises": ("promises.toml", Path(PACKAGE)),
}


def named_breaks(language: str, names: Sequence[str]) -> Iterator[Break]:
    """Yield the breaks of a list with one of *names* in their promise, file or name, or all."""
    file, folder = LISTS[language]
    for row in tomllib.loads((HERE / file).read_text())["break"]:
        described = f"{row.get('promise', '')} {row['file']} {row['name']}"
        if names and not any(name in described for name in names):
            continue
        yield Break(
            row["name"],
            folder / row["file"],
            replaced(row, folder / row["file"]),
            row["tests"],
            equivalent=row.get("equivalent", ""),
            engine=row.get("engine", "native"),
        )


def replaced(row: dict[str, Any], path: Path) -> str:
    """Return the text of the row's file, which is *path*, with the break in it."""
    text = (ROOT / path).read_text()
    if text.count(row["find"]) != 1:
        raise SystemExit(f"{row['name']}: {row['file']} has {row['find']!r} not once")
    return text.replace(row["find"], row["replace"])


# ---- Mutants of Python -----------------------------------------------------------------------

Node = ast.expr | ast.stmt

COMPARISONS: Final[dict[type[ast.cmpop], str]] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS: Final[dict[type[ast.operator], str]] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.BitAnd: "|",
    ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip


class Source:
    """The text of a module, by the nodes of its tree."""

    def __init__(self, text: str) -> None:
        self.raw = text.encode()
        self._lines = [0]
        for line in self.raw.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def span(self, node: Node) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self._lines[node.lineno - 1] + node.col_offset,
            self._lines[node.end_lineno - 1] + node.end_col_offset,
        )

    def of(self, node: Node) -> str:
        """Return the text of an expression, in parentheses."""
        start, end = self.span(node)
        return f"({self.raw[start:end].decode()})"


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of *node* in which something may be changed."""
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.Raise() | ast.Assert() | ast.JoinedStr():
            return  # messages; and an assertion is there to make no difference
        case ast.AnnAssign():
            yield from [node.value] if node.value is not None else []
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield from filter(None, (*node.args.defaults, *node.args.kw_defaults))
            yield from node.body
        case _:
            yield from ast.iter_child_nodes(node)


def changes(node: ast.AST, source: Source) -> Iterator[tuple[Node, str]]:
    """Yield what can take the place of *node*, or of a part of it."""
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.If() | ast.IfExp():
            yield node.test, f"not {source.of(node.test)}"
        case ast.While(test=test) if not isinstance(test, ast.Constant):
            yield test, "False"
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            yield node, f"{source.of(left)} {COMPARISONS[type(op)]} {source.of(right)}"
        case ast.BoolOp(op=op, values=values):
            word = " and " if isinstance(op, ast.And) else " or "
            for left_out in values:
                rest = word.join(source.of(value) for value in values if value is not left_out)
                yield node, f"({rest})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            yield node, f"({source.of(left)} {OPERATORS[type(op)]} {source.of(right)})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)):
            yield node, str(value + 1)
        case ast.Return(value=ast.expr()) if not _is_nothing(node.value):
            yield node, "return None"
        case ast.Break():
            yield node, "continue"
        case ast.Continue():
            yield node, "break"
        case ast.Raise() | ast.AugAssign() | ast.Delete():
            yield node, "pass"
        case ast.Expr() if not isinstance(node.value, ast.Constant):  # else a docstring
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case _:
            pass


def all_changes(node: ast.AST, source: Source) -> Iterator[tuple[int, int, str]]:
    """Yield every change below *node*: from where, to where, and the new text."""
    for changed, new in changes(node, source):
        yield (*source.span(changed), new)
    for part in parts(node):
        yield from all_changes(part, source)


def _is_nothing(node: ast.expr | None) -> bool:
    """Whether *node* is None or False: whoever gets it asks only whether it is true."""
    return isinstance(node, ast.Constant) and (node.value is None or node.value is False)


def function_bodies(tree: ast.AST, source: Source) -> list[tuple[int, int]]:
    """Return where the bodies of functions are."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (source.span(node.body[0])[0], source.span(node.body[-1])[1])
        for node in ast.walk(tree)
        if isinstance(node, functions)
    ]


def python_mutants(file: str, how_many: int | None, seed: int) -> Iterator[Mutant]:
    """Yield *how_many* mutants of *file*, chosen by *seed*, or all."""
    path = Path(PACKAGE, file)
    text = (ROOT / path).read_text()
    source = Source(text)
    raw, lines = source.raw, text.splitlines()
    tree = ast.parse(text)
    bodies = function_bodies(tree, source)
    chosen = sorted(set(all_changes(tree, source)))
    if how_many is not None:
        chosen = random.Random(f"{seed} {file}").sample(chosen, min(how_many, len(chosen)))
    keys: Counter[str] = Counter()
    for start, end, new in sorted(chosen):
        changed = (raw[:start] + new.encode() + raw[end:]).decode()
        try:
            compile(changed, file, "exec")
        except SyntaxError:
            continue
        first, last = (raw[:at].count(b"\n") for at in (start, end))
        old, new = (" ".join(text.split()) for text in (raw[start:end].decode(), new))
        key = f"{file}: {lines[first].strip()}: {new}"
        keys[key] += 1
        yield Mutant(
            f"{key} #{keys[key]}",
            f"{file}:{first + 1}: {old} -> {new}",
            key,
            path,
            changed,
            labels(text)[first : last + 1],
            at_import=not any(begin <= start < stop for begin, stop in bodies),
        )


# ---- Running the tests -----------------------------------------------------------------------


class Copy:
    """A copy of the checkout, built in place."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("*.so"))
            else:
                shutil.copy(source, directory / name)
        if not self.build():
            raise SystemExit("it cannot be built: is there a gcc?")

    def build(self) -> bool:
        """Build both extensions; return whether that worked."""
        kernel = self.root / PACKAGE / "_kernel"
        for old in kernel.glob("*.so"):
            old.unlink()
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        self._run(*command, env={"CFLAGS": "-O1"})
        return len(list(kernel.glob("*.so"))) == 2  # setup.py leaves out what cannot be built

    def environment(self, engine: str) -> dict[str, str]:
        return {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",  # two changes can be as long, and of the same second
            "TRIO_URING_ENGINE": engine,
        }

    def pytest_options(self) -> list[str]:
        return [
            *("-q", "--no-header", "--tb=no"),
            *("-p", "no:cacheprovider", "-p", "trio_uring.pytest_plugin"),
            *(f"--timeout={TEST_SECONDS}", f"--basetemp={self.root}/tmp"),
            *("--deselect", NEEDS_WHEEL),
        ]

    def test(self, tests: Sequence[str], engine: str) -> str:
        """Run *tests* on *engine* until one fails; return which, or an empty string."""
        for test in tests:
            if test == "model":
                command = [sys.executable, "tests/model/check.py"]
            else:
                options = self.pytest_options()
                command = [sys.executable, "-m", "pytest", "-x", *options, f"tests/{test}"]
            status, output = self._run(*command, env=self.environment(engine))
            if status:
                return first_failure(output, status, test)
        return ""

    def test_at_once(self, tests: Sequence[str], engine: str) -> str:
        """Run *tests*, by their ids, in one Python; return which failed, or an empty string."""
        command = [sys.executable, "-m", "pytest", "-x", *self.pytest_options(), *tests]
        status, output = self._run(*command, env=self.environment(engine), seconds=AFRESH_SECONDS)
        failure = first_failure(output, status).removeprefix("FAILED ").partition(" - ")[0]
        return f"{failure}: failed" if status else ""

    def check(self, to_try: Sequence[Break]) -> None:
        """Fail if a test fails though nothing is broken."""
        for engine in sorted({each.engine for each in to_try}):
            tests = {test for each in to_try if each.engine == engine for test in each.tests}
            if failed := self.test(sorted(tests), engine):
                raise SystemExit(f"without a break, on the {engine} engine: {failed}")

    def _run(self, *command: str, env: dict[str, str], seconds: float = SECONDS) -> tuple[int, str]:
        """Run a command in a session of its own, of which nothing is left then."""
        with subprocess.Popen(
            command,
            cwd=self.root,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                output = ""
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def try_break(self, each: Break) -> str:
        """Return which test noticed *each*, or an empty string."""
        path = self.root / each.file
        original = path.read_text()
        path.write_text(each.changed)
        try:
            if path.suffix == ".c" and not self.build():
                raise SystemExit(f"{each.name}: it cannot be built")
            return self.test(each.tests, each.engine)
        finally:
            path.write_text(original)


def first_failure(output: str, status: int, test: str = "all") -> str:
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    return (failed or [f"{test}: {how(status)}"])[0]


def how(status: int) -> str:
    return f"ended by signal {-status}" if status < 0 else f"exit status {status}"


def try_breaks(to_try: Sequence[Break], *, unchecked: bool) -> bool:
    """Try every break, print what noticed it, and return whether one survives."""
    survived = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Copy(Path(directory))
        if not unchecked:
            copy.check(to_try)
        for number, each in enumerate(to_try, 1):
            if each.equivalent:
                noticed = f"makes no difference: {each.equivalent}"
            else:
                noticed = copy.try_break(each)
            print(f"[{number}/{len(to_try)}] {each.name}\n    {noticed or 'SURVIVED'}", flush=True)
            if not noticed:
                survived.append(each)
    print(f"{len(to_try)} breaks, {len(to_try) - len(survived)} noticed")
    for each in survived:
        print(f"survived: {each.name}")
    return bool(survived)


# ---- Trying mutants --------------------------------------------------------------------------


class Results:
    """What became of each mutant: which test noticed it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else ()
        self.noticed: dict[str, str] = dict(map(json.loads, lines))

    def add(self, mutant: Mutant, noticed: str) -> None:
        self.noticed[mutant.id] = noticed
        with self.path.open("a") as file:
            file.write(json.dumps([mutant.id, noticed]) + "\n")


def try_mutants(
    mutants: Sequence[Mutant], engines: Sequence[str], directory: Path, seconds: float
) -> bool:
    """Try the mutants on *engines*, print what survives, and return whether any does."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.jsonl"
    known = tomllib.loads((HERE / "equivalent.toml").read_text())
    to_try = [mutant for mutant in mutants if mutant.key not in known]
    tried = Results(path).noticed
    # Those that take long come last.
    to_try.sort(key=lambda mutant: (mutant.at_import, mutant.id in tried))
    with tempfile.TemporaryDirectory() as copied:
        copy = Copy(Path(copied))
        shutil.copy(HERE / "reached.py", copy.root / "sitecustomize.py")
        for engine in engines:
            noticed = Results(path).noticed
            left = [mutant for mutant in to_try if not noticed.get(mutant.id)]
            if left:
                try_on(engine, copy, left, directory, seconds)
    noticed = Results(path).noticed
    for file, of_file in groupby(mutants, lambda mutant: mutant.file):
        each = list(of_file)
        equivalent = sum(mutant.key in known for mutant in each)
        survived = sum(mutant.key not in known and not noticed[mutant.id] for mutant in each)
        print(f"{file}: {len(each)} mutants, {equivalent} make no difference, {survived} survived")
    survivors = [mutant for mutant in to_try if not noticed[mutant.id]]
    for mutant in survivors:
        print(f"survived: {mutant.name}\n    {mutant.key}")
    return bool(survivors)


def try_on(
    engine: str, copy: Copy, mutants: Sequence[Mutant], directory: Path, seconds: float
) -> None:
    """Try the mutants on *engine*, in a forked child."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    results = Results(directory / "results.jsonl")
    numbers = count(1)

    def tell(mutant: Mutant, noticed: str) -> None:
        results.add(mutant, noticed)
        print(f"[{next(numbers)}/{len(mutants)} {engine}] {mutant.name}", file=out)
        print(f"    {noticed or 'SURVIVED'}", file=out)

    def afresh(tests: Sequence[str]) -> str:
        return copy.test_at_once(tests, engine)

    pid = os.fork()
    if pid == 0:
        os.chdir(copy.root)
        os.environ.update(copy.environment(engine))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what pytest prints
        sys.path.insert(0, str(copy.root))
        trials = Trials(
            copy.root,
            Reach(directory / f"reach-{engine}.jsonl"),
            mutants,
            seconds=seconds,
            afresh=afresh,
            tell=tell,
            out=out,
        )
        options = [*copy.pytest_options(), *(f"tests/{name}" for name in TESTS)]
        os._exit(int(pytest.main(options, plugins=[trials])))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise SystemExit(f"the tests of the {engine} engine: {how(status)}")


def main() -> None:
    """Try what the arguments say, and fail if something survives."""
    parser = argparse.ArgumentParser(description="Break the code, and see that tests fail.")
    parser.add_argument("language", choices=(*LISTS, "python"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--each", type=int, default=10, help="how many mutants of each Python file")
    parser.add_argument("--all", action="store_true", help="all mutants of each Python file")
    parser.add_argument("--seed", type=int, default=0, help="which mutants")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument(
        "--seconds", type=float, default=20, help="how long to run tests with one mutant"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / ".nox" / "mutants", help="where to keep results"
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="do not run the tests with nothing broken first"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.language in LISTS:
        breaks = list(named_breaks(arguments.language, arguments.names))
        sys.exit(try_breaks(breaks, unchecked=arguments.unchecked))
    files = arguments.names or sorted(
        str(path.relative_to(ROOT / PACKAGE))
        for folder in MUTATED
        for path in (ROOT / PACKAGE / folder).glob("*.py")
    )
    each = None if arguments.all else arguments.each
    mutants = [mutant for file in files for mutant in python_mutants(file, each, arguments.seed)]
    directory = arguments.results.resolve()
    sys.exit(try_mutants(mutants, arguments.engines, directory, arguments.seconds))


if __name__ == "__main__":
    main()
