"""Runs other people's test suites, and compares two runs test by test."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

# Several times what the slowest suite takes: a suite that hangs must not hold up CI.
TIMEOUT_S = 1200

# The line that our pytest plugin prints at the end of a run.
SUMMARY = re.compile(
    r"trio_uring: (?P<ring>\d+) ring runs, (?P<fallback>\d+) fallback runs; "
    r"completions: (?P<completions>[^;]*); thread hops (?P<hops>\d+)"
    r"(?:; calls on files: (?P<routes>[^;\n]*))?"
    r"(?:; native runs (?P<native>\d+))?"
)


@dataclass(frozen=True)
class Summary:
    """What our pytest plugin counted during one run."""

    ring_runs: int
    fallback_runs: int
    completions: Counter[str]
    thread_hops: int
    routes: Counter[str] = field(default_factory=Counter)
    native_runs: int = 0

    @classmethod
    def parse(cls, output: str) -> Summary | None:
        """Find the summary in pytest's output; None if there is none."""
        match = SUMMARY.search(output)
        if match is None:
            return None
        return cls(
            ring_runs=int(match["ring"]),
            fallback_runs=int(match["fallback"]),
            completions=_counts(match["completions"]),
            thread_hops=int(match["hops"]),
            routes=_counts(match["routes"] or ""),
            native_runs=int(match["native"] or 0),
        )


def _counts(listed: str) -> Counter[str]:
    counts = (part.rsplit(" ", 1) for part in listed.split(", ") if " " in part)
    return Counter({name.strip(): int(count) for name, count in counts})


@dataclass(frozen=True)
class Run:
    """One finished run of a suite."""

    name: str
    outcomes: dict[str, str]  # test: "passed", "skipped", "xfailed" or "failed"
    exit_code: int
    summary: Summary | None

    def tests(self, outcome: str) -> set[str]:
        """Return the tests that ended in this way."""
        return {test for test, ended in self.outcomes.items() if ended == outcome}

    def __str__(self) -> str:
        counts = Counter(self.outcomes.values())
        return f"{self.name}: " + ", ".join(
            f"{counts[outcome]} {outcome}" for outcome in ("passed", "skipped", "xfailed", "failed")
        )


def run_suite(
    name: str, arguments: list[str], *, cwd: Path | None = None, environment: dict[str, str]
) -> Run:
    """Run pytest with *arguments*, print its output, and return how each test ended."""
    # A shell's background job starts with SIGINT ignored, and passes that on: tests of Ctrl-C
    # would then wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        command = [
            *(sys.executable, "-m", "pytest", *arguments),
            *("-p", "no:cacheprovider", "-o", "junit_family=xunit2", f"--junitxml={report}"),
        ]
        print(f"\n{name}:", *command[1:], flush=True)
        output, exit_code = _run(command, cwd or Path(directory), {**os.environ, **environment})
        outcomes = _outcomes(report) if report.exists() else {}
    return Run(name, outcomes, exit_code, Summary.parse(output))


def differences(plain: Run, other: Run, *, deselected: frozenset[str] = frozenset()) -> list[str]:
    """Return what is worse in *other* than in *plain*, as one sentence each."""
    problems: list[str] = []
    if plain.exit_code not in {0, 1}:
        problems.append(f"{plain.name}: pytest ended with {plain.exit_code}")
    if other.exit_code not in {0, 1}:
        problems.append(f"{other.name}: pytest ended with {other.exit_code}")
    excused = {test for test in plain.outcomes if function_of(test) in deselected}
    # What plain Trio does not pass here either is the machine's doing, not ours.
    # A test that may fail (xfail, not strict) is good for either outcome at any time.
    worse = plain.tests("passed") - other.tests("passed") - other.tests("xfailed") - excused
    problems += [f"{test}: {other.outcomes.get(test, 'did not run')}" for test in sorted(worse)]
    new = other.tests("failed") - plain.tests("failed") - plain.tests("passed")
    problems += [f"{test}: failed, and did not run on {plain.name}" for test in sorted(new)]
    if not plain.tests("passed"):
        problems.append(f"{plain.name}: no test passed")
    return problems


def function_of(test: str) -> str:
    """Return a test's name without its module and parameters."""
    # A parameter may have colons: a test of addresses is named after "::1".
    return test.partition("[")[0].rpartition("::")[2]


def ring_problems(summary: Summary | None, opcodes: list[str]) -> list[str]:
    """Return the signs that the ring was not used as expected."""
    if summary is None:
        return ["the summary of trio_uring's pytest plugin is missing"]
    problems = [
        f"no {opcode} was completed on the ring"
        for opcode in opcodes
        if not summary.completions[opcode]
    ]
    if not summary.ring_runs:
        problems.append("no run had a ring")
    if summary.fallback_runs:
        problems.append(f"{summary.fallback_runs} runs fell back")
    # A suite that ran on the other engine would prove nothing of the one that was asked for.
    engine = os.environ.get("TRIO_URING_ENGINE", "")
    if (engine == "native" and not summary.native_runs) or (
        engine == "python" and summary.native_runs
    ):
        problems.append(f"{summary.native_runs} runs used the native engine, asked for: {engine}")
    return problems


def report(plain: Run, other: Run, problems: list[str]) -> int:
    """Print the comparison, and return the exit code."""
    print(f"\n{plain}\n{other}")
    for test in sorted(plain.tests("failed")):
        print(f"  fails on {plain.name} already: {test}")
    if other.summary is not None:
        _print_summary(plain, other, other.summary)
    for problem in problems:
        print(f"  WORSE: {problem}")
    print(f"{other.name}: {'not as plain' if problems else 'as plain'}", flush=True)
    return bool(problems)


def _print_summary(plain: Run, other: Run, summary: Summary) -> None:
    print(
        f"{other.name}: {summary.ring_runs} runs on the ring, {summary.fallback_runs} not, "
        f"{summary.native_runs} on the native engine"
    )
    for opcode, count in summary.completions.most_common():
        print(f"  {opcode:<16} {count:>8} completions")
    hops = f"{summary.thread_hops:>8} thread hops"
    if plain.summary is not None:
        hops += f" ({plain.summary.thread_hops} on {plain.name})"
    print(f"  {'':<16} {hops}")
    if summary.routes:
        routes = ", ".join(f"{count} {route}" for route, count in summary.routes.most_common())
        print(f"  calls on files: {routes}")


def _run(command: list[str], cwd: Path, environment: dict[str, str]) -> tuple[str, int]:
    """Run *command*, print its output, and return the output and the exit code."""
    lines: list[str] = []
    with subprocess.Popen(
        # coreutils' timeout kills the whole group, and with it what a hanging test started.
        ["timeout", "--kill-after=10", str(TIMEOUT_S), *command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    return "".join(lines), process.returncode


def _outcomes(report: Path) -> dict[str, str]:
    outcomes: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        elif skipped is not None:
            outcome = "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"
        else:
            outcome = "passed"
        # A test whose teardown fails has two entries; the worse one counts.
        if outcomes.get(test) != "failed":
            outcomes[test] = outcome
    return outcomes
