"""Break the code on purpose, and see that the tests notice: ``nox -s mutation``.

    python mutate.py promises [NAME...]           the breaks of promises.toml, or those with NAME
    python mutate.py c [NAME...]                  those of c_breaks.toml
    python mutate.py python [--each N] [FILE...]  N generated mutants of each file (--seed S)

It copies the checkout, builds it there in place, and makes one change after the other. After each
it runs the tests that belong to the file. A change that they do not notice survives, and then this
program fails, unless equivalent.toml says why the change makes no difference.

Why mutants of Python are made here and not by mutmut or cosmic-ray: mutmut replaces a function by
one that calls a mutant, leaves out decorated functions, which are most of the hot path, and runs
tests in forks of one process, where the native engine has already put its own methods into the
classes. cosmic-ray changes type annotations, and deletes no statement, which is what shows most.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import tomllib

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE: Final = Path(__file__).parent.resolve()
ROOT: Final = HERE.parents[1]
PACKAGE: Final = "trio_uring"
COPIED: Final = ("trio_uring", "tests", "examples", "setup.py", "pyproject.toml", "README.md")

# A mutant that makes tests hang is noticed after this, each test and all together.
TEST_SECONDS: Final = 120
SECONDS: Final = 1200

# Fails where the package is not installed.
NEEDS_WHEEL: Final = "tests/kernel/test_processes.py::test_multiprocessing"

SIMULATION: Final = "fuzz/test_simulated_kernel.py"

# The tests of each Python file, those that notice most in the least time first.
TESTS_OF: Final[dict[str, tuple[str, ...]]] = {
    "_engine/_buffer_pool.py": (SIMULATION, "kernel/test_ring.py", "kernel/test_receive_many.py"),
    "_engine/_completion_batches.py": ("kernel/test_batch.py", SIMULATION),
    "_engine/_fd_waiters.py": (
        *("kernel/test_fd_waiters.py", "kernel/test_in_flight.py", "kernel/test_closing.py"),
        *("kernel/test_receive_many.py", SIMULATION),
    ),
    "_engine/_file_calls.py": ("kernel/test_positional.py", "kernel/test_file_sync.py"),
    "_engine/_file_systems.py": ("kernel/test_file_servers.py", "kernel/test_files.py"),
    "_engine/_guest.py": ("kernel/test_guest.py",),
    "_engine/_in_flight.py": (
        *("fuzz/test_manager_machine.py", "unit/test_io_manager.py", "kernel/test_in_flight.py"),
        *("kernel/test_cancellation.py", "kernel/test_closing.py", "kernel/test_statistics.py"),
        *("kernel/test_batch.py", "kernel/test_closing_ring.py", SIMULATION),
    ),
    "_engine/_io_manager.py": (
        *("fuzz/test_manager_machine.py", "unit/test_io_manager.py", "kernel/test_in_flight.py"),
        *("kernel/test_guest.py", "kernel/test_statistics.py", "kernel/test_closing_ring.py"),
        *("kernel/test_ring_channel.py", "kernel/test_fd_waiters.py", SIMULATION),
        "kernel/test_ring_setup.py",
    ),
    "_engine/_limiter.py": ("kernel/test_batch.py", "kernel/test_in_flight.py", SIMULATION),
    "_engine/_mailbox.py": ("kernel/test_ring_channel.py", "kernel/test_serve_threads.py"),
    "_engine/_native_loop.py": (
        *("kernel/test_native_engine.py", "kernel/test_statistics.py", SIMULATION),
    ),
    "_engine/_readiness.py": (
        *("kernel/test_fd_waiters.py", "kernel/test_fd_reuse.py", "kernel/test_closing.py"),
    ),
    "_engine/_registered_tables.py": ("kernel/test_write_file.py", "kernel/test_direct.py"),
    "_engine/_ring.py": (
        *("kernel/test_ring.py", "kernel/test_ring_setup.py", "kernel/test_restrictions.py"),
        *("kernel/test_batch.py", SIMULATION, "kernel/test_ring_channel.py"),
    ),
    "_engine/_ring_setup.py": ("kernel/test_ring_setup.py", "kernel/test_sqpoll.py"),
    "_engine/_run_state.py": (
        *("kernel/test_statistics.py", "kernel/test_write_file.py", "kernel/test_closing_ring.py"),
        "kernel/test_ring_channel.py",
    ),
    "_engine/_turn_budget.py": ("kernel/test_datagrams.py", "kernel/test_listeners.py"),
    "_streams/_anyio_native.py": ("kernel/test_anyio_streams.py", "kernel/test_anyio_sockets.py"),
    "_streams/_anyio_streams.py": ("kernel/test_anyio_streams.py", "kernel/test_anyio_sockets.py"),
    "_streams/_endpoints.py": (
        *("kernel/test_send_file.py", "kernel/test_relay.py", "kernel/test_anyio_streams.py"),
        *("kernel/test_receive_file.py", "kernel/test_receive_many.py"),
        "kernel/test_file_servers.py",
    ),
    "_streams/_fd_stream.py": (
        *("kernel/test_fifos.py", "conformance/test_stream_semantics.py", SIMULATION),
    ),
    "_streams/_listener.py": ("kernel/test_listeners.py",),
    "_streams/_native.py": (
        *("kernel/test_native_engine.py", "kernel/test_datagrams.py"),
        *("conformance/test_socket_semantics.py", "conformance/test_stream_semantics.py"),
        "kernel/test_native_perform.py",
    ),
    "_streams/_socket.py": (
        *("conformance/test_socket_semantics.py", "conformance/test_message_semantics.py"),
        *("kernel/test_datagrams.py", "kernel/test_listeners.py", SIMULATION),
        "kernel/test_socket_guards.py",
    ),
    "_streams/_socket_stream.py": (
        *("conformance/test_stream_semantics.py", "kernel/test_cost.py", SIMULATION),
    ),
}


@dataclass
class Break:
    """A change to one file, and the tests that must notice it."""

    name: str
    file: Path  # below the root
    changed: str
    tests: Sequence[str]
    key: str = ""  # in equivalent.toml
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
        case ast.Return(value=ast.expr()) if not _is_none(node.value):
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


def _is_none(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def python_mutants(file: str, count: int, seed: int) -> Iterator[Break]:
    """Yield *count* mutants of *file*, chosen by *seed*."""
    known = equivalents()
    path = Path(PACKAGE, file)
    text = (ROOT / path).read_text()
    source = Source(text)
    raw = source.raw
    places = sorted(set(all_changes(ast.parse(text), source)))
    chosen = random.Random(f"{seed} {file}").sample(places, min(count, len(places)))
    for start, end, new in sorted(chosen):
        changed = (raw[:start] + new.encode() + raw[end:]).decode()
        try:
            compile(changed, file, "exec")
        except SyntaxError:
            continue
        line = text.splitlines()[raw[:start].count(b"\n")].strip()
        old = " ".join(raw[start:end].decode().split())
        new = " ".join(new.split())
        number = raw[:start].count(b"\n") + 1
        key = f"{file}: {line}: {new}"
        yield Break(
            f"{file}:{number}: {old} -> {new}",
            path,
            changed,
            TESTS_OF[file],
            key=key,
            equivalent=known.get(key, ""),
            engine="native" if "native" in file else "python",
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

    def test(self, tests: Sequence[str], engine: str) -> str:
        """Run *tests* on *engine* until one fails; return which, or an empty string."""
        environment = {"PYTHONPATH": str(self.root), "TRIO_URING_ENGINE": engine}
        for test in tests:
            if test == "model":
                command = [sys.executable, "tests/model/check.py"]
            else:
                command = [
                    *(sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no"),
                    *("-p", "no:cacheprovider", "-p", "trio_uring.pytest_plugin"),
                    *(f"--timeout={TEST_SECONDS}", f"--basetemp={self.root}/tmp"),
                    *("--deselect", NEEDS_WHEEL, f"tests/{test}"),
                ]
            status, output = self._run(*command, env=environment)
            if status:
                failed = [line for line in output.splitlines() if line.startswith("FAILED")]
                return (failed or [f"{test}: {how(status)}"])[0]
        return ""

    def check(self, to_try: Sequence[Break]) -> None:
        """Fail if a test fails though nothing is broken."""
        for engine in sorted({each.engine for each in to_try}):
            tests = {test for each in to_try if each.engine == engine for test in each.tests}
            if failed := self.test(sorted(tests), engine):
                raise SystemExit(f"without a break, on the {engine} engine: {failed}")

    def _run(self, *command: str, env: dict[str, str]) -> tuple[int, str]:
        """Run a command in a session of its own, of which nothing is left then."""
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            output = ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
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


def how(status: int) -> str:
    return f"ended by signal {-status}" if status < 0 else f"exit status {status}"


def equivalents() -> dict[str, str]:
    """Return why some mutants make no difference, by their keys."""
    return tomllib.loads((HERE / "equivalent.toml").read_text())


def breaks(arguments: argparse.Namespace) -> list[Break]:
    if arguments.language in LISTS:
        return list(named_breaks(arguments.language, arguments.names))
    files = arguments.names or sorted(TESTS_OF)
    return [
        mutant for file in files for mutant in python_mutants(file, arguments.each, arguments.seed)
    ]


def main() -> None:
    """Try every break, print what noticed it, and fail if one survives."""
    parser = argparse.ArgumentParser(description="Break the code, and see that tests fail.")
    parser.add_argument("language", choices=(*LISTS, "python"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--each", type=int, default=10, help="how many mutants of each Python file")
    parser.add_argument("--seed", type=int, default=0, help="which mutants")
    parser.add_argument(
        "--unchecked", action="store_true", help="do not run the tests with nothing broken first"
    )
    arguments = parser.parse_intermixed_args()
    to_try = breaks(arguments)
    survived = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Copy(Path(directory))
        if not arguments.unchecked:
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
        print(f"survived: {each.name}" + (f"\n    {each.key}" if each.key else ""))
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
