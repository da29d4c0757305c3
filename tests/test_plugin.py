"""The pytest plugin, in small suites, each of which runs in a new Python process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest
from children import CHILD_SECONDS, clean_environment

from trio_uring import RingConfig, RingUnavailableError
from trio_uring._run import probe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    RunSuite = Callable[..., subprocess.CompletedProcess[str]]

BACKEND_IS = "assert trio.lowlevel.current_statistics().io_statistics.backend == {!r}"

SUITE = """
import trio

async def talk():
    {check}
    left, right = trio.socket.socketpair()
    with left, right:
        await left.send(b"abc")
        assert await right.recv(10) == b"abc"

def test_run():
    trio.run(talk)
"""
PYTEST_TRIO_SUITE = """
import pytest, trio, trio.testing

@pytest.fixture
async def listener(nursery):
    async def echo(stream):
        async for data in stream:
            await stream.send_all(data)
    listeners = await nursery.start(trio.serve_tcp, echo, 0)
    return listeners[0]

@pytest.mark.trio
async def test_echo(listener):
    {check}
    async with await trio.testing.open_stream_to_socket_listener(listener) as stream:
        await stream.send_all(b"abc")
        assert await stream.receive_some(10) == b"abc"

@pytest.mark.trio
async def test_clock(autojump_clock):
    {check}
    before = trio.current_time()
    await trio.sleep(1000)
    assert trio.current_time() - before == 1000

@pytest.mark.trio
@pytest.mark.xfail(strict=True)
async def test_failing():
    raise ValueError
"""


@pytest.fixture
def run_suite(tmp_path: Path) -> RunSuite:
    """Return a function that writes a test file, runs pytest on it, and returns the result."""

    def run_suite(
        code: str, *options: str, status: int = 0, ini: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_suite.py").write_text(dedent(code), encoding="utf-8")
        (tmp_path / "pytest.ini").write_text(f"[pytest]\n{ini}", encoding="utf-8")
        inherited = clean_environment()
        inherited.pop("PYTEST_ADDOPTS", None)
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *options],
            cwd=tmp_path,
            env={**inherited, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=CHILD_SECONDS,
        )
        assert result.returncode == status, result.stdout + result.stderr
        return result

    return run_suite


@pytest.fixture(scope="module")
def ring() -> None:
    """Skip if there is no ring. In CI, fail instead."""
    try:
        probe(RingConfig())
    except RingUnavailableError as exc:
        if os.environ.get("CI"):
            pytest.fail(exc.reason, pytrace=False)
        pytest.skip(exc.reason)


def suite(backend: str, template: str = SUITE) -> str:
    return template.format(check=BACKEND_IS.format(backend))


def test_idle_unless_asked(run_suite: RunSuite) -> None:
    result = run_suite(suite("epoll"))
    assert "1 passed" in result.stdout
    assert "ring runs" not in result.stdout
    assert "\ntrio_uring: " not in result.stdout


def test_idle_means_that_nothing_is_changed(run_suite: RunSuite) -> None:
    code = """
        import trio

        def test_nothing_is_replaced():
            for replaced in trio._core._run.TheIOManager, trio._socket._SocketType:
                assert replaced.__module__.startswith("trio._")
            file = trio.lowlevel.FdStream.send_all.__code__.co_filename
            assert file.endswith("_unix_pipes.py")
    """
    run_suite(code)


@pytest.mark.usefixtures("ring")
def test_option(run_suite: RunSuite) -> None:
    result = run_suite(suite("io_uring"), "--trio-uring")
    assert "\ntrio_uring: every Trio run is on io_uring\n" in result.stdout
    [summary] = re.findall("^trio_uring: .* ring runs.*", result.stdout, re.MULTILINE)
    assert summary.startswith("trio_uring: 1 ring runs, 0 fallback runs; completions: ")
    assert re.search(r"\bRECV 1\b", summary)
    assert re.search(r"\bSEND 1\b", summary)
    assert "; thread hops 0; calls on files: none" in summary


@pytest.mark.usefixtures("ring")
def test_ini_option(run_suite: RunSuite) -> None:
    result = run_suite(suite("io_uring"), ini="trio_uring = true")
    assert "trio_uring: 1 ring runs, 0 fallback runs" in result.stdout
    result = run_suite(suite("epoll"), ini="trio_uring = false")
    assert "ring runs" not in result.stdout


@pytest.mark.usefixtures("ring")
def test_summary_counts_thread_hops(run_suite: RunSuite) -> None:
    code = """
        import trio

        async def hop():
            await trio.to_thread.run_sync(list)

        def test_threads():
            trio.run(hop)
            trio.run(hop)
    """
    result = run_suite(code, "--trio-uring")
    assert "trio_uring: 2 ring runs, 0 fallback runs" in result.stdout
    assert "thread hops 2;" in result.stdout


@pytest.mark.usefixtures("ring")
def test_pytest_trio(run_suite: RunSuite) -> None:
    result = run_suite(suite("io_uring", PYTEST_TRIO_SUITE), "--trio-uring")
    assert "2 passed, 1 xfailed" in result.stdout
    assert "trio_uring: 3 ring runs, 0 fallback runs" in result.stdout
    result = run_suite(suite("epoll", PYTEST_TRIO_SUITE))
    assert "2 passed, 1 xfailed" in result.stdout


@pytest.mark.usefixtures("ring")
def test_pytest_trio_mode(run_suite: RunSuite) -> None:
    code = suite("io_uring", PYTEST_TRIO_SUITE).replace("@pytest.mark.trio\n", "")
    result = run_suite(code, "--trio-uring", ini="trio_mode = true")
    assert "2 passed, 1 xfailed" in result.stdout


@pytest.mark.usefixtures("ring")
def test_child_pythons_are_left_alone(run_suite: RunSuite) -> None:
    """A suite may start plain Trio for comparison. TRIO_URING is for child processes."""
    code = """
        import subprocess, sys

        def test_child():
            code = (
                "import trio\\n"
                "async def main(): return trio.lowlevel.current_statistics().io_statistics\\n"
                "assert trio.run(main).backend == 'epoll'"
            )
            subprocess.run([sys.executable, "-c", code], check=True)
    """
    run_suite(code, "--trio-uring")


@pytest.mark.usefixtures("ring")
def test_plugin_ends_with_the_session(run_suite: RunSuite, tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(
        "import pytest\n"
        "assert pytest.main(['--trio-uring', 'test_suite.py']) == 0\n"
        "import trio, trio_uring._run\n"
        "assert not trio_uring._run.is_installed()\n",
        encoding="utf-8",
    )
    run_suite(suite("io_uring"), "--trio-uring")
    result = subprocess.run(
        [sys.executable, "again.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr


# --- Where there is no ring -----------------------------------------------------------------


def test_off_wins_and_is_told(run_suite: RunSuite) -> None:
    result = run_suite(suite("epoll"), "--trio-uring", TRIO_URING="off")
    line = "trio_uring: TRIO_URING=off in the environment: every Trio run is on epoll\n"
    assert result.stdout.count(line) == 2  # header and summary
    assert "ring runs" not in result.stdout


def test_a_missing_ring_is_an_error_before_the_first_test(
    run_suite: RunSuite, tmp_path: Path
) -> None:
    unknown_trio = "import trio\ntrio.__version__ = '9.9'\n"
    (tmp_path / "unknown_trio.py").write_text(unknown_trio, encoding="utf-8")
    result = run_suite(
        suite("epoll"),
        *("-p", "unknown_trio", "--trio-uring"),
        status=pytest.ExitCode.USAGE_ERROR,
        PYTHONPATH=str(tmp_path),
    )
    assert "ERROR: --trio-uring: Trio 9.9 is installed" in result.stderr
    assert "passed" not in result.stdout
    run_suite(suite("epoll"), "-p", "unknown_trio", PYTHONPATH=str(tmp_path))


def test_an_unknown_word_is_an_error_before_the_first_test(
    run_suite: RunSuite, tmp_path: Path
) -> None:
    (tmp_path / "word.py").write_text("import os; os.environ['TRIO_URING'] = 'false'")
    result = run_suite(
        suite("epoll"),
        *("-p", "word", "--trio-uring"),
        status=pytest.ExitCode.USAGE_ERROR,
        PYTHONPATH=str(tmp_path),
    )
    assert "ERROR: --trio-uring: TRIO_URING is 'false': it takes 1, on" in result.stderr
