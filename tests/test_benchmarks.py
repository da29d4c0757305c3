"""The workloads of `bench_sockets.py` run: each once, with a handful of operations.

What it measures then means nothing, and nothing here looks at it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from children import CHILD_SECONDS

BENCHMARK = Path(__file__).parent / "benchmarks" / "bench_sockets.py"

SYSTEMS = {"trio", "python engine", "asyncio"}

# With a handful of connections, each of these is the same as another.
DOUBLES = {"growth-1", "growth-10", "growth-100", "growth-1000", "growth-10000", "busy-10000"}


def bench_sockets(*arguments: str | Path) -> str:
    """Run the benchmark; return what it printed."""
    result = subprocess.run(
        [sys.executable, BENCHMARK, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_workload_runs(tmp_path: Path) -> None:
    workloads = {*bench_sockets("--list").split()}
    assert workloads > DOUBLES
    bench_sockets(
        *sorted(workloads - DOUBLES),
        *("--smoke", "--systems", ",".join(sorted(SYSTEMS))),
        *("--json", tmp_path / "found.json", "--markdown", tmp_path / "found.md"),
    )
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    # The test group has no Redis client, for one.
    assert all(reason.endswith("is not installed") for reason in found["left_out"].values())
    assert {*found["workloads"], *found["left_out"]} == workloads - DOUBLES
    for workload in found["workloads"].values():
        assert workload["samples"].keys() == SYSTEMS
        assert workload["title"] in (tmp_path / "found.md").read_text(encoding="utf-8")
