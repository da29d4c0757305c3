"""Runs async tests on a ring. If there is none, they are skipped, or in CI fail."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from accounting import Rounds, open_fds
from timeouts import cancel_run_first, fails_if_it_hung

import trio_uring
from trio_uring import RingConfig, RingUnavailableError
from trio_uring._files import OTHERWISE
from trio_uring._run import probe
from trio_uring.lowlevel import on_ring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

# Every test in these needs a ring.
RING_TESTS = {
    Path(__file__).parent / name
    for name in (
        *("conformance", "kernel"),
        *("test_bench_command.py", "test_benchmarks.py", "test_examples.py", "test_soak.py"),
    )
}

_reports = pytest.StashKey[list[str]]()
_passed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_reports] = []
    config.addinivalue_line(
        "markers", "ring(**options): the RingConfig of an async test, where the default will not do"
    )
    config.addinivalue_line(
        "markers",
        "no_audit_hooks: a test that comes before others install audit hooks, which remain",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("no_audit_hooks") is None)


# --- Which tests need a ring ----------------------------------------------------------------


@cache
def _why_no_ring() -> str:
    try:
        probe(RingConfig())
    except RingUnavailableError as exc:
        return exc.reason
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a ring if there is none. In CI, fail them instead."""
    needs_ring = not RING_TESTS.isdisjoint([item.path, *item.path.parents]) or _is_async(item)
    if needs_ring and (reason := _why_no_ring()):
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


# --- Async tests ----------------------------------------------------------------------------


def _is_async(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an async test on a ring, with a clock if one of its fixtures is a clock."""
    if not _is_async(pyfuncitem):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    fixtures = {name: pyfuncitem.funcargs[name] for name in names}
    clocks = [value for value in fixtures.values() if isinstance(value, trio.abc.Clock)]
    marker = pyfuncitem.get_closest_marker("ring")
    options = marker.kwargs if marker is not None else {}
    trio_uring.run(
        _checking_the_ring,
        partial(pyfuncitem.obj, **fixtures),
        clock=clocks[0] if clocks else None,
        ring=RingConfig(require=True, **options),
    )
    return True


async def _checking_the_ring(test: Callable[[], Awaitable[None]]) -> None:
    assert on_ring()  # not if TRIO_URING=off is in the environment
    await test()


# --- Timeouts -------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item) -> Generator[None, object, object]:
    """Make only the test that hangs fail, with the stacks of its tasks."""
    result = yield
    cancel_run_first(item)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that hung, whatever its own result."""
    with fails_if_it_hung(item):
        return (yield)


# --- Fixtures -------------------------------------------------------------------------------


@pytest.fixture
def fd_ledger() -> Iterator[None]:
    """Fail if the test leaves an fd open that was not open before, or closes one that was."""
    before = open_fds()
    yield
    after = open_fds()
    appeared = {fd: name for fd, name in after.items() if before.get(fd) != name}
    vanished = {fd: name for fd, name in before.items() if after.get(fd) != name}
    assert (appeared, vanished) == ({}, {})


@pytest.fixture
def no_deterministic_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow skipping schedule points, which pytest-trio forbids for all tests."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", False)


@pytest.fixture
def no_native_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python make all calls on paths, also those that the native engine would make."""
    for module in ("_files._hooks", "anyio_backend"):
        monkeypatch.setattr(f"trio_uring.{module}.call_path", lambda *_args: OTHERWISE)


@pytest.fixture(scope="session")
def refuse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Return a function that returns an environment in which system calls fail: see refuse.c."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler is needed")
    library = tmp_path_factory.mktemp("refuse") / "refuse.so"
    source = Path(__file__).with_name("kernel") / "refuse.c"
    command = [compiler, "-shared", "-fPIC", "-O", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)

    def environment(**refused: object) -> dict[str, str]:
        preloaded = [*filter(None, [os.environ.get("LD_PRELOAD")]), str(library)]
        variables = {f"REFUSE_{name.upper()}": str(value) for name, value in refused.items()}
        return {"LD_PRELOAD": ":".join(preloaded), **variables}

    return environment


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Iterator[Rounds]:
    """Count how the rounds of a race end; fail unless each of the three endings occurred."""
    counted = Rounds()
    yield counted
    if request.node.stash.get(_passed, default=False):
        request.config.stash[_reports].append(f"{request.node.nodeid}: {counted}")
        counted.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Store whether a test passed, because the rounds of a failed test are not checked."""
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how the rounds of races ended."""
    if reports := terminalreporter.config.stash[_reports]:
        terminalreporter.section("races")
        for line in reports:
            terminalreporter.write_line(line)
