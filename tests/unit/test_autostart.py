"""TRIO_URING in the environment: what happens when Python starts and imports Trio.

Each test starts a Python process with the installed `trio_uring.pth`. Two small packages replace
Trio and trio_uring, and print the calls that they get.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

PTH = Path(sysconfig.get_path("purelib"), "trio_uring.pth")
AUTOSTART = Path(sysconfig.get_path("purelib"), "trio_uring", "_autostart.py")

TRIO = """
print("trio begins")
import trio_uring_helper
value = 1
print("trio ends")
"""
TRIO_URING = """
print("trio_uring begins")
import trio
assert trio.value == 1, "trio was half done"
def install():
    assert finished, "trio_uring was half done"
    print("install")
finished = True
print("trio_uring ends")
"""
TRIO_FIRST = ["trio begins", "trio ends", "trio_uring begins", "trio_uring ends", "install"]
COUNT_FINDERS = "import sys; print([type(f).__name__ for f in sys.meta_path].count('Finder'))"
TRIO_URING_FIRST = ["trio_uring begins", "trio begins", "trio ends", "trio_uring ends", "install"]


@dataclass
class Program:
    """Runs Python code where TRIO_URING is set."""

    directory: Path

    def write(self, name: str, code: str) -> None:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(dedent(code))

    def start(
        self, code: str, setting: str | None = "1", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRIO_URING"}
        environment.update(variables)
        if setting is not None:
            environment["TRIO_URING"] = setting
        return subprocess.run(
            [sys.executable, "-c", dedent(code)],
            env=environment,
            cwd=self.directory,  # Python looks for modules there, but only after its start
            capture_output=True,
            text=True,
            check=False,
        )

    def __call__(self, code: str, setting: str | None = "1") -> list[str]:
        """Return the lines that *code* prints. It must print no warning."""
        result = self.start(code, setting)
        assert not result.stderr, result.stderr
        assert result.returncode == 0
        return result.stdout.splitlines()


@pytest.fixture
def program(tmp_path: Path) -> Program:
    assert PTH.exists(), "these tests need trio_uring installed from its wheel"
    program = Program(tmp_path)
    program.write("trio/__init__.py", TRIO)
    program.write("trio_uring/__init__.py", TRIO_URING)
    program.write("trio_uring_helper.py", "")
    program.write("unrelated.py", "")
    return program


@pytest.mark.parametrize("setting", [None, "", "0", "off", "Off", " off "])
def test_nothing_happens_unless_asked_for(program: Program, setting: str | None) -> None:
    assert program(COUNT_FINDERS, setting) == ["0"]
    assert program("import trio", setting) == ["trio begins", "trio ends"]


@pytest.mark.parametrize("setting", ["1", "on", "require"])
def test_trio_is_not_imported_for_those_who_do_not(program: Program, setting: str) -> None:
    code = "import sys; print([name for name in sys.modules if name.startswith('trio')])"
    assert program(code, setting) == ["[]"]
    assert program(COUNT_FINDERS, setting) == ["1"]


@pytest.mark.parametrize("setting", ["1", "on", "require"])
def test_trio_first(program: Program, setting: str) -> None:
    assert program("import trio", setting) == TRIO_FIRST


def test_trio_uring_first(program: Program) -> None:
    assert program("import trio_uring") == TRIO_URING_FIRST


def test_a_submodule_first(program: Program) -> None:
    program.write("trio/sub.py", "print('sub')")
    assert program("import trio.sub") == [*TRIO_FIRST, "sub"]


def test_trio_uring_that_imports_trio_late(program: Program) -> None:
    program.write("trio_uring/__init__.py", TRIO_URING.replace("import trio\nassert", "#"))
    assert program("import trio_uring; import trio") == [
        "trio_uring begins",
        "trio_uring ends",
        "trio begins",
        "trio ends",
        "install",
    ]


def test_trio_is_there_already(program: Program) -> None:
    code = f"""
        import os, trio
        os.environ["TRIO_URING"] = "1"
        exec(open({str(PTH)!r}).read())
    """
    # The line finds the package in front, as it would find the installed one.
    (program.directory / "trio_uring" / "_autostart.py").symlink_to(AUTOSTART)
    assert program(code, "off") == TRIO_FIRST


def test_what_is_imported_looks_as_ever(program: Program) -> None:
    code = """
        import importlib.machinery, pkgutil, sys
        import trio
        for module in sys.modules["trio"], sys.modules["trio_uring"]:
            assert module.__spec__.loader is module.__loader__
            assert type(module.__loader__) is importlib.machinery.SourceFileLoader
            assert "exec_module" not in vars(module.__loader__)
            assert pkgutil.get_data(module.__name__, "__init__.py")
            assert module.__spec__.submodule_search_locations == module.__path__
        assert not [f for f in sys.meta_path if type(f).__name__ == "Finder"]
    """
    assert program(code) == TRIO_FIRST


def test_looking_for_trio_is_not_importing_it(program: Program) -> None:
    code = """
        import importlib.util
        assert importlib.util.find_spec("trio") and importlib.util.find_spec("trio")
        print("found")
        import trio
    """
    assert program(code) == ["found", *TRIO_FIRST]


@pytest.mark.parametrize("first", ["trio", "trio_uring"])
def test_a_finder_before_ours_with_one_loader_for_all(program: Program, first: str) -> None:
    """Like pytest's, which rewrites assertions in each package that has a pytest plugin."""
    code = f"""
        import importlib.machinery, importlib.util, sys

        class One:
            def find_spec(self, name, path=None, target=None):
                if name not in ("trio", "trio_uring", "trio_uring_helper"):
                    return None
                spec = importlib.machinery.PathFinder.find_spec(name, path)
                return importlib.util.spec_from_file_location(
                    name, spec.origin, loader=self,
                    submodule_search_locations=spec.submodule_search_locations,
                )
            def create_module(self, spec):
                return None
            def exec_module(self, module):
                exec(open(module.__file__).read(), vars(module))

        sys.meta_path.insert(0, One())
        import unrelated  # any import puts ours in front again
        importlib.util.find_spec("{first}")
        import trio_uring_helper  # by the same loader, before the one that is watched
        import {first}
        assert type({first}.__loader__) is One
        assert not vars({first}.__loader__)
    """
    assert program(code) == (TRIO_FIRST if first == "trio" else TRIO_URING_FIRST)


def test_an_import_of_trio_that_fails_first(program: Program) -> None:
    program.write("trio_uring_helper.py", "import os; os.environ['HAS_HELPER']")
    code = """
        import os
        try:
            import trio
        except KeyError:
            print("failed")
        os.environ["HAS_HELPER"] = ""
        import trio
    """
    assert program(code) == ["trio begins", "failed", *TRIO_FIRST]


def test_no_trio(program: Program) -> None:
    code = """
        import sys
        sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ == "Finder"]
        try:
            import trio
        except ModuleNotFoundError:
            print("none")
    """
    assert program(code) == ["none"]


def test_switched_off_by_the_program(program: Program) -> None:
    code = "import os; os.environ['TRIO_URING'] = 'off'; import trio"
    assert program(code) == ["trio begins", "trio ends"]


@pytest.mark.parametrize("failure", ["install = None", "raise ValueError('wrong')"])
def test_a_failure_is_a_warning(program: Program, failure: str) -> None:
    program.write("trio_uring/__init__.py", failure)
    result = program.start("import trio; import trio; print(trio.value)")
    assert result.stdout.splitlines() == ["trio begins", "trio ends", "1"]
    assert result.stderr.count("RuntimeWarning: TRIO_URING=1 has no effect: ") == 1


def test_a_failure_where_the_ring_is_required_is_an_error(program: Program) -> None:
    program.write("trio_uring/__init__.py", "raise ValueError('wrong')")
    code = """
        for attempt in range(2):
            try:
                import trio
            except ValueError as exc:
                print(exc)
    """
    expected = ["trio begins", "trio ends", "wrong"]
    assert program(code, "require") == expected * 2
    assert program(code, "false") == expected * 2  # a word that install() refuses


@pytest.mark.parametrize("setting", ["false", "requird"])
def test_an_unknown_word_is_an_error_when_trio_is_imported(tmp_path: Path, setting: str) -> None:
    program = Program(tmp_path)  # with the real packages
    result = program.start("import trio", setting)
    assert result.returncode == 1
    expected = f"ValueError: TRIO_URING is '{setting}': it takes 1, on, require, 0 or off"
    assert result.stderr.splitlines()[-1] == expected
    assert program("print('no trio here')", setting) == ["no trio here"]


def test_an_odd_loader_is_a_warning(program: Program) -> None:
    code = """
        import importlib.machinery, sys

        class Odd(importlib.machinery.SourceFileLoader):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name == "trio":
                    return importlib.machinery.ModuleSpec("trio", cls)
            @classmethod
            def create_module(cls, spec):
                return None
            @classmethod
            def exec_module(cls, module):
                print("executed")

        sys.meta_path.insert(0, Odd)
        import unrelated
        import trio
    """
    result = program.start(code)
    assert result.stdout.splitlines() == ["executed"]
    assert "RuntimeWarning: TRIO_URING has no effect: " in result.stderr


def test_a_broken_installation_does_not_keep_python_from_starting(program: Program) -> None:
    program.write("trio_uring/_autostart.py", "raise ValueError('wrong')")
    result = program.start("print('started')", PYTHONPATH=str(program.directory))
    assert (result.returncode, result.stdout) == (0, "started\n")
    assert "ValueError: wrong" in result.stderr


def test_a_package_that_is_gone_is_no_error(program: Program) -> None:
    code = f"""
        import sys
        sys.path.clear()
        exec(open({str(PTH)!r}).read())
        print("done")
    """
    assert program(code) == ["done"]


def test_spawned_processes_start_too(program: Program) -> None:
    program.write("child.py", "def main():\n    import trio\n")
    code = """
        import multiprocessing, child
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=child.main)
            process.start()
            process.join()
    """
    assert program(code) == TRIO_FIRST


def test_two_threads_at_once(program: Program) -> None:
    program.write("trio_uring_helper.py", "import time; time.sleep(0.05)")
    code = """
        import importlib, threading
        names = ["trio", "trio_uring"] * 4
        barrier = threading.Barrier(len(names))
        def load(name):
            barrier.wait()
            importlib.import_module(name)
        threads = [threading.Thread(target=load, args=(name,)) for name in names]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    lines = program(code)
    assert lines.count("install") == 1
    assert lines[-1] == "install"
