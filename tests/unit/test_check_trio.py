"""A Trio or a Python that cannot be used is refused, and the reason is said.

Each in a Python of its own: where Trio is patched already, it is not looked at again.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from children import output_of, run_python

from trio_uring import _trio_private


@pytest.mark.parametrize("name", ["_resolve_address_nocp", "_nonblocking_helper"])
def test_a_missing_method_of_sockets(name: str) -> None:
    program = f"""
from trio_uring import IncompatibleTrioError
from trio_uring._trio_private import TrioSocket, check_trio

check_trio()
del TrioSocket.{name}
try:
    check_trio()
except IncompatibleTrioError as exc:
    print(exc)
"""
    [line] = output_of(run_python(program))
    assert f"does not find _SocketType.{name} in it" in line


@pytest.mark.parametrize("kind", ["modules", "their names"])
def test_a_trio_without_what_is_needed_falls_back_and_says_why(kind: str) -> None:
    """It is hidden from this package only: Trio itself has it, under another name or the same."""
    program = """
import importlib, sys, types, warnings
import trio

import_module = importlib.import_module

def without(name, *package):
    found = import_module(name, *package)
    names = {key: value for key, value in vars(found).items() if f"{name}.{key}" not in sys.argv}
    return types.SimpleNamespace(**names) if len(names) < len(vars(found)) else found

importlib.import_module = without
import trio_uring
from trio_uring import anyio_backend, lowlevel

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trio_uring.run(trio.sleep, 0)
[warning] = caught

async def main():
    return trio_uring.statistics().backend

print(trio_uring.run(main), warning.message)
"""
    source = Path(_trio_private.__file__).read_text(encoding="utf-8")
    names = re.findall(r"""_private\(\s*"(trio[\w.]+)"\s*\)""", source)
    modules = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    hidden = modules if kind == "modules" else {*names} - modules - {"trio._path", "trio._threads"}
    assert len(hidden) > 3
    [line] = output_of(run_python(program, *hidden))
    assert line.startswith("epoll trio_uring falls back")
    for name in hidden:
        assert name in line


@pytest.mark.parametrize(
    ("setting", "refused"), [("", True), ("0", True), ("no", True), ("1", False)]
)
def test_an_untested_trio_is_used_only_if_the_setting_is_1(setting: str, *, refused: bool) -> None:
    program = """
import trio
trio.__version__ = "9.9"
from trio_uring import IncompatibleTrioError
from trio_uring._trio_private import check_trio

try:
    check_trio()
except IncompatibleTrioError:
    print("refused")
"""
    result = run_python(program, environment={"TRIO_URING_ANY_TRIO": setting})
    assert output_of(result) == ["refused"] * refused


def test_a_python_without_its_global_lock_falls_back_and_says_why() -> None:
    program = """
import sys, warnings
sys._is_gil_enabled = lambda: False
import trio, trio_uring

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trio_uring.run(trio.sleep, 0)
[warning] = caught
print(warning.message)
try:
    trio_uring.run(trio.sleep, 0, ring=trio_uring.RingConfig(require=True))
except trio_uring.RingUnavailableError as exc:
    print(exc)
"""
    warned, raised = output_of(run_python(program))
    assert raised in warned
    assert "without its global lock" in raised
    assert "PYTHON_GIL=1" in raised
