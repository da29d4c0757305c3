"""How AnyIO finds our backends: with each order of imports, other finders, no or another AnyIO.

Each test starts a new Python process.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from children import output_of, run_python

import trio_uring

AUTOSTART = Path(trio_uring.__file__).with_name("_autostart.py")

# After these lines AnyIO's names lead to our backends.
CHECK = """
import anyio, trio
import trio_uring
from anyio._core._eventloop import get_async_backend

async def main():
    return get_async_backend().__name__

print(trio_uring.run(main), trio.run(main))
print(anyio.run(main, backend="trio_uring"), get_async_backend("trio_uring").__name__)
"""
OURS = ["RingAwareBackend RingAwareBackend", "RingAwareBackend TrioUringBackend"]

# What TRIO_URING in the environment does at the start of Python.
START = f"""
from pathlib import Path
scope = {{"__name__": "trio_uring._autostart"}}
exec(Path({str(AUTOSTART)!r}).read_text(), scope)
scope["start"]()
"""


def finds_ours(code: str) -> bool:
    return output_of(run_python(code + CHECK)) == OURS


@pytest.mark.parametrize(
    "first",
    [
        "import trio_uring",
        "import anyio",
        "import trio",
        "import trio_uring.anyio_backend",
        "import trio_uring.pytest_plugin",
        "import anyio._backends._trio",
        "import anyio.pytest_plugin",
        "import anyio; anyio.run(anyio.sleep, 0)",
        "import anyio; anyio.run(anyio.sleep, 0, backend='trio')",
        "import trio_uring, anyio; anyio.run(anyio.sleep, 0, backend='trio')",
        "import trio_uring, anyio; anyio.run(anyio.sleep, 0, backend='trio_uring')",
        "import trio_uring, anyio._backends._trio_uring",
    ],
)
def test_order_of_imports(first: str) -> None:
    assert finds_ours(first)


def test_no_import_of_anyio_nor_of_ours() -> None:
    code = """
        import sys, trio_uring
        print(sorted(name for name in sys.modules if name.startswith("anyio")))
        print("trio_uring.anyio_backend" in sys.modules)
        """
    assert output_of(run_python(code)) == ["[]", "False"]


def test_without_import_of_ours() -> None:
    code = """
        import anyio
        try:
            anyio.run(anyio.sleep, 0, backend="trio_uring")
        except LookupError as exc:
            print(exc)
        """
    assert output_of(run_python(code)) == ["No such backend: trio_uring"]


# --- Half done ------------------------------------------------------------------------------


def test_started_by_the_environment_while_anyio_imports_trio() -> None:
    """AnyIO's module is still being imported when this package is, and then sets its own class."""
    code = """
import anyio, sys
from anyio._core._eventloop import get_async_backend

async def main():
    import trio
    print(trio.lowlevel.current_statistics().io_statistics.backend)
    return get_async_backend().__name__

assert "trio" not in sys.modules
print(anyio.run(main, backend="trio"))
"""
    result = run_python(START + code, environment={"TRIO_URING": "1"})
    assert output_of(result) == ["io_uring", "RingAwareBackend"]


def test_finders_in_front() -> None:
    """Like pytest's finder, which finds all of AnyIO itself, and comes before ours."""
    greedy = """
import sys
from importlib.machinery import PathFinder
import trio_uring

class Greedy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith("anyio"):
            return PathFinder.find_spec(name, path, target)

sys.meta_path.insert(0, Greedy)
"""
    assert finds_ours(greedy)
    assert finds_ours("import anyio, json\n" + greedy + "import csv\n")


def test_one_finder_that_does_not_push() -> None:
    code = """
        import sys, trio_uring
        from trio_uring import _anyio_finder
        _anyio_finder.install()
        print([type(finder).__name__ for finder in sys.meta_path].count("Finder"))
        import anyio._backends._trio
        class Other:
            @staticmethod
            def find_spec(name, path=None, target=None):
                return None
        sys.meta_path.insert(0, Other)
        import json.tool
        print(sys.meta_path[0] is Other)
        """
    assert output_of(run_python(code)) == ["1", "True"]


# --- The module keeps its looks -------------------------------------------------------------


def test_anyios_module_keeps_its_loader() -> None:
    code = """
        import importlib.util, inspect, trio_uring
        name = "anyio._backends._trio"
        spec = importlib.util.find_spec(name)
        print("class TrioBackend" in spec.loader.get_source(name))
        module = importlib.import_module(name)
        print(type(module.__loader__).__name__, type(module.__spec__.loader).__name__)
        print("class TrioBackend" in inspect.getsource(module))
        print(module.TrioBackend.__name__)
        """
    loader = "SourceFileLoader SourceFileLoader"
    assert output_of(run_python(code)) == ["True", loader, "True", "TrioBackend"]


def test_anyio_forgotten_and_imported_anew() -> None:
    forget = """
import sys, trio_uring, anyio
anyio.run(anyio.sleep, 0, backend="trio_uring")
for name in [name for name in sys.modules if name.split(".")[0] == "anyio"]:
    del sys.modules[name]
"""
    assert finds_ours(forget)


# --- No AnyIO, or a wrong one ---------------------------------------------------------------


def test_no_anyio() -> None:
    code = """
        import sys
        sys.modules["anyio"] = None
        import trio, trio_uring, trio_uring.pytest_plugin
        trio_uring.run(trio.sleep, 0)
        try:
            import trio_uring.anyio_backend
        except ModuleNotFoundError as exc:
            print(exc.name)
        """
    assert output_of(run_python(code)) == ["anyio"]


def pretending(installed: str, directory: Path) -> str:
    """Return code that puts *directory* first in sys.path, with AnyIO under another version."""
    (directory / "anyio").symlink_to(Path(anyio.__file__).parent)
    (directory / f"anyio-{installed}.dist-info").mkdir()
    return f"import sys; sys.path.insert(0, {str(directory)!r})\n"


NEEDS = (
    "is installed, and trio_uring's backend for it needs at least 4.10 and less than 5: "
    "pip install 'anyio>=4.10,<5'"
)


@pytest.mark.parametrize("installed", ["4.9.0", "3.7.1", "5.0.0rc1"])
def test_wrong_anyio(installed: str, tmp_path: Path) -> None:
    code = """
import anyio, pathlib, trio, trio_uring, warnings
from anyio._core._eventloop import get_async_backend
try:
    anyio.run(anyio.sleep, 0, backend="trio_uring")
except RuntimeError as exc:
    print(exc)
anyio.run(anyio.sleep, 0, backend="trio")  # AnyIO's own works, and nobody complains
try:
    import trio_uring.anyio_backend
except RuntimeError as exc:
    print(type(exc).__name__)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    async def main():
        print(get_async_backend().__name__, await anyio.Path("/").exists())
    trio_uring.run(main)
    trio_uring.run(main)
print([str(warning.message)[:29] for warning in caught])
"""
    lines = output_of(run_python(pretending(installed, tmp_path) + code))
    assert lines == [
        f"AnyIO {installed} {NEEDS}",
        "RuntimeError",
        *["TrioBackend True"] * 2,
        '["AnyIO\'s files stay in threads"]',
    ]


@pytest.mark.parametrize("installed", ["4.10.0", "4.16.0.post1", "4.99.0"])
def test_right_anyio(installed: str, tmp_path: Path) -> None:
    assert finds_ours(pretending(installed, tmp_path))


def test_an_anyio_without_metadata_is_tried(tmp_path: Path) -> None:
    code = pretending("0", tmp_path)
    (tmp_path / "anyio-0.dist-info").rmdir()
    assert finds_ours(code)


def test_metadata_is_not_imported() -> None:
    """Importing importlib.metadata takes a third of the time of the whole package."""
    code = """
        import sys, anyio, trio
        before = {*sys.modules}
        import trio_uring
        anyio.run(anyio.sleep, 0, backend="trio_uring")
        print({"importlib.metadata", "email", "inspect", "zipfile"} & ({*sys.modules} - before))
        """
    assert output_of(run_python(code)) == ["set()"]


def test_two_finders_do_not_ask_each_other_for_ever() -> None:
    """The package may be imported twice, under coverage for example."""
    code = """
import sys, trio_uring
first = sys.modules.pop("trio_uring._anyio_finder")
from importlib import import_module
second = import_module("trio_uring._anyio_finder")
second.install()
assert first is not second and {first._finder, second._finder} <= {*sys.meta_path}
"""
    assert finds_ours(code)
