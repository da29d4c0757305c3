"""Only the test that hangs fails, with the stacks of its tasks. Later tests pass."""

from __future__ import annotations

import re

from children import TESTS, run_python

CODE = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"


def test_tests_that_hang_fail_and_those_after_them_pass() -> None:
    result = run_python(
        CODE,
        *("-v", "-pno:cacheprovider"),
        *("-c", TESTS.parent / "pyproject.toml", TESTS / "programs" / "hanging_tests.py"),
        options=(),
    )
    progress = result.stdout.partition("= FAILURES =")[0]
    # Between a name and its ending stands what pytest-timeout prints of other threads.
    endings = re.findall(r"::(test_\w+).*?(PASSED|FAILED)", progress, re.DOTALL)
    assert endings == [
        ("test_receiving", "FAILED"),
        ("test_receiving_in_a_child_task", "FAILED"),
        ("test_polling", "FAILED"),
        ("test_run_of_its_own", "FAILED"),
        ("test_thread", "FAILED"),
        ("test_child", "FAILED"),
        ("test_that_works", "PASSED"),
    ], result.stdout + result.stderr
    # The line of the task is shown, though the main thread was in Trio's loop.
    lines = re.findall(r"^ +File .*/hanging_tests.py\", line .*", result.stdout, re.MULTILINE)
    assert sum(line.endswith("in receive_nothing") for line in lines) >= 3
