"""Every example runs, and so does every program of the documentation, on the installed package.

A Python block is a program if it imports what it needs and starts a run. The others are parts of
one, and are compiled.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest
from children import CHILD_SECONDS, clean_environment

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The guides about files: their code, which is shown without its imports and without a peer.
GUIDES = ("files", "direct-io", "send-files", "receive-files")
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.stem not in GUIDES)
PAGES = [ROOT / "README.md", *DOCS]
# A comment before a block says why it is not run.
BLOCK = re.compile(r"^(<!-- not run: .*? -->\n)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = re.compile(r"\b(trio_uring|trio|anyio)\.run\b")
BLOCKS = [
    pytest.param(match, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")), 1)
]

LINES_MAX = 65

GUIDE_BLOCKS = {
    f"{guide}-{number}": block
    for guide in GUIDES
    for number, block in enumerate(
        re.findall(
            r"^```python\n(.*?)^```",
            (ROOT / "docs" / "howto" / f"{guide}.md").read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        )
    )
}
GUIDE_IMPORTS = """
import os, shutil, sys, zlib
from functools import partial
import trio, trio_uring
"""
IN_GUIDE = """
async def main():
    stream, peer = map(trio.SocketStream, trio.socket.socketpair())
    content_length = 4096
    async with stream, peer:
        await peer.send_all(bytes(4096))
        await peer.send_eof()
        with open("data", "r+b") as file:
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run *command*, which must succeed, and return its output."""
    result = subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        cwd=cwd,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout


def test_examples_are_found() -> None:
    assert EXAMPLES
    assert BLOCKS


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < LINES_MAX


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example(example: Path, tmp_path: Path) -> None:
    """Each example has a demonstration that ends, and works with and without the launcher."""
    assert run("-m", "trio_uring", example, "--demo", cwd=tmp_path)
    assert run(example, "--demo", cwd=tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_help(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), "--help"])
    run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip() == ast.get_docstring(ast.parse(example.read_text()))


@pytest.mark.parametrize("match", BLOCKS)
def test_block(match: re.Match[str], tmp_path: Path) -> None:
    not_run, block = match.groups()
    tree = compile(block, "block", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    imported = {name.partition(".")[0] for node in tree.body for name in imported_by(node)}
    if not imported or not RUN.search(block) or not_run:
        return
    if missing := {name for name in imported if find_spec(name) is None}:
        pytest.skip(f"it needs {', '.join(missing)}: see `nox -s examples`")
    program = tmp_path / "program.py"
    program.write_text(block, encoding="utf-8")
    run(program, cwd=tmp_path)


def imported_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}"] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize("name", GUIDE_BLOCKS)
def test_guide(name: str, tmp_path: Path) -> None:
    block = GUIDE_BLOCKS[name]
    # As much as is read there; elsewhere as much as is sent without a receiver.
    (tmp_path / "data").write_bytes(bytes(4096 * (1000 if name.startswith("direct") else 1)))
    (tmp_path / "film.mkv").write_bytes(bytes(4096))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(bytes(4096))
    if "async def main()" not in block:
        block = block.removeprefix("import trio_uring\n")
        block = IN_GUIDE + textwrap.indent(block, " " * 12)
    if "trio_uring.run(" not in block:
        block += "trio_uring.run(main)\n"
    program = tmp_path / "program.py"
    program.write_text(GUIDE_IMPORTS + block, encoding="utf-8")
    run(program, cwd=tmp_path)


def test_what_the_readme_shows() -> None:
    """The README's first command runs in the checkout, whose package isn't compiled."""
    [command] = re.findall(r"^pip install \. && python (-m trio_uring .*)$", README, re.MULTILINE)
    shown = run("-B", *command.split(), cwd=ROOT)
    assert re.match(r"10 clients had 100 messages each echoed, on io_uring\.\n", shown)
