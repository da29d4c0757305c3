"""``python -m trio_uring``, or ``trio-uring``: run an unmodified program on io_uring, and tools.

    trio-uring program.py [arguments]
    trio-uring -m package [arguments]
    trio-uring -c code [arguments]
    trio-uring doctor [--json]
    trio-uring bench [--plot FILE]
    trio-uring dump PID [--json]
    trio-uring top PID [--interval SECONDS]

The program's Trio runs get a ring. So do those of the Python processes that it starts, because the
launcher sets ``TRIO_URING`` in the environment, which they inherit. Everything else works as
without the launcher.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from . import __version__
from ._cli import _program
from ._cli._extra import import_extra
from ._errors import RingUnavailableError
from ._run import check_required_ring, install

if TYPE_CHECKING:
    from collections.abc import Callable

# What follows the name of the command in the usage: what is run is described by hand, because
# everything after it is its own.
_USAGE: Final = """\
%(prog)s program.py [arguments]
       %(prog)s -m package [arguments]
       %(prog)s -c code [arguments]
       %(prog)s COMMAND [--help]
       %(prog)s --help | --version
"""
_DESCRIPTION: Final = "Runs an unmodified Trio or AnyIO program on io_uring, or one of our tools."

# The module of each command. Only the one that is used is imported: they need libraries that a
# program does not.
_MODULES: Final = {
    "bench": "._bench",
    "doctor": ".._doctor",
    "dump": "._dump",
    "top": "._top",
}


def main(arguments: list[str]) -> int:
    """Execute the command line. Return the exit status, unless the program sets one itself."""
    match arguments:
        case ["-m", module, *rest]:
            _launch()
            _program.run_module(module, rest)
        case ["-c", code, *rest]:
            _launch()
            _program.run_code(code, rest)
        case [program, *rest] if (
            program and not program.startswith("-") and program not in _MODULES
        ):
            _launch()
            return _program.run_program(program, rest)
        case _:
            parser = _parser()
            if mistake := _mistake_before_command(arguments):
                parser.error(mistake)
            options = parser.parse_args(arguments)
            return _printing(import_extra(_MODULES[options.command]).main, options)
    return 0


def script() -> None:
    """Execute the command line of the console script ``trio-uring``, and exit."""
    sys.exit(main(sys.argv[1:]))


def _mistake_before_command(arguments: list[str]) -> str:
    """Return what is wrong where a program or a command should stand; empty if nothing is."""
    match arguments:
        case [] | [""]:
            return "name a program, -m package, -c code, or a command"
        case ["-m" | "-c" as option]:
            return f"argument {option}: what to run must follow"
        case [option, *_] if option.startswith("-") and option not in {"-h", "--help", "--version"}:
            return (
                f"unknown option {option}: options of a program or a command follow its name, and "
                "those of Python itself come before -m trio_uring"
            )
        case _:
            return ""


def _parser() -> argparse.ArgumentParser:
    name = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog="python -m trio_uring" if name == "__main__.py" else name,
        usage=_USAGE,
        description=_DESCRIPTION,
    )
    parser.add_argument("--version", action="version", version=f"trio-uring {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog=parser.prog
    )

    doctor = commands.add_parser("doctor", help="say what this system offers, and what to do")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")

    dump = commands.add_parser("dump", help="show the tasks of a running program")
    dump.add_argument("pid", type=int, metavar="PID", help="started with TRIO_URING_INSPECT=1")
    dump.add_argument("--json", action="store_true", help="print all that is known as JSON")

    bench = commands.add_parser("bench", help="compare event loops on this machine, for a minute")
    bench.add_argument(
        "--rounds", type=_one_or_more, default=5, metavar="N", help="measure N times: 5"
    )
    bench.add_argument(
        "--seconds", type=_positive, default=0.5, metavar="SECONDS", help="for each: 0.5"
    )
    bench.add_argument("--plot", metavar="FILE", help="plot to FILE: .svg, .png or .pdf")
    bench.add_argument("--json", action="store_true", help="print the results as JSON")

    top = commands.add_parser("top", help="watch a running program")
    top.add_argument("pid", type=int, metavar="PID", help="started with TRIO_URING_INSPECT=1")
    top.add_argument(
        "--interval", type=_positive, default=1.0, metavar="SECONDS", help="between two looks: 1"
    )
    top.add_argument("--samples", type=_one_or_more, metavar="N", help="look N times, and end")
    return parser


def _positive(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError("it must be more than 0")
    return seconds


def _one_or_more(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def _printing(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run *command*, which prints. Its reader, such as head, may have enough before the end."""
    try:
        status = command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # the user has seen enough
        return 128 + signal.SIGINT
    return status


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


if __name__ == "__main__":
    script()
