"""The package installed without a C compiler, or without the native engine."""

from __future__ import annotations

from children import output_of, run_python

# What an installation without the module lacks.
WITHOUT = """
import importlib.abc, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "trio_uring._kernel.{module}":
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Without())
import trio, trio_uring
"""
ECHO = """
async def main():
    left, right = (trio.SocketStream(sock) for sock in trio.socket.socketpair())
    async with left, right:
        await left.send_all(b"hello")
        print(await right.receive_some(), (await trio.Path(sys.executable).stat()).st_size > 0)
    return trio.lowlevel.current_statistics().io_statistics

"""


def test_without_the_core_programs_run_on_trios_own_io() -> None:
    program = f"""{WITHOUT.format(module="_ring")}{ECHO}
import trio_uring.anyio_backend, trio_uring.lowlevel, trio_uring.pytest_plugin, warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    statistics = trio_uring.run(main)
print(statistics.backend)
print(statistics.fallback_reason)
print(caught[0].message)
"""
    echoed, found, reason, warning = output_of(run_python(program))
    assert echoed == "b'hello' True"
    assert found == "epoll"
    assert warning == f"trio_uring falls back to Trio's epoll: {reason}"
    assert "falls back to Trio's epoll: trio_uring was installed without its C core" in warning
    assert "install a C compiler" in warning


def test_other_pythons_than_cpython_get_no_ring() -> None:
    """Their objects may move, among them those that the kernel is sending."""
    program = f"""
import sys, warnings
import attrs, cffi, greenlet, trio
sys.implementation.name = "pypy"
import trio_uring
from trio_uring import _kernel
from trio_uring._doctor import examine
{ECHO}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    statistics = trio_uring.run(main)
print(statistics.backend)
print(statistics.fallback_reason)
print(caught[0].message)
print(examine().advice)
print(_kernel.ffi, _kernel.lib, _kernel.native)
try:
    trio_uring.run(main, ring=trio_uring.RingConfig(require=True))
except trio_uring.RingUnavailableError as exc:
    print(exc)
"""
    echoed, found, reason, warning, advice, loaded, error = output_of(run_python(program))
    assert echoed == "b'hello' True"
    assert found == "epoll"
    assert reason.startswith("trio_uring needs CPython, ")
    assert reason.endswith(" and this is pypy")
    assert warning == f"trio_uring falls back to Trio's epoll: {reason}"
    assert advice == f"[{reason!r}]"
    assert loaded == "None None None"
    assert error == reason


def test_without_the_core_require_says_why() -> None:
    program = f"""{WITHOUT.format(module="_ring")}
try:
    trio_uring.run(trio.sleep, 0, ring=trio_uring.RingConfig(require=True))
except trio_uring.RingUnavailableError as exc:
    print(exc)
"""
    [line] = output_of(run_python(program))
    assert "installed without its C core: install a C compiler" in line


def test_without_the_core_the_doctor_says_what_to_install() -> None:
    program = f"""{WITHOUT.format(module="_ring")}
from trio_uring._doctor import examine
report = examine()
print(report.ok, report.advice)
"""
    [line] = output_of(run_python(program))
    assert line.startswith("False")
    assert "C compiler" in line


def test_without_the_native_engine_the_python_one_runs() -> None:
    program = f"""{WITHOUT.format(module="_native")}{ECHO}
statistics = trio_uring.run(main)
print(statistics.backend, statistics.engine, statistics.engine_reason)
"""
    environment = {"TRIO_URING_ENGINE": "native"}
    echoed, found = output_of(run_python(program, environment=environment))
    assert echoed == "b'hello' True"
    assert found.startswith("io_uring python the native engine was not built for this Python")
