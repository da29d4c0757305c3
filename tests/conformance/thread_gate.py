"""A pytest plugin that gives every Trio run a ring, and records the calls that use threads.

It writes the calls by name, and the completions, to the file named in ``THREAD_GATE``, as JSON.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

import trio_uring
from trio_uring._files._methods import raw_of
from trio_uring._statistics import totals
from trio_uring._trio_private import count_thread_hops, trio_path_functions

if TYPE_CHECKING:
    from collections.abc import Callable

REPORT = Path(os.environ["THREAD_GATE"])

_hops: Counter[str] = Counter()
_path_functions = trio_path_functions()
_all_hops = count_thread_hops()
_run_sync = trio.to_thread.run_sync


def _name(function: Callable[..., object]) -> str:
    while isinstance(function, partial):
        function = function.func
    if function in _path_functions:
        return f"Path.{_path_functions[function]}"
    owner = getattr(function, "__self__", None)
    if isinstance(owner, io.IOBase):
        return f"{'foreign' if raw_of(owner) is None else 'our'} file's {function.__name__}"
    name = getattr(function, "__name__", None)
    return repr(function) if name is None else f"Path.{name}"


async def _recording(function: Callable[..., Any], *args: Any, **keywords: Any) -> object:
    _hops[_name(function)] += 1
    return await _run_sync(function, *args, **keywords)


def pytest_configure() -> None:
    """Give every later run a ring."""
    trio_uring.install(trio_uring.RingConfig(require=True))
    setattr(trio.to_thread, "run_sync", _recording)  # noqa: B010


def pytest_unconfigure() -> None:
    """Write the report."""
    found = {
        "hops": _hops,
        "all hops": _all_hops(),
        "routes": totals.routes,
        "completed": totals.completed,
    }
    REPORT.write_text(json.dumps(found), encoding="utf-8")
    trio_uring.uninstall()
