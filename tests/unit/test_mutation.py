"""The breaks of mutation/ are of code that exists, and so are the tests that must see them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PACKAGE = ROOT / "trio_uring"
BREAKS = TESTS / "mutation" / "c_breaks.toml"
PROMISES = TESTS / "mutation" / "promises.toml"
MUTATE = TESTS / "mutation" / "mutate.py"


@pytest.mark.parametrize(
    ("file", "folder"),
    [(BREAKS, PACKAGE / "_kernel"), (PROMISES, PACKAGE)],
    ids=["c_breaks.toml", "promises.toml"],
)
def test_each_break_has_its_place(file: Path, folder: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    rows = tomllib.loads(file.read_text())["break"]
    lost = [
        row["name"] for row in rows if (folder / row["file"]).read_text().count(row["find"]) != 1
    ]
    assert not lost
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("file", [BREAKS, PROMISES, MUTATE], ids=lambda file: file.name)
def test_the_tests_that_must_notice_exist(file: Path) -> None:
    named = set(re.findall(r'"((?:kernel|unit|fuzz|conformance)/\w+\.py)"', file.read_text()))
    assert named
    assert not [name for name in sorted(named) if not (TESTS / name).exists()]
