"""The breaks of mutation/ are of code that exists, and so are the tests that must see them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
BREAKS = TESTS / "mutation" / "c_breaks.toml"
MUTATE = TESTS / "mutation" / "mutate.py"


def test_each_break_of_c_has_its_place() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    rows = tomllib.loads(BREAKS.read_text())["break"]
    kernel = ROOT / "trio_uring" / "_kernel"
    lost = [
        row["name"] for row in rows if (kernel / row["file"]).read_text().count(row["find"]) != 1
    ]
    assert not lost
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("file", [BREAKS, MUTATE], ids=lambda file: file.name)
def test_the_tests_that_must_notice_exist(file: Path) -> None:
    named = set(re.findall(r'"((?:kernel|unit|fuzz|conformance)/\w+\.py)"', file.read_text()))
    assert named
    assert not [name for name in sorted(named) if not (TESTS / name).exists()]
