"""A pytest plugin that runs AnyIO's unmodified test suite on the ring.

``ANYIO_GATE=answers``: the backend "trio" uses the ring. ``ANYIO_GATE=by-name``: AnyIO has a third
backend, "trio_uring". At the end it prints what ran on the ring.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from anyio._core import _eventloop

import trio_uring.anyio_backend
from trio_uring._statistics import totals
from trio_uring._trio_private import count_thread_hops

if TYPE_CHECKING:
    import pytest

GATE = os.environ["ANYIO_GATE"]

if GATE == "answers":
    _eventloop.loaded_backends["trio"] = trio_uring.anyio_backend.backend_class
elif "trio_uring" not in _eventloop.BACKENDS:
    _eventloop.BACKENDS += ("trio_uring",)

_thread_hops = count_thread_hops()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what ran on the ring, as our own plugin does."""
    completions = ", ".join(f"{name} {n}" for name, n in totals.completed.most_common())
    routes = ", ".join(f"{name} {n}" for name, n in totals.routes.most_common())
    terminalreporter.write_line(
        f"trio_uring: {totals.ring_runs} ring runs, {totals.fallback_runs} fallback runs; "
        f"completions: {completions or 'none'}; thread hops {_thread_hops()}; "
        f"calls on files: {routes or 'none'}; "
        f"native runs {totals.native_runs}"
    )
