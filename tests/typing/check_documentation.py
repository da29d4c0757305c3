"""Check the types of the Python blocks of the README and the documentation with mypy.

`tests/test_examples.py` runs them. A block that is part of a program gets the imports that the page
leaves out. Names that stand for the reader's own objects have any type.

python tests/typing/check_documentation.py
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# What Trio and AnyIO might have one day is not there to be checked.
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs/upstream.md"})
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
IMPORTS = """\
import io, os, shutil, sys, zlib
from functools import partial
import anyio, trio, trio_uring
"""
OPTIONS = [
    *("--python-version", "3.10", "--platform", "linux", "--no-error-summary"),
    *("--check-untyped-defs", "--scripts-are-modules"),
    # The frameworks of some pages are not installed where this runs.
    *("--ignore-missing-imports", "--disable-error-code", "name-defined"),
]


def module(block: str) -> str:
    """Return a module with the code of *block*."""
    try:
        tree = ast.parse(block)
        compile(tree, "block", "exec")
    except SyntaxError:  # it awaits, as a part of an async function does
        return f"{IMPORTS}async def main():\n{textwrap.indent(block, '    ')}"
    imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
    return block if imports else IMPORTS + block


def main() -> int:
    """Return mypy's exit status. What it says names the page, and the number of the block."""
    with tempfile.TemporaryDirectory() as directory:
        for page in PAGES:
            for number, block in enumerate(BLOCK.findall(page.read_text("utf-8")), 1):
                place = re.sub(r"\W", "_", f"{page.relative_to(ROOT).with_suffix('')}")
                Path(directory, f"{place}_{number}.py").write_text(module(block), "utf-8")
        files = sorted(path.name for path in Path(directory).iterdir())
        print(f"{len(files)} blocks")
        command = [sys.executable, "-m", "mypy", *OPTIONS, *files]
        return subprocess.run(command, cwd=directory, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
