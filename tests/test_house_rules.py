"""The rules of this code base that a program can check.

import-linter checks which modules may import which: see pyproject.toml.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Problems = Iterator[tuple[int, str]]  # line, what is wrong there

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trio_uring"
TESTS = ROOT / "tests"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# The lines of the longest file and of the longest function (without its docstring). Nothing grows
# beyond them without a reason: split a file by its subjects, or record what it has now and say
# in the commit why it is still about one thing.
LONGEST_FILE = 552
LONGEST_FUNCTION = 50

# What the package may import when it runs: its dependencies, and what those who use an optional
# door have. setuptools would not tell that another package happens to be installed as well.
DEPENDENCIES = {"anyio", "attrs", "attr", "cffi", "greenlet", "outcome", "pytest", "trio"} | {
    *("matplotlib", "rich"),  # the extra `cli`
    *("opentelemetry", "prometheus_client"),  # the extras of the same names
}

OPERATION_FIELDS = ["Completes with:", "Fails with:", "If cancelled:", "Since:"]


# --- Sizes ----------------------------------------------------------------------------------


def long_functions(tree: ast.Module) -> Problems:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = lines_of(node) - (lines_of(node.body[0]) if ast.get_docstring(node) else 0)
            if lines > LONGEST_FUNCTION:
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
    """Names that only a few files may use, so that their uses are easy to find and to change."""

    what: str
    uses: Callable[[ast.AST], bool]
    only_in: tuple[str, ...]  # files, or packages


RING = (
    "_engine/_ring.py",
    "_engine/_ring_setup.py",
    "_engine/_buffer_pool.py",
    "_engine/_file_calls.py",
)
BORDERS = [
    # _operations/_files.py asks whether a file is one that can block indefinitely.
    Border("the C functions", identifiers("lib"), (*RING, "_operations/_files.py")),
    Border("cffi", identifiers("ffi", "CData"), (*RING, "_operations")),
    # _run.py asks the kernel for the few that every run needs, the doctor for those that help.
    Border("an opcode", chosen_opcode, ("_operations", "_run.py", "_doctor.py")),
    Border("SQE flags", identifiers("SqeFlag"), ("_operations",)),
    Border(
        "set-up, enter and CQE flags",
        identifiers("SetupFlag", "EnterFlag", "CqeFlag", "SqFlag", "CqFlag"),
        (*RING, "_engine/_in_flight.py"),
    ),
    # The ring passes it on; operations on other operations name the one they mean.
    Border(
        "user_data",
        identifiers("user_data"),
        ("_engine", "_operations"),
    ),
    Border("-errno", negative_errno, ("_errors.py", "_engine")),
    Border("Trio's private side", private_of_trio, ("_trio_private.py", "_trio_step.py")),
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
    """Only _errors.py makes exceptions from a negative errno. Other files only compare it."""
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


# --- Declarations without a user ------------------------------------------------------------

WORD = re.compile(r"[A-Za-z_]\w*")

# Modules whose imports are what the package offers: to be re-exported there is to be used.
PUBLIC = {"trio_uring/__init__.py", "trio_uring/lowlevel.py", "trio_uring/_operations/__init__.py"}

# It compares each class of uapi.py with the kernel's headers. What nobody else names is unused.
MIRROR_TEST = "tests/unit/test_uapi.py"


@dataclass(frozen=True)
class Declaration:
    name: str
    file: str
    first: int  # its lines
    last: int


class Names:
    """All declarations, and the files in which each word occurs, as paths relative to ROOT."""

    def __init__(self) -> None:
        self.declared: list[Declaration] = []
        self._used: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)

    def add_python(self, text: str, file: str) -> None:
        tree = ast.parse(text)
        if file.startswith(("trio_uring/", "tests/")) and not is_test(file):
            self.declared += python_declarations(tree.body, file)
        if file != MIRROR_TEST:
            for word, line in python_uses(tree, file):
                self._used[word].append((file, line))

    def add_c(self, text: str, file: str) -> None:
        text = re.sub(r"/\*.*?\*/", blank, text, flags=re.DOTALL)
        text = re.sub(C_PROTOTYPE, blank, text)
        if file.startswith("trio_uring/"):
            self.declared += c_declarations(text, file)
        for number, line in enumerate(text.splitlines(), 1):
            words = WORD.findall(line)
            # An assertion on the layout of a structure is no use of it.
            if line.startswith("URING_ASSERT"):
                words = words[:1]
            for word in words:
                self._used[word].append((file, number))

    def add_page(self, text: str, file: str) -> None:
        for code in re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL):
            for word in WORD.findall(code):
                self._used[word].append((file, 0))

    def unused(self) -> Iterator[Declaration]:
        """Yield the declarations whose names occur only in their own lines."""
        for each in self.declared:
            own = range(each.first, each.last + 1)
            uses = self._used[each.name]
            if all(file == each.file and line in own for file, line in uses):
                yield each


def is_test(file: str) -> bool:
    """Return whether pytest or a type checker reads *file*, rather than other tests import it."""
    return Path(file).name.startswith("test_") or file.startswith("tests/typing/")


def python_declarations(body: list[ast.stmt], file: str) -> Iterator[Declaration]:
    """Yield the functions, classes, methods and names of a module."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                names = [node.name]
            case ast.ClassDef():
                names = [node.name]
                yield from python_declarations([each for each in node.body if has_body(each)], file)
            case ast.Assign(targets=targets):
                names = [each.id for target in targets for each in names_in(target)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case ast.If():
                names = []
                yield from python_declarations([*node.body, *node.orelse], file)
            case _:
                names = []
        for name in names:
            # pytest and Python find these by their names.
            if not name.startswith(("pytest", "__")):
                assert node.end_lineno is not None
                yield Declaration(name, file, node.lineno, node.end_lineno)


def has_body(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def names_in(node: ast.AST) -> list[ast.Name]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Name)]


def python_uses(tree: ast.Module, file: str) -> Iterator[tuple[str, int]]:
    ignored = docstrings(tree) | exported(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                for alias in aliases:
                    if alias.asname != alias.name or file in PUBLIC:
                        yield alias.name.rpartition(".")[2], node.lineno
            case ast.Constant(value=str(text)) if id(node) not in ignored:
                # A type, a name for getattr, C for cffi, a program for a child.
                for word in WORD.findall(text):
                    yield word, node.lineno


def exported(tree: ast.Module) -> set[int]:
    """Return the ids of the nodes in `__all__`."""
    return {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for each in ast.walk(node)
    }


C_FUNCTION_HEAD = r"^[a-z][\w *]*?\b(\w+)\([^;{}]*\)"
C_PROTOTYPE = re.compile(C_FUNCTION_HEAD + r";", re.MULTILINE)
C_BODY = r"\s*\{(?:[^\n]*\}|[\s\S]*?^\})"
C_DECLARATIONS = [
    re.compile(C_FUNCTION_HEAD + C_BODY, re.MULTILINE),
    re.compile(r"^(?:struct|union) (\w+)" + C_BODY, re.MULTILINE),
    re.compile(r"^#define (\w+)(?:.*\\\n)*.*", re.MULTILINE),
]
C_ENUM = re.compile(r"^enum\b[^{;]*\{([^}]*)\}", re.MULTILINE)
C_ENUM_MEMBER = re.compile(r"^\s*(\w+)", re.MULTILINE)


def c_declarations(text: str, file: str) -> Iterator[Declaration]:
    """Yield functions with their bodies, structures, macros and constants."""
    found = [match for pattern in C_DECLARATIONS for match in pattern.finditer(text)]
    for enum in C_ENUM.finditer(text):
        found += C_ENUM_MEMBER.finditer(text, enum.start(1), enum.end(1))
    for match in found:
        first = text.count("\n", 0, match.start(1)) + 1
        yield Declaration(match[1], file, first, text.count("\n", 0, match.end()) + 1)


def blank(match: re.Match[str]) -> str:
    """Return an empty text with the same number of lines."""
    return "\n" * match[0].count("\n")


# --- References to files --------------------------------------------------------------------

FILE_NAME = re.compile(r"(?<![\w./:<>-])(?:\.{0,2}/)*\w[\w./-]*\.(?:py|c|h|md|pml)\b(?!\.?\w)")

# Not in this repository: the kernel's files, the C library's, and names in examples.
FOREIGN_FILES = {
    *("asm-generic/mman.h", "include/uapi/linux/io_uring.h", "io_uring.h", "linux/bpf_common.h"),
    *(
        "linux/fcntl.h",
        "linux/fuse.h",
        "linux/in.h",
        "linux/limits.h",
        "linux/openat2.h",
        "linux/prctl.h",
    ),
    *("linux/seccomp.h", "linux/stat.h", "io_uring/poll.c", "io_uring/rw.c", "io_uring/sqpoll.c"),
    *("rsrc.c", "fcntl.h", "Python.h", "site.py", "program.py"),
}


# Methods of asyncio's protocols, which our benchmarks implement, of Trio's instruments, and of
# prometheus_client's collectors.
CALLED_BY_OTHERS = {
    *("connection_made", "datagram_received"),
    *("task_scheduled", "before_task_step", "after_run"),
    "describe",
}


def prose(text: str, suffix: str) -> Problems:
    """Yield the prose of a file: its comments and docstrings, or a whole page."""
    if suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                yield from enumerate(str(node.value.value).splitlines(), node.lineno)
    elif suffix in {".c", ".h", ".txt"}:
        for comment in re.finditer(r"/\*.*?\*/", text, re.DOTALL):
            first = text.count("\n", 0, comment.start()) + 1
            yield from enumerate(comment[0].splitlines(), first)
    else:
        yield from enumerate(text.splitlines(), 1)


def stale_references(text: str, suffix: str, files: list[str]) -> Problems:
    """Yield references to files that are not in *files*. They may omit the first directories."""
    known = "\n".join(["", *(f"/{file}" for file in files), ""])
    for line, words in prose(text, suffix):
        for name in FILE_NAME.findall(words):
            path = re.sub(r"^(\.\.?/)+", "", name)
            if path not in FOREIGN_FILES and f"/{path}\n" not in known:
                yield line, f"there is no {name}"


def project_files() -> list[Path]:
    directories = [ROOT / name for name in ("trio_uring", "tests", "docs", "examples")]
    found = [path for directory in directories for path in directory.rglob("*")]
    return sorted(path for path in [*found, *ROOT.iterdir()] if path.is_file())


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
def test_no_file_outgrows_the_longest(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


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


def test_every_declaration_has_a_user() -> None:
    names = Names()
    for path in project_files():
        file = path.relative_to(ROOT).as_posix()
        match path.suffix:
            case ".py":
                names.add_python(path.read_text(encoding="utf-8"), file)
            case ".c" | ".h":
                names.add_c(path.read_text(encoding="utf-8"), file)
            case ".md":
                names.add_page(path.read_text(encoding="utf-8"), file)
    assert len(names.declared) > 1000
    unused = [
        f"{each.file}:{each.first}: {each.name}"
        for each in names.unused()
        if each.name not in CALLED_BY_OTHERS
    ]
    assert not unused, "\n".join(["without a user:", *unused])


def test_every_file_that_is_referred_to_exists() -> None:
    paths = project_files()
    files = [path.relative_to(ROOT).as_posix() for path in paths]
    problems = [
        f"{path}:{line}: {what}"
        for path in paths
        if path.suffix in {".py", ".pyi", ".c", ".h", ".txt", ".md", ".pml"}
        for line, what in stale_references(path.read_text(encoding="utf-8"), path.suffix, files)
    ]
    assert not problems, "\n".join(problems)


# --- The rules can be broken ----------------------------------------------------------------


@pytest.mark.parametrize(("lines", "is_long"), [(0, False), (1, True)])
@pytest.mark.parametrize("docstring", [[], ['    """First."""'], ['    """First.', '    """']])
def test_long_functions(lines: int, docstring: list[str], *, is_long: bool) -> None:
    body = ["    pass"] * (LONGEST_FUNCTION - 1 + lines)
    code = "\n".join(["def f():", *docstring, *body])
    assert any(long_functions(ast.parse(code))) == is_long


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
        ("from ._kernel import lib", "_engine/_in_flight.py"),
        ("from ._kernel import lib", "_operations/_network.py"),
        ("_kernel.lib.ring_open()", "_run.py"),
        ("from ._kernel import ffi as f", "_streams/_socket.py"),
        ("x: CData", "_streams/_socket.py"),
        ("Opcode.RECV", "_streams/_socket.py"),
        ("uapi.Opcode.RECV", "_engine/_in_flight.py"),
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


@pytest.mark.parametrize(
    ("python", "unused"),
    [
        ("x = 1", ["x"]),
        ("x: int = 1", ["x"]),
        ("x, y = 1, 2\nprint(x)", ["y"]),
        ("if 1:\n  x = 1\nelse:\n  y = 1", ["x", "y"]),
        ("x = 1  # x", ["x"]),
        ("x = 1\n__all__ = ['x']", ["x"]),
        ("def f(): f()", ["f"]),
        ("def f():\n  'f'", ["f"]),
        ("def f(): pass\n'Says what f is.'", ["f"]),
        ("def f(): pass\nx.f()", []),
        ("def f(): pass\ngetattr(x, 'f')", []),
        ("async def f(): pass", ["f"]),
        ("class C:\n  y = 1\n  def f(self): return C", ["f", "C"]),
        ("class C: pass\nclass D(C): pass", ["D"]),
        ("class C:\n  def __len__(self): return 0\nC()", []),
        ("def pytest_configure(): pass", []),
        ("def f(): pass\nfrom a import f", []),
        ("def f(): pass\nfrom a import f as f", ["f"]),
    ],
)
def test_declarations_in_python_without_a_user(python: str, unused: list[str]) -> None:
    names = Names()
    names.add_python(python, "trio_uring/_a.py")
    assert [each.name for each in names.unused()] == unused


@pytest.mark.parametrize(
    ("c", "unused"),
    [
        ("#define A 1", ["A"]),
        ("#define A(x) \\\n  A(x)", ["A"]),
        ("#define A 1\n#define B A", ["B"]),
        ("#define A 1 /* A */", ["A"]),
        ("enum {\n  A,\n  B = 1, /* A */\n};\nint x = B;", ["A"]),
        ("struct s { int a; };", ["s"]),
        ("struct s {\n  int a;\n};\nURING_ASSERT_SIZE(s, 4);", ["s"]),
        ("struct s { int a; };\nstruct t {\n  struct s s;\n};", ["t"]),
        ("static int f(void);\nstatic int f(void) { return 1; }", ["f"]),
        ("int f(int a,\n      int b)\n{\n  return f(a, b);\n}", ["f"]),
        ("struct s *f(void)\n{\n}\nint g(void) { return !f(); }", ["g"]),
    ],
)
def test_declarations_in_c_without_a_user(c: str, unused: list[str]) -> None:
    names = Names()
    names.add_c(c, "trio_uring/_kernel/a.h")
    assert [each.name for each in names.unused()] == unused


def test_who_is_a_user() -> None:
    for add, text, file, is_user in [
        (Names.add_python, "lib.f()", "trio_uring/_b.py", True),
        (Names.add_python, "import a.f", "tests/unit/test_b.py", True),
        (Names.add_python, "from ._a import f as f", "trio_uring/_b/__init__.py", False),
        (Names.add_python, "from ._a import f as f", "trio_uring/__init__.py", True),
        (Names.add_python, "lib.f()", MIRROR_TEST, False),
        (Names.add_c, "int x = f();", "tests/kernel/b.c", True),
        (Names.add_c, "int f(void);", "trio_uring/_kernel/b.h", False),
        (Names.add_page, "Call `a.f()`.", "docs/b.md", True),
        (Names.add_page, "```\nf\n```", "docs/b.md", True),
        (Names.add_page, "The letter f.", "docs/b.md", False),
    ]:
        names = Names()
        names.add_c("int f(void) { return 1; }", "trio_uring/_kernel/a.c")
        add(names, text, file)
        assert any(each.name == "f" for each in names.unused()) != is_user, (text, file)


def test_helpers_of_tests_need_a_user_and_tests_need_none() -> None:
    names = Names()
    names.add_python("def helper(): pass", "tests/helpers.py")
    names.add_python("def test_it(): pass", "tests/unit/test_it.py")
    names.add_python("def on_files(): pass", "tests/typing/public_api.py")
    assert [each.name for each in names.unused()] == ["helper"]


@pytest.mark.parametrize(
    ("text", "suffix", "is_stale"),
    [
        ("# see b.py", ".py", True),
        ("# see a.py", ".py", False),
        ("# see _x/a.py, a.py.", ".py", False),
        ("# see _y/a.py", ".py", True),
        ("x = 'b.py'", ".py", False),
        ("def f():\n    'See b.py.'", ".py", True),
        ("/* see\n * b.c */", ".c", True),
        ('#include "b.h"', ".c", False),
        ("[see](../howto/b.md)", ".md", True),
        ("[see](../howto/a.md#top)", ".md", False),
        ("[see](https://example.org/b.md)", ".md", False),
        ("as io_uring/poll.c says", ".md", False),
        ("`python program.py`", ".md", False),
        ("`_x.a.close()`", ".md", False),
    ],
)
def test_stale_references(text: str, suffix: str, *, is_stale: bool) -> None:
    files = ["trio_uring/_x/a.py", "docs/howto/a.md"]
    assert any(stale_references(text, suffix, files)) == is_stale
