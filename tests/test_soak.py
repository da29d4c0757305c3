"""Every workload of the soak runs on every kind of ring, and a loss is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from children import CHILD_SECONDS, run_python

from trio_uring._kernel import why_no_native

if TYPE_CHECKING:
    from collections.abc import Mapping

SOAK = Path(__file__).parent / "soak"

WORKLOADS = {
    *("tcp", "accepted in bulk", "tls", "passed fds", "udp", "pipes"),
    *("files", "transfers", "subprocesses", "anyio"),
}


def python(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a program of the soak; return what it printed."""
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("engine", ["native", "python"])
@pytest.mark.parametrize(
    "ring", ["default", "8 entries", "sqpoll", "one buffer", "one file operation", "anyio"]
)
def test_nothing_is_lost(engine: str, ring: str) -> None:
    if engine == "native" and why_no_native:
        pytest.skip(why_no_native)
    program = (SOAK / "_process.py", ring, "--rounds", "8")
    found = json.loads(python(*program, environment={"TRIO_URING_ENGINE": engine}))
    assert found["rounds"] == dict.fromkeys(WORKLOADS, 8)
    assert found["bytes"] > 0
    # Some of these end before the cancel comes; that all do would be a fault of the soak.
    assert {"receive", "recvmsg", "sendto", "recvfrom"} <= found["cancelled"].keys()


def test_the_table(tmp_path: Path) -> None:
    output = python(
        *(SOAK / "soak.py", "0.02", "--rings", "default", "--engines", "python"),
        *("--json", tmp_path / "found.json"),
    )
    assert "nothing lost" in output
    assert "python, default" in json.loads((tmp_path / "found.json").read_text())


LOSING_BYTES = """
    add = _load.Received.add
    _load.Received.add = lambda self, data: add(self, data[:-1] if len(data) > 100 else data)
"""
SWAPPING_BYTES = """
    add = _load.Received.add
    _load.Received.add = lambda self, data: add(self, data[1:] + data[:1])
"""
LOSING_FDS = """
    run = _process.run
    _process.run = lambda *args, **options: (os.dup(0), run(*args, **options))
"""


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LOSING_BYTES, "bytes arrived of"),
        (SWAPPING_BYTES, "are not those that were sent"),
        (LOSING_FDS, "appeared"),
    ],
)
def test_a_loss_is_noticed(loss: str, message: str) -> None:
    code = f"import os, sys\nsys.path.insert(0, {str(SOAK)!r})\nimport _load, _process\n"
    code += "\n".join(line.strip() for line in loss.splitlines())
    code += "\nsys.argv = ['soak', 'default', '--rounds', '8']\n_process.main()\n"
    result = run_python(code, options=())
    assert result.returncode != 0
    assert "LostError" in result.stderr
    assert message in result.stderr
