"""``python -m trio_uring``: run an unmodified program on io_uring, or report what is supported.

    python -m trio_uring program.py [arguments]
    python -m trio_uring -m package [arguments]
    python -m trio_uring doctor [--json]

The program's Trio runs get a ring. So do those of the Python processes that it starts, because the
launcher sets ``TRIO_URING`` in the environment, which they inherit. Everything else works as
without the launcher.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from pkgutil import get_importer
from types import ModuleType

from ._doctor import examine
from ._errors import RingUnavailableError
from ._run import check_required_ring, install

_USAGE = """\
usage: python -m trio_uring program.py [arguments]
       python -m trio_uring -m package [arguments]
       python -m trio_uring doctor [--json]

Runs an unmodified Trio or AnyIO program on io_uring; doctor says what this system offers.
"""


def main(arguments: list[str]) -> int:
    """Execute the command line. Return the exit status, unless the program sets one itself."""
    match arguments:
        case ["doctor"]:
            return _doctor(as_json=False)
        case ["doctor", "--json"]:
            return _doctor(as_json=True)
        case ["-m", module, *rest]:
            _launch()
            _run_module(module, rest)
        case [program, *_] if program and not program.startswith("-") and program != "doctor":
            _launch()
            sys.argv = arguments
            return _run_program(program)
        case ["-h" | "--help"]:
            print(_USAGE, end="")
        case _:
            print(_USAGE, end="", file=sys.stderr)
            return 2
    return 0


def _launch() -> None:
    """Give later runs of this process, and of Python processes that it starts, a ring."""
    if not os.environ.get("TRIO_URING"):  # the user may have set "off" or "require"
        os.environ["TRIO_URING"] = "1"
    try:
        install()
        check_required_ring()
    except RingUnavailableError as exc:
        sys.exit(f"trio_uring: {exc.reason} (TRIO_URING is require)")
    except ValueError as exc:
        sys.exit(f"trio_uring: {exc}")


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


def _run_module(module: str, arguments: list[str]) -> None:
    """Do what ``python -m module`` does. The current directory is already first in sys.path."""
    sys.argv = ["-m", *arguments]
    _set_main_module()
    _run_as_main(module)


def _run_program(program: str) -> int:
    """Do what ``python program`` does, for a file, or a directory or zip file with __main__.py."""
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
    """Replace the current directory, which ``-m trio_uring`` put first in sys.path."""
    if not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):  # since 3.11
        sys.path[0] = directory
    elif always:
        sys.path.insert(0, directory)


def _doctor(*, as_json: bool) -> int:
    report = examine()
    text = json.dumps(report.as_dict(), indent=2) if as_json else report.as_text()
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has enough
        # Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
