"""Runs AnyIO's own test suite on plain Trio and on the ring, and compares it test by test.

    python anyio_suite.py plain   SOURCE PLAIN.json     what AnyIO on Trio does on this machine
    python anyio_suite.py unused  SOURCE PLAIN.json     trio_uring is installed: nothing changes
    python anyio_suite.py answers SOURCE PLAIN.json     the ring answers to the name "trio"
    python anyio_suite.py by-name SOURCE PLAIN.json     backend="trio_uring"

*SOURCE* is AnyIO's unpacked sdist, of the version that is installed; no test in it is edited.
`plain` is run before trio_uring is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from suite_runner import (
    Run,
    differences,
    function_of,
    report,
    ring_problems,
    run_suite,
)

CONFORMANCE = Path(__file__).parent

# What fails for a name other than "trio", whatever stands behind it: AnyIO compares the name
# with sniffio's, which must stay "trio".
COMPARES_NAMES = frozenset(
    (
        "test_sniffio",
        "test_call_async_corofunc",
        "test_single_thread",
        "test_single_thread_overlapping",
        "test_multiple_threads",
        "test_retry_after_failed_enter",
    )
)
# Waits for ever for any name but "trio".
HANGS_BY_NAME = "tests/test_from_thread.py::TestBlockingPortal::test_from_async"

# AnyIO 4.10's suite has 664 tests of Trio, 4.16's has 1117.
PASSED_MIN = 640

# One test gives a whole pytest in a subprocess 3 seconds; others count on threads that start
# without delay. On a busy machine they fail now and then, on plain Trio, too.
TRIES = 3

# What AnyIO's sockets, pipes and files must have completed.
OPCODES = [
    *("RECV", "SEND", "SENDMSG", "CONNECT", "READ", "WRITE"),
    *("OPENAT", "MKDIRAT", "UNLINKAT"),
]


def main() -> int:
    """Run the suite in one way, and compare with plain Trio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("way", choices=["plain", "unused", "answers", "by-name"])
    parser.add_argument("source", type=Path)
    parser.add_argument("plain", type=Path, help="where plain Trio's outcomes are kept")
    parser.add_argument("pytest_arguments", nargs="*")
    options = parser.parse_args()
    has_ours = importlib.util.find_spec("trio_uring") is not None
    assert has_ours == (options.way != "plain"), "trio_uring is installed at the wrong time"
    resolve_localhost()

    run = _run(options.way, options.source, options.pytest_arguments)
    if options.way == "plain":
        options.plain.write_text(json.dumps(asdict(run)), encoding="utf-8")
        return 0 if run.tests("passed") else 1
    plain = replace(Run(**json.loads(options.plain.read_text(encoding="utf-8"))), summary=None)
    for _ in range(TRIES - 1):
        if worse := _worse(options.way, plain, run):
            run = _try_again(options.way, options.source, run, worse)
    problems = []
    if options.way != "unused":
        problems += ring_problems(run.summary, OPCODES)
    if len(run.tests("passed")) < PASSED_MIN:
        problems.append(f"only {len(run.tests('passed'))} passed, not {PASSED_MIN}")
    if options.pytest_arguments:  # a part of the suite
        problems.clear()
    if options.way == "by-name":
        plain, run = _comparable(plain, run)
    problems += differences(plain, run, deselected=_excused(options.way))
    return report(plain, run, problems)


def _run(way: str, source: Path, extra: list[str], only: str = "") -> Run:
    versions = f"AnyIO {importlib.metadata.version('anyio')} on Python {sys.version.split()[0]}"
    tests = "trio_uring" if way == "by-name" else "trio"
    arguments = ["-k", f"{tests} and ({only})" if only else tests, *extra]
    environment = {"TRIO_URING": ""}
    if way == "by-name":
        arguments += ["--deselect", HANGS_BY_NAME]
    if way in {"answers", "by-name"}:
        arguments += ["-p", "anyio_gate"]
        environment.update(ANYIO_GATE=way, PYTHONPATH=str(CONFORMANCE))
    return run_suite(f"{versions}, {way}", arguments, cwd=source, environment=environment)


# --- Comparing ------------------------------------------------------------------------------


def _excused(way: str) -> frozenset[str]:
    return COMPARES_NAMES if way == "by-name" else frozenset()


def _comparable(plain: Run, run: Run) -> tuple[Run, Run]:
    """Give the tests of "trio_uring" the names of those of "trio". Leave out those without one.

    A test that names its backends itself has only "trio".
    """
    outcomes: dict[str, str] = {}
    for test, outcome in run.outcomes.items():
        name = test.replace("trio_uring", "trio")
        # One test of plain Trio, as trio-trio, may be several of ours: the worst counts.
        if outcomes.get(name) != "failed":
            outcomes[name] = outcome
    twins = {test: outcome for test, outcome in plain.outcomes.items() if test in outcomes}
    print(f"\n{run}\n  {len(plain.outcomes) - len(twins)} tests of {plain.name} have no twin")
    return replace(plain, outcomes=twins), replace(run, outcomes=outcomes)


def _worse(way: str, plain: Run, run: Run) -> set[str]:
    """Return the functions that failed but passed on plain Trio."""
    twins = {test.replace("trio_uring", "trio") for test in run.tests("failed")}
    functions = {function_of(test) for test in plain.tests("passed") & twins}
    return functions - _excused(way)


def _try_again(way: str, source: Path, run: Run, functions: set[str]) -> Run:
    """Run some tests once more, alone."""
    again = _run(way, source, [], " or ".join(sorted(functions)))
    for test in sorted(run.tests("failed") & again.tests("passed")):
        print(f"  failed, and passed alone: {test}")
    return replace(run, outcomes={**run.outcomes, **again.outcomes})


# --- What the suite needs of the machine ----------------------------------------------------


def resolve_localhost() -> None:
    """Make ``::1`` localhost, which about 130 tests rely on and some machines lack.

    This is done in a new mount namespace, so that the machine's file doesn't change.
    """
    hosts = Path("/etc/hosts")
    entries = [line.partition("#")[0].split() for line in hosts.read_text().splitlines()]
    if any(entry and entry[0] == "::1" and "localhost" in entry for entry in entries):
        return
    if os.environ.get("ANYIO_SUITE_HOSTS"):
        sys.exit("/etc/hosts does not say that ::1 is localhost, though it was replaced")
    with tempfile.NamedTemporaryFile("w", prefix="hosts-", delete=False) as fixed:
        fixed.write(f"{hosts.read_text()}\n::1 localhost\n")
    Path(fixed.name).chmod(0o644)
    mount = ["sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', fixed.name]
    for unshare in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        if subprocess.run([*unshare, *mount, "true"], capture_output=True, check=False).returncode:
            continue
        os.environ["ANYIO_SUITE_HOSTS"] = fixed.name
        os.execvp(unshare[0], [*unshare, *mount, sys.executable, *sys.argv])
    print(
        "/etc/hosts does not say that ::1 is localhost, and no mount namespace is permitted in "
        "which it would: about 130 tests fail for that, in every way."
    )


if __name__ == "__main__":
    sys.exit(main())
