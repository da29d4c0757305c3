"""``trio-uring bench``: it measures, and prints and plots what it has measured."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
from children import run_command

if not os.environ.get("CI"):
    for package in ("rich", "matplotlib"):
        pytest.importorskip(package, reason="the extra `cli` is not installed")

from trio_uring.__main__ import _printing
from trio_uring._cli._bench import Row, Spread, compare
from trio_uring._cli._plot import draw

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

SHORT = ("--rounds", "1", "--seconds", "0.05")


def bench(*options: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_command("bench", *options, cwd=cwd, environment={"COLUMNS": "100", **variables})


def test_it_measures_each_loop_with_each_workload(tmp_path: Path) -> None:
    result = bench(*SHORT, "--json", "--plot", "plot.svg", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows: dict[str, list[dict[str, Any]]] = json.loads(result.stdout)
    assert result.stderr.splitlines()[-1] == "plotted to plot.svg"
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert list(rows) == ["echo", "files"]
    for each in rows.values():
        names = [row["name"] for row in each]
        assert names[-3:-1] == ["Trio", "asyncio"] or names[-2:] == ["Trio", "asyncio"]
        assert "trio_uring Python" in names
        assert ("uvloop" in names) == (find_spec("uvloop") is not None)
        for row in each:
            assert row["rate"]["median"] > 0
            assert row["cpu_us"]["median"] > 0


def test_the_table(tmp_path: Path) -> None:
    result = bench(*SHORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in ("echoes of 64 bytes on 64 connections", "reads of files of 4 KiB", "asyncio"):
        assert words in result.stdout
    assert result.stdout.count("one round, and ratios to Trio") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plot", "plot.txt"], "--plot plot.txt: the name must end with .svg, .png, .pdf"),
        (["--plot", "no/plot.svg"], "--plot no/plot.svg: there is no such directory"),
        (["--rounds", "0"], "argument --rounds"),
        (["--seconds", "0"], "argument --seconds"),
    ],
)
def test_wrong_options(tmp_path: Path, options: list[str], said: str) -> None:
    result = bench(*options, cwd=tmp_path)
    assert result.returncode != 0
    assert said in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_a_user_who_has_seen_enough_gets_no_traceback() -> None:
    def command(_options: Namespace) -> int:
        raise KeyboardInterrupt

    assert _printing(command, Namespace()) == 130


def test_ratios_are_of_samples_of_one_round() -> None:
    slow_minute = [{"rate": 100.0, "cpu_us": 10.0}, {"rate": 10.0, "cpu_us": 100.0}]
    twice_as_fast = [{"rate": 200.0, "cpu_us": 5.0}, {"rate": 20.0, "cpu_us": 50.0}]
    ours, trio = compare({"ours": twice_as_fast, "Trio": slow_minute})
    assert ours.rate_ratio == Spread(2.0, 2.0, 2.0)
    assert ours.cpu_ratio == Spread(0.5, 0.5, 0.5)
    assert ours.rate == Spread(110.0, 20.0, 200.0)
    assert trio.rate_ratio == Spread(1.0, 1.0, 1.0)


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_other_formats(tmp_path: Path, suffix: str, begin: bytes) -> None:
    spread = Spread(1.0, 0.5, 2.0)
    rows = {"echo": [Row("Trio", spread, spread, spread, spread)]}
    path = tmp_path / f"plot.{suffix}"
    draw(str(path), rows, "a machine")
    assert path.read_bytes().startswith(begin)
