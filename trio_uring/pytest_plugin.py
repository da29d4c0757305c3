"""Runs a test suite's Trio runs on io_uring: ``pytest --trio-uring``, or ``trio_uring = true``.

Loaded by an entry point wherever the package is installed, and idle unless asked: without the
option it installs nothing and changes no run. Works with pytest-trio, AnyIO's plugin, and any
suite that calls ``trio.run``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ._config import RingConfig
from ._run import install, uninstall
from ._statistics import totals
from ._trio_private import count_thread_hops

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

_thread_hops: Final[list[Callable[[], int]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the ini setting."""
    help_text = "run every Trio run of this suite on io_uring; an error where that is missing"
    parser.getgroup("trio_uring").addoption(
        "--trio-uring", action="store_true", default=False, help=help_text
    )
    parser.addini("trio_uring", help_text, type="bool", default=False)


def _asked(config: pytest.Config) -> bool:
    return bool(config.getoption("--trio-uring") or config.getini("trio_uring"))


def pytest_configure(config: pytest.Config) -> None:
    """Give every later Trio run a ring."""
    if _asked(config):
        # A suite that silently ran on epoll would prove nothing.
        install(RingConfig(require=True))
        _thread_hops.append(count_thread_hops())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Undo it."""
    if _asked(config):
        uninstall()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what ran on the ring, and what still went to threads."""
    if _asked(terminalreporter.config):
        completions = ", ".join(f"{name} {n}" for name, n in totals.completed.most_common())
        routes = ", ".join(f"{name} {n}" for name, n in totals.routes.most_common())
        terminalreporter.write_line(
            f"trio_uring: {totals.ring_runs} ring runs, {totals.fallback_runs} fallback runs; "
            f"completions: {completions or 'none'}; "
            f"thread hops {sum(count() for count in _thread_hops)}; "
            f"calls on files: {routes or 'none'}"
        )
