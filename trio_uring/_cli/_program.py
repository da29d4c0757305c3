"""Runs a program as its `__main__`, as ``python`` does."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
from importlib.machinery import BuiltinImporter, SourceFileLoader
from pathlib import Path
from pkgutil import get_importer
from types import ModuleType

# Why not runpy.run_path and runpy.run_module
# --------------------------------------------
#
# Facts. They restore our own __main__ module when the program's last line has run, before its
# threads and atexit functions end. run_path sets sys.argv[0] and __file__ to the same value, while
# Python makes only one of them absolute. A missing module gives a traceback.
#
# What does this mean for us? With runpy, the program's __main__ would differ from that under plain
# Python, and objects that it pickles could not be loaded. So the program gets a __main__ module of
# its own, which stays.


def run_module(module: str, arguments: list[str]) -> None:
    """Do what ``python -m module`` does."""
    sys.argv = ["-m", *arguments]
    _set_first_path(str(Path.cwd()))
    _set_main_module()
    _run_as_main(module)


def run_code(code: str, arguments: list[str]) -> None:
    """Do what ``python -c code`` does."""
    sys.argv = ["-c", *arguments]
    _set_first_path("")
    main_module = _set_main_module()
    main_module.__loader__ = BuiltinImporter  # as Python itself does
    exec(compile(code, "<string>", "exec", dont_inherit=True), vars(main_module))


def run_program(program: str, arguments: list[str]) -> int:
    """Do what ``python program`` does, for a file, or a directory or zip file with __main__.py."""
    sys.argv = [program, *arguments]
    path = os.path.join(Path.cwd(), program)  # noqa: PTH118 (as Python does: not normalised)
    if get_importer(path) is not None:
        _set_first_path(path, always=True)
        _set_main_module()
        _run_as_main("__main__", alter_argv=False)
        return 0
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as exc:
        where = f"[Errno {exc.errno}] {exc.strerror}"
        print(f"{sys.executable}: can't open file {path!r}: {where}", file=sys.stderr)
        return 2
    _set_first_path(str(Path(path).resolve().parent))
    main_module = _set_main_module()
    main_module.__file__ = path
    main_module.__loader__ = SourceFileLoader("__main__", path)
    vars(main_module)["__cached__"] = None
    exec(compile(source, path, "exec", dont_inherit=True), vars(main_module))
    return 0


def _run_as_main(module: str, *, alter_argv: bool = True) -> None:
    # The interpreter calls this private function by its name too, for ``python -m``.
    runpy._run_module_as_main(module, alter_argv)  # type: ignore[attr-defined]  # noqa: SLF001


def _set_main_module() -> ModuleType:
    main_module = ModuleType("__main__")
    vars(main_module)["__builtins__"] = builtins  # the module, where exec would set its dict
    sys.modules["__main__"] = main_module
    return main_module


def _set_first_path(directory: str, *, always: bool = False) -> None:
    """Replace what Python put first in sys.path: our current directory, or our script's."""
    if not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):  # since 3.11
        sys.path[0] = directory
    elif always:
        sys.path.insert(0, directory)
