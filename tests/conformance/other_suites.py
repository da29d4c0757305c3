"""Runs suites of projects built on Trio or AnyIO on plain Trio and on the ring, and compares.

    python other_suites.py PROJECT SOURCE

*SOURCE* is the project's unpacked sdist. Here plain means that trio_uring is installed but off.
`trio_suite.py` shows that this changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from suite_runner import differences, report, run_suite

# Most of these suites use what pytest 8.4 removed.
PYTEST = "pytest<8.4"


@dataclass(frozen=True)
class Suite:
    """A project's test suite."""

    sdist: str
    requirements: list[str]
    arguments: list[str]
    passed_min: int  # on plain Trio: fewer means that the suite did not really run
    pytest: str = PYTEST
    opens_files: bool = False


SUITES = {
    "trio-websocket": Suite(
        sdist="trio-websocket==0.12.2",
        requirements=["pytest-trio", "trustme"],
        arguments=["-o", "trio_mode=true", "tests"],
        passed_min=64,
    ),
    "httpcore": Suite(
        sdist="httpcore==1.0.9",
        requirements=[
            "anyio",
            "h2",
            "hpack",
            "pytest-httpbin",
            "pytest-trio",
            "socksio",
            "trustme",
            # pytest-httpbin's flask imports what newer ones have dropped.
            "werkzeug<2.3",
        ],
        # Its own settings turn warnings into errors, and its dependencies' newer releases warn.
        arguments=["-o", "filterwarnings=default", "tests", "-k", "trio"],
        passed_min=69,
    ),
    "pytest-trio": Suite(
        sdist="pytest-trio==0.8.0",
        requirements=["hypothesis"],
        # The one file left out expects messages of an older Hypothesis.
        arguments=[
            "pytest_trio/_tests",
            "--ignore=pytest_trio/_tests/test_hypothesis_interaction.py",
        ],
        passed_min=52,
    ),
    "starlette": Suite(
        sdist="starlette==1.10.0",
        # Without the optional blockbuster: what it replaces is called in a thread.
        requirements=[
            *(
                "anyio",
                "httpx",
                "httpx2[zstd]",
                "importlib-metadata",
                "itsdangerous",
            ),
            *("jinja2", "opentelemetry-sdk", "python-multipart", "pyyaml"),
        ],
        arguments=["tests", "-k", "trio"],
        passed_min=630,
        pytest="pytest>=9.1",
        opens_files=True,
    ),
}


def main() -> int:
    """Run a project's suite in both ways, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("project", choices=sorted(SUITES))
    parser.add_argument("source", type=Path)
    options = parser.parse_args()
    suite = SUITES[options.project]
    runs = [
        run_suite(
            f"{suite.sdist}, {way}",
            [*suite.arguments, *arguments],
            cwd=options.source,
            environment={"TRIO_URING": environment},
        )
        for way, arguments, environment in [("plain", [], "off"), ("ring", ["--trio-uring"], "")]
    ]
    plain, ring = runs
    problems = differences(plain, ring)
    if len(plain.tests("passed")) < suite.passed_min:
        problems.append(f"{plain.name}: fewer than {suite.passed_min} passed")
    if ring.summary is None or not ring.summary.ring_runs or ring.summary.fallback_runs:
        problems.append(f"{ring.name}: not every run had a ring")
    elif suite.opens_files and not ring.summary.routes["ring"]:
        problems.append(f"{ring.name}: no file was opened on the ring")
    return report(plain, ring, problems)


if __name__ == "__main__":
    sys.exit(main())
