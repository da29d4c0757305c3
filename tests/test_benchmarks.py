"""The workloads of the benchmarks beside other systems run: each once, with a few operations.

What they measure then means nothing, and nothing here looks at it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from children import CHILD_SECONDS, output_of, run_python

BENCHMARKS = Path(__file__).parent / "benchmarks"

# With a handful of connections or tasks, each of these is the same as another.
SOCKET_DOUBLES = {
    *("growth-1", "growth-10", "growth-100", "growth-1000", "growth-10000", "busy-10000"),
}
FILE_DOUBLES = {
    *("read-32", "read-128", "positional-32", "positional-128", "lines-32", "small-64", "bytes-64"),
    *("stat-32", "exists-32", "append-16", "cold-32", "mkdir-32", "write-32", "checkpoint-32"),
    "anyio-read-32",
}

# The test group has no Redis client, for one. A file system without O_DIRECT, a user who may not
# mount one, a machine without a compiler: all are in order.
REASONS = ("is not installed", "without O_DIRECT", "may not mount", "is not measured")


def benchmark(name: str, *arguments: str | Path) -> str:
    """Run the benchmark; return what it printed."""
    result = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_benchmark_finds_what_it_uses() -> None:
    names = ", ".join(path.stem for path in BENCHMARKS.glob("bench_*.py"))
    code = f"import sys; sys.path[:0] = sys.argv[1:]; import {names}"
    assert output_of(run_python(code, BENCHMARKS)) == []


@pytest.mark.parametrize(
    ("name", "doubles", "systems"),
    [
        ("bench_sockets", SOCKET_DOUBLES, {"trio", "python engine", "asyncio"}),
        ("bench_files", FILE_DOUBLES, {"trio", "python engine", "asyncio", "synchronous", "C"}),
    ],
)
def test_every_workload_runs(
    name: str, doubles: set[str], systems: set[str], tmp_path: Path
) -> None:
    workloads = {*benchmark(name, "--list").split()}
    assert workloads > doubles
    benchmark(
        name,
        *sorted(workloads - doubles),
        *("--smoke", "--systems", ",".join(sorted(systems))),
        *("--json", tmp_path / "found.json", "--markdown", tmp_path / "found.md"),
    )
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    for reason in found["left_out"].values():
        assert any(known in reason for known in REASONS), reason
    assert {*found["workloads"], *found["left_out"]} == workloads - doubles
    for workload in found["workloads"].values():
        # Not every system can do everything with files.
        assert {workload["baseline"], "python engine"} <= workload["samples"].keys() <= systems
        assert workload["title"] in (tmp_path / "found.md").read_text(encoding="utf-8")


def test_tails_of_every_system() -> None:
    output = benchmark("bench_tails", "--smoke")
    for what in ("echo p99.9", "timer p99.9", "CPU p99.9"):
        assert output.count(what) == 3


def test_the_table_of_the_page_on_scaling() -> None:
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        from _measure import Sample
        from bench_scaling import table_head, table_row
        one, two = [Sample(1000, 0), Sample(2000, 0)], [Sample(1900, 0), Sample(3000, 0)]
        print(table_head([1, 2]))
        print(table_row("serve_threads", "hashing", {"1": one, "2": two}))
    """
    assert output_of(run_python(code, BENCHMARKS)) == [
        "| Way | Work of a request | 1, answers/s | 2, ratio |",
        "|---|---|---:|---:|",
        "| threads, `serve_threads` | hashing | 1,500 | 1.70 (1.50–1.90) |",
    ]
