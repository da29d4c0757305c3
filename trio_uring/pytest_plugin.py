"""Runs a test suite's Trio runs on io_uring: ``pytest --trio-uring``, or ``trio_uring = true``.

An entry point loads the plugin wherever the package is installed. Without the option it changes
nothing. It works with pytest-trio, with AnyIO's plugin, and with any suite that calls ``trio.run``.

If no ring can be set up, pytest exits before the first test and reports the reason, so that a suite
doesn't silently run on epoll. ``TRIO_URING=off`` in the environment overrides the option, for
comparisons. The header and the summary say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from ._config import RingConfig
from ._errors import RingUnavailableError
from ._run import install, is_installed, probe, uninstall
from ._statistics import totals
from ._trio_private import count_thread_hops

if TYPE_CHECKING:
    from collections.abc import Callable

_OFF: Final = "TRIO_URING=off in the environment: every Trio run is on epoll"
_on_ring: Final = pytest.StashKey[bool]()  # set if the option is on
_thread_hops: Final[list[Callable[[], int]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the ini setting."""
    help_text = "run every Trio run of this suite on io_uring; an error where that is missing"
    parser.getgroup("trio_uring").addoption(
        "--trio-uring", action="store_true", default=False, help=help_text
    )
    parser.addini("trio_uring", help_text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Give every later Trio run a ring."""
    if not (config.getoption("--trio-uring") or config.getini("trio_uring")):
        return
    ring = RingConfig(require=True)
    try:
        install(ring)
        on_ring = is_installed()
        if on_ring:
            probe(ring)
    except (RingUnavailableError, ValueError) as exc:
        raise pytest.UsageError(f"--trio-uring: {exc}") from None
    config.stash[_on_ring] = on_ring
    _thread_hops.append(count_thread_hops())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Undo `pytest_configure`."""
    if _on_ring in config.stash:
        uninstall()


def pytest_report_header(config: pytest.Config) -> str | None:
    """Report that Trio's runs get a ring, or why they do not."""
    if _on_ring not in config.stash:
        return None
    return f"trio_uring: {'every Trio run is on io_uring' if config.stash[_on_ring] else _OFF}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report which operations ran on the ring, and which calls used threads."""
    stash = terminalreporter.config.stash
    if _on_ring not in stash:
        return
    if not stash[_on_ring]:
        terminalreporter.write_line(f"trio_uring: {_OFF}")
        return
    completions = ", ".join(f"{name} {n}" for name, n in totals.completed.most_common())
    routes = ", ".join(f"{name} {n}" for name, n in totals.routes.most_common())
    terminalreporter.write_line(
        f"trio_uring: {totals.ring_runs} ring runs, {totals.fallback_runs} fallback runs; "
        f"completions: {completions or 'none'}; "
        f"thread hops {sum(count() for count in _thread_hops)}; "
        f"calls on files: {routes or 'none'}; "
        f"native runs {totals.native_runs}"
    )
