"""Trio's own tests of files and paths on the ring. Only calls without a route use threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

# For these there is no operation, or they are not about one of our files: see the route table.
ON_THREADS: Final = {
    *("Path.absolute", "Path.cwd", "Path.expanduser", "Path.glob", "Path.home", "Path.iterdir"),
    *("Path.resolve", "Path.rglob", "Path.samefile", "Path.touch"),
}
FOREIGN: Final = ("<Mock ", "foreign file's ")

SECONDS: Final = 300


def test_what_has_a_route_goes_to_no_thread(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    here = Path(__file__).parent
    paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "trio._tests.pytest_plugin", "-p", "thread_gate"),
            *("--pyargs", "trio._tests.test_file_io", "trio._tests.test_path"),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "THREAD_GATE": str(report),
            "PYTHONPATH": os.pathsep.join(paths),
            "TRIO_URING": "",
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    hops = Counter(found["hops"])
    print(f"\n{hops.total()} thread hops:", *(f"\n  {name}" for name in sorted(hops)))
    assert not {name for name in hops if name not in ON_THREADS and not name.startswith(FOREIGN)}
    assert found["all hops"] == hops.total() == found["routes"]["thread"]
    # Opening, making directories and the like, and reading lines.
    assert found["routes"]["ring"] + found["routes"]["inline"] >= 20
    assert found["completed"]["OPENAT"] >= 5
    assert found["completed"]["MKDIRAT"] >= 1
