"""The comparison of two runs of a suite can fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from suite_runner import Run, Summary, differences, ring_problems, run_suite

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = {"m::a": "passed", "m::b[1]": "passed", "m::c": "skipped", "m::d": "failed"}


def run(outcomes: dict[str, str], exit_code: int = 0) -> Run:
    return Run("run", outcomes, exit_code, None)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"m::c": "passed", "m::d": "passed"},
        {"m::d": "skipped"},
        {"m::b[1]": "xfailed"},
        {"m::new": "passed"},
    ],
)
def test_a_run_that_is_as_good_has_no_problems(changed: dict[str, str]) -> None:
    assert not differences(run(PLAIN), run({**PLAIN, **changed}))


@pytest.mark.parametrize(
    "changed", [{"m::a": "failed"}, {"m::a": "skipped"}, {"m::new": "failed"}, {"m::c": "failed"}]
)
def test_a_test_that_fails_only_here_is_a_problem(changed: dict[str, str]) -> None:
    assert differences(run(PLAIN), run({**PLAIN, **changed}))


def test_a_test_that_did_not_run_is_a_problem() -> None:
    fewer = run({test: outcome for test, outcome in PLAIN.items() if test != "m::b[1]"})
    assert differences(run(PLAIN), fewer)
    assert not differences(run(PLAIN), fewer, deselected=frozenset({"b"}))
    assert differences(run(PLAIN), fewer, deselected=frozenset({"a"}))


def test_runs_that_did_not_end_well_are_a_problem() -> None:
    assert differences(run(PLAIN), run(PLAIN, exit_code=124))
    assert differences(run(PLAIN, exit_code=2), run(PLAIN))
    assert differences(run({}), run({}))


def test_outcomes(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("""
import pytest
def test_passed(): pass
def test_failed(): assert False
def test_skipped(): pytest.skip("no")
@pytest.mark.xfail
def test_xfailed(): assert False
@pytest.fixture
def broken():
    yield
    raise ValueError
def test_broken(broken): pass
@pytest.mark.parametrize("x", "ab")
def test_each(x): pass
""")
    result = run_suite("some", ["-p", "no:trio_uring"], cwd=tmp_path, environment={})
    assert result.exit_code == 1
    assert {name.removeprefix("test_it::test_"): end for name, end in result.outcomes.items()} == {
        "passed": "passed",
        "failed": "failed",
        "skipped": "skipped",
        "xfailed": "xfailed",
        "broken": "failed",
        "each[a]": "passed",
        "each[b]": "passed",
    }


def test_summary() -> None:
    line = "trio_uring: 12 ring runs, 0 fallback runs; completions: SEND 3, RECV 10; thread hops 7"
    summary = Summary.parse(f"=== ok ===\n{line}\n=== 1 passed ===")
    assert summary is not None
    assert (summary.ring_runs, summary.fallback_runs, summary.thread_hops) == (12, 0, 7)
    assert summary.completions == {"SEND": 3, "RECV": 10}
    assert summary.completions["READ"] == 0
    none = Summary.parse(line.replace("SEND 3, RECV 10", "none"))
    assert none is not None
    assert not none.completions
    assert Summary.parse("=== 1 passed ===") is None


@pytest.mark.parametrize(
    ("asked", "native", "problem"),
    [
        ("native", 12, False),
        ("native", 0, True),
        ("python", 0, False),
        ("python", 1, True),
        ("", 0, False),
        ("", 5, False),
    ],
)
def test_a_suite_on_the_other_engine_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, asked: str, native: int, problem: bool
) -> None:
    monkeypatch.setenv("TRIO_URING_ENGINE", asked)
    line = "trio_uring: 12 ring runs, 0 fallback runs; completions: none; thread hops 7"
    summary = Summary.parse(f"{line}; calls on files: ring 3; native runs {native}")
    assert summary is not None
    assert summary.routes == {"ring": 3}
    assert bool(ring_problems(summary, [])) == problem
