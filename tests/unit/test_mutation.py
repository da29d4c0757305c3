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
EQUIVALENT = TESTS / "mutation" / "equivalent.toml"


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


def test_each_mutant_that_makes_no_difference_has_its_place() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    keys = tomllib.loads(EQUIVALENT.read_text())
    lost = []
    for key in keys:
        file = key.partition(": ")[0]
        lines = (PACKAGE / file).read_text().splitlines()
        if not any(key.startswith(f"{file}: {line.strip()}: ") for line in lines if line.strip()):
            lost.append(key)
    assert not lost


@pytest.mark.parametrize("file", [BREAKS, PROMISES], ids=lambda file: file.name)
def test_the_tests_that_must_notice_exist(file: Path) -> None:
    named = set(re.findall(r'"((?:kernel|unit|fuzz|conformance)/\w+\.py)"', file.read_text()))
    assert named
    assert not [name for name in sorted(named) if not (TESTS / name).exists()]
