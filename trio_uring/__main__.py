"""``python -m trio_uring``: run an unmodified program on io_uring, or ask the doctor.

    python -m trio_uring program.py [arguments]
    python -m trio_uring -m package [arguments]
    python -m trio_uring doctor [--json]

The program's Trio runs get a ring, and so do those of the Python processes it starts: the
launcher sets ``TRIO_URING`` in the environment, which they inherit.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from ._doctor import examine
from ._errors import RingUnavailableError
from ._run import install

_USAGE = """\
usage: python -m trio_uring program.py [arguments]
       python -m trio_uring -m package [arguments]
       python -m trio_uring doctor [--json]

Runs an unmodified Trio or AnyIO program on io_uring; doctor says what this system offers.
"""


def main(arguments: list[str]) -> int:
    """Do what the command line says; returns the exit status where the program sets none."""
    match arguments:
        case ["doctor"]:
            return _doctor(as_json=False)
        case ["doctor", "--json"]:
            return _doctor(as_json=True)
        case ["-m", module, *_]:
            _launch()
            sys.argv = arguments[1:]  # runpy puts the module's file into argv[0]
            # As with python -m, the current directory comes first, where it is already.
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [program, *_] if not program.startswith("-") and program != "doctor":
            _launch()
            sys.argv = arguments
            # As with python program.py: its directory instead of ours.
            sys.path[0] = str(Path(program).resolve().parent)
            runpy.run_path(program, run_name="__main__")
        case ["-h" | "--help"]:
            print(_USAGE, end="")
        case _:
            print(_USAGE, end="", file=sys.stderr)
            return 2
    return 0


def _launch() -> None:
    """Give this process's later runs a ring, and those of the Pythons it starts."""
    if not os.environ.get("TRIO_URING"):  # "off" and "require" are the user's word
        os.environ["TRIO_URING"] = "1"
    try:
        install()
    except RingUnavailableError as exc:
        sys.exit(f"trio_uring: {exc.reason}")


def _doctor(*, as_json: bool) -> int:
    report = examine()
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print(report.as_text())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
