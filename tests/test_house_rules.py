"""The rules of this code base that a program can check.

The layers, who may import whom, are import-linter's: see pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Problems = Iterator[tuple[int, str]]  # line, what is wrong there

PACKAGE = Path(__file__).parent.parent / "trio_uring"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Larger ones tell more than one story.
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 50  # the docstring not counted
FUNCTION_LINES_MAX_WITH_DOCSTRING = 60

# What the package may import when it runs: its dependencies, and what those who use an optional
# door have. setuptools would not tell that another package happens to be installed as well.
DEPENDENCIES = {"anyio", "attrs", "attr", "cffi", "greenlet", "outcome", "pytest", "trio"}

OPERATION_FIELDS = ["Completes with:", "Fails with:", "If cancelled:", "Since:"]


# --- Sizes ----------------------------------------------------------------------------------


def long_functions(tree: ast.Module) -> Problems:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = lines_of(node)
            code = lines - (lines_of(node.body[0]) if ast.get_docstring(node) else 0)
            if code > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name}() has {code} lines of code"
            elif lines > FUNCTION_LINES_MAX_WITH_DOCSTRING:
                yield node.lineno, f"{node.name}() has {lines} lines"


def lines_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


# --- Imports --------------------------------------------------------------------------------


def imports_in_functions(tree: ast.Module) -> Problems:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield node.lineno, f"{function.name}() imports"


def undeclared_imports(tree: ast.Module) -> Problems:
    for_types_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    known = DEPENDENCIES | {"trio_uring"} | sys.stdlib_module_names
    for node in ast.walk(tree):
        if id(node) in for_types_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] not in known:
                yield node.lineno, f"{name} is no dependency"


# --- Who may name what ----------------------------------------------------------------------


def identifiers(*names: str) -> Callable[[ast.AST], bool]:
    """Return a test for nodes that use one of *names*, as a variable, attribute or import."""

    def uses(node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in names
        if isinstance(node, ast.Attribute):
            return node.attr in names
        if isinstance(node, ast.arg | ast.keyword):
            return node.arg in names
        return isinstance(node, ast.alias) and node.name.rpartition(".")[2] in names

    return uses


def chosen_opcode(node: ast.AST) -> bool:
    # `Opcode(number).name` only tells people what a number is.
    return (
        isinstance(node, ast.Attribute)
        and ast.unparse(node.value).endswith("Opcode")
        and (node.attr.isupper() and not ast.unparse(node.value).endswith("RegisterOpcode"))
    )


def negative_errno(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and ast.unparse(node.operand).startswith("errno.")
    )


PRIVATE_OF_TRIO = re.compile(r"trio(\.\w+)*\._(?!_)\w+")


def private_of_trio(node: ast.AST) -> bool:
    match node:
        case ast.Attribute():
            return PRIVATE_OF_TRIO.fullmatch(ast.unparse(node)) is not None
        case ast.Import():
            paths = [alias.name for alias in node.names]
        case ast.ImportFrom(level=0):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        case ast.Constant(value=str() as text):
            paths = [text]
        case _:
            return False
    return any(PRIVATE_OF_TRIO.match(path) for path in paths)


@dataclass(frozen=True)
class Border:
    """Something that is crossed in few places, and so is easy to find and to change."""

    what: str
    uses: Callable[[ast.AST], bool]
    only_in: tuple[str, ...]  # files, or packages


RING = ("_engine/_ring.py", "_engine/_buffer_pool.py")
BORDERS = [
    Border("the C functions", identifiers("lib"), RING),
    Border("cffi", identifiers("ffi", "CData"), (*RING, "_operations")),
    # _run.py asks the kernel for the few that every run needs, the doctor for those that help.
    Border("an opcode", chosen_opcode, ("_operations", "_run.py", "_doctor.py")),
    Border("SQE flags", identifiers("SqeFlag"), ("_operations",)),
    Border(
        "set-up, enter and CQE flags",
        identifiers("SetupFlag", "EnterFlag", "CqeFlag", "SqFlag", "CqFlag"),
        (*RING, "_engine/_io_manager.py"),
    ),
    # The ring passes it on; operations on other operations name the one they mean.
    Border(
        "user_data",
        identifiers("user_data"),
        ("_engine", "_operations"),
    ),
    Border("-errno", negative_errno, ("_errors.py", "_engine/_ring.py", "_engine/_io_manager.py")),
    Border("Trio's private side", private_of_trio, ("_trio_private.py",)),
]


def crossed_borders(tree: ast.Module, file: str) -> Problems:
    """Yield the names that *file*, a path in the package, must not use."""
    if file.startswith("_kernel/"):
        return
    texts = docstrings(tree)
    for border in BORDERS:
        if any(file == place or file.startswith(f"{place}/") for place in border.only_in):
            continue
        for node in ast.walk(tree):
            if id(node) not in texts and border.uses(node):
                line = getattr(node, "lineno", 0)
                yield line, f"{border.what} belongs to {', '.join(border.only_in)}"


def docstrings(tree: ast.Module) -> set[int]:
    """Return the ids of the nodes that are docstrings."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def errno_out_of_comparisons(tree: ast.Module) -> Problems:
    """Only _errors.py turns a negative errno into something; others compare."""
    compared = {
        id(node)
        for comparison in ast.walk(tree)
        if isinstance(comparison, ast.Compare)
        for node in ast.walk(comparison)
    }
    for node in ast.walk(tree):
        if negative_errno(node) and id(node) not in compared:
            yield node.lineno, f"{ast.unparse(node)} is more than compared"  # type: ignore[attr-defined]


# --- Operations -----------------------------------------------------------------------------


def operation_docstrings(tree: ast.Module) -> Problems:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.unparse(node.returns or ast.Constant(None)).startswith("Operation["):
            continue
        text = ast.get_docstring(node) or ""
        fields = re.findall(
            r"^(?:Completes with|Fails with|If cancelled|Since):", text, re.MULTILINE
        )
        if fields != OPERATION_FIELDS:
            yield node.lineno, f"{node.name}() has the fields {fields}"


# --- The package keeps them -----------------------------------------------------------------


def test_the_package_is_found() -> None:
    assert len(SOURCES) > 15


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix in {".py", ".pyi", ".c", ".h", ".txt"}
    ],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES_MAX


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rules(path: Path) -> None:
    file = path.relative_to(PACKAGE).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checks = [
        long_functions(tree),
        imports_in_functions(tree),
        crossed_borders(tree, file),
        errno_out_of_comparisons(tree) if file != "_errors.py" else iter(()),
        undeclared_imports(tree) if file != "_kernel/build.py" else iter(()),
        operation_docstrings(tree) if file.startswith("_operations") else iter(()),
    ]
    problems = sorted(problem for check in checks for problem in check)
    assert not problems, "\n".join(f"{path}:{line}: {what}" for line, what in problems)


# --- The rules can be broken ----------------------------------------------------------------


def long_function(code: int, docstring: int) -> str:
    text = ['    """First.', *["    more"] * (docstring - 2), '    """'] if docstring else []
    return "\n".join(["def f():", *text, *["    pass"] * (code - 1)])


@pytest.mark.parametrize(
    ("code", "docstring", "is_long"),
    [(50, 0, False), (51, 0, True), (50, 10, False), (50, 11, True), (51, 2, True)],
)
def test_long_functions(code: int, docstring: int, *, is_long: bool) -> None:
    assert any(long_functions(ast.parse(long_function(code, docstring)))) == is_long


@pytest.mark.parametrize("code", ["import os", "from os import path", "if 1:\n  import os"])
@pytest.mark.parametrize("function", ["def f():", "async def f():", "class C:\n def f(self):"])
def test_imports_in_functions(code: str, function: str) -> None:
    indented = "\n".join(f"   {line}" for line in code.splitlines())
    assert any(imports_in_functions(ast.parse(f"{function}\n{indented}")))
    assert not any(imports_in_functions(ast.parse(code)))


def test_undeclared_imports() -> None:
    assert any(undeclared_imports(ast.parse("import typing_extensions")))
    assert any(undeclared_imports(ast.parse("from numpy.core import x")))
    allowed = "import os, trio.abc\nfrom . import x\nif TYPE_CHECKING:\n  import typing_extensions"
    assert not any(undeclared_imports(ast.parse(allowed)))


@pytest.mark.parametrize(
    ("code", "file"),
    [
        ("from ._kernel import lib", "_engine/_io_manager.py"),
        ("from ._kernel import lib", "_operations/_files.py"),
        ("_kernel.lib.ring_open()", "_run.py"),
        ("from ._kernel import ffi as f", "_streams/_socket.py"),
        ("x: CData", "_streams/_socket.py"),
        ("Opcode.RECV", "_streams/_socket.py"),
        ("uapi.Opcode.RECV", "_engine/_io_manager.py"),
        ("SqeFlag.IO_LINK", "_engine/_ring.py"),
        ("SetupFlag.SQPOLL", "_run.py"),
        ("from ._kernel.uapi import CqeFlag", "_streams/_socket.py"),
        ("def f(user_data): pass", "_streams/_socket.py"),
        ("entry.user_data", "_run.py"),
        ("f(user_data=1)", "_streams/_fd_stream.py"),
        ("res == -errno.EINTR", "_streams/_socket.py"),
        ("import trio._core", "_run.py"),
        ("from trio._core import _run", "_run.py"),
        ("from trio import _socket", "_streams/_socket.py"),
        ("from trio.socket import _SocketType", "_streams/_socket.py"),
        ("trio._core._run.GLOBAL_RUN_CONTEXT", "lowlevel.py"),
        ("trio.socket._SocketType", "lowlevel.py"),
        ("importlib.import_module('trio._core')", "lowlevel.py"),
    ],
)
def test_crossed_borders(code: str, file: str) -> None:
    assert any(crossed_borders(ast.parse(code), file))


@pytest.mark.parametrize(
    ("code", "file"),
    [
        ("lib.ring_push(1)", "_engine/_ring.py"),
        ("ffi.from_buffer(b)", "_operations/_files.py"),
        ("Opcode(number).name", "_errors.py"),
        ("RegisterOpcode.PROBE", "_engine/_ring.py"),
        ("trio.lowlevel.checkpoint()", "_streams/_socket.py"),
        ("trio.__version__", "_run.py"),
        ("import trio._core", "_trio_private.py"),
        ("'Says how trio._core sees it.'", "_run.py"),
    ],
)
def test_kept_borders(code: str, file: str) -> None:
    assert not list(crossed_borders(ast.parse(code), file))


def test_errno_out_of_comparisons() -> None:
    assert any(errno_out_of_comparisons(ast.parse("raise OSError(-errno.EIO)")))
    assert not any(errno_out_of_comparisons(ast.parse("if res == -errno.EIO: pass")))


def test_operation_docstrings() -> None:
    complete = "\n".join(OPERATION_FIELDS)
    function = 'def nop() -> Operation[None]:\n """Nothing.\n\n{}\n"""'
    assert not any(operation_docstrings(ast.parse(function.format(complete))))
    for field in OPERATION_FIELDS:
        broken = complete.replace(field, "")
        assert any(operation_docstrings(ast.parse(function.format(broken))))
    assert any(operation_docstrings(ast.parse(function.format(""))))
