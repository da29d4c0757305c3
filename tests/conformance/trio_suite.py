"""Runs Trio's own test suite on plain Trio and on the ring, and compares it test by test.

    python trio_suite.py plain  PLAIN.json        what Trio does on this machine
    python trio_suite.py unused PLAIN.json        trio_uring is installed: nothing changes
    python trio_suite.py ring   PLAIN.json        every run has a ring

`plain` is run before trio_uring is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from suite_runner import Run, differences, report, ring_problems, run_suite

# What cannot pass on the ring, with its reason. All else that plain Trio passes, must.
DESELECTED = {
    "test_io_manager_statistics": (
        "accepts only the backends epoll, windows and kqueue; ours is named io_uring"
    ),
    "test_SocketType_connect_paths": (
        "replaces the socket inside Trio's by a Python class with a connect() of its own, which a"
        " ring that connects by file descriptor never calls"
    ),
    "test_close_at_bad_time_for_receive_some": (
        "injects the close through TheIOManager.wait_readable, which a pipe that completes on the"
        " ring never calls"
    ),
    "test_close_at_bad_time_for_send_all": (
        "injects the close through TheIOManager.wait_writable, which a pipe that completes on the"
        " ring never calls"
    ),
}

# The settings of Trio's own pyproject.toml, which is not part of what is installed, and of its
# CI. The one test left out runs pyright over an installation with every optional package.
ARGUMENTS = [
    *("--pyargs", "trio", "-p", "trio._tests.pytest_plugin", "--run-slow"),
    *("-W", "error", "-W", "ignore:ast.Num is deprecated:DeprecationWarning:astor"),
    *("-o", "xfail_strict=true", "-o", "faulthandler_timeout=60"),
    *("-o", "markers=redistributors_should_skip: needs Trio's own checkout"),
]
LEFT_OUT = ["pyright_verifytypes"]

# The packages that Trio's tests of its exports and documentation need; all or none.
OPTIONAL = ["astor", "jedi", "pylint", "mypy", "yaml"]

# With them all, plain Trio 0.35 passes 869 on Python 3.11. So few may be missing.
PASSED_MIN = 860

# What Trio's sockets, pipes, files' descriptors and foreign waits must have completed.
OPCODES = ["RECV", "SEND", "CONNECT", "READ", "POLL_ADD"]


def main() -> int:
    """Run the suite in one way, and compare with plain Trio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("way", choices=["plain", "unused", "ring"])
    parser.add_argument("plain", type=Path, help="where plain Trio's outcomes are kept")
    parser.add_argument("pytest_arguments", nargs="*")
    options = parser.parse_args()
    trio = f"Trio {importlib.metadata.version('trio')} on Python {sys.version.split()[0]}"
    has_ours = importlib.util.find_spec("trio_uring") is not None
    assert has_ours == (options.way != "plain"), "trio_uring is installed at the wrong time"

    run = _run(options.way, f"{trio}, {options.way}", options.pytest_arguments)
    if options.way == "plain":
        options.plain.write_text(json.dumps(asdict(run)), encoding="utf-8")
        return 0 if run.tests("passed") else 1
    plain = _load(options.plain)
    deselected = frozenset(DESELECTED) if options.way == "ring" else frozenset[str]()
    problems = differences(plain, run, deselected=deselected)
    if options.way == "ring":
        problems += ring_problems(run.summary, OPCODES)
    if options.way == "ring" and not _missing() and not options.pytest_arguments:
        problems += _count_problems(run)
    return report(plain, run, problems)


def _run(way: str, name: str, extra: list[str]) -> Run:
    left_out = [*LEFT_OUT, *(DESELECTED if way == "ring" else ())]
    arguments = [*ARGUMENTS, "-k", " and ".join(f"not {test}" for test in left_out), *extra]
    if _missing():
        arguments.append("--skip-optional-imports")
    if way == "ring":
        arguments.append("--trio-uring")
    return run_suite(name, arguments, environment={"TRIO_URING": ""})


def _missing() -> list[str]:
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def _load(path: Path) -> Run:
    values = json.loads(path.read_text(encoding="utf-8"))
    return replace(Run(**values), summary=None)


def _count_problems(run: Run) -> list[str]:
    passed = len(run.tests("passed"))
    return [f"only {passed} passed, not {PASSED_MIN}"] if passed < PASSED_MIN else []


if __name__ == "__main__":
    sys.exit(main())
