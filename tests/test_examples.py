"""Every example runs, and every Python block of the README, on the installed package."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from children import CHILD_SECONDS, clean_environment

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

LINES_MAX = 60

# The guides about files: their code, which is shown without its imports and without a peer.
GUIDES = ("files", "direct-io", "send-files", "receive-files")
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
import os, shutil, zlib
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


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.partition("\n")[0])
def test_readme(block: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block, encoding="utf-8")
    run(program, cwd=tmp_path)


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
