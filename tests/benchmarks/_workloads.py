"""What the benchmarks beside other systems share: workloads, options, and rounds of A B A B."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import _measure
import _report
import attrs
from _programs import ProgramFailedError, System, not_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self

    Measure = Callable[[System, int], _measure.Sample]

BASELINE = "trio"

ROUNDS = 5
SHORT_ROUNDS = 3
SHORT_SHARE = 4  # a short round is a quarter of a round


@attrs.frozen
class Workload:
    """What each system is to do.

    Attributes:
      amount: How much a round has: operations, or milliseconds if time limits it.
      needs: Modules and commands.
      systems: The names of those that can do it; all, if there are none.
      compared: What its ratios are of, which are to the *baseline*.
    """

    name: str
    title: str
    amount: int
    measure: Measure
    needs: tuple[str, ...] = ()
    baseline: str = BASELINE
    systems: tuple[str, ...] = ()
    compared: _report.Compared = "CPU"

    def missing(self) -> str | None:
        """Return what it needs and does not find."""
        return not_installed(self.needs)

    def for_smoke(self) -> Self:
        """Return a very small one of it."""
        raise NotImplementedError


# ---- The command line ----------------------------------------------------------------------


def option_parser(
    description: str, workloads: Mapping[str, Workload], systems: Mapping[str, System]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        epilog=f"Workloads: {', '.join(workloads)}. Systems: {', '.join(systems)}.",
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: all")
    parser.add_argument("--systems", default=",".join(systems), help="separated by commas")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--short", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--smoke", action="store_true", help="only try it: a few operations each")
    parser.add_argument("--list", action="store_true", help="only print the workloads' names")
    for name, metavar, text in (
        ("--markdown", "FILE", "write a table of ratios"),
        ("--json", "FILE", "write every sample"),
        ("--plot", "DIRECTORY", "write plots as SVG"),
    ):
        parser.add_argument(name, type=absolute_path, metavar=metavar, help=text)
    return parser


def absolute_path(given: str) -> Path:
    """Return the path as it is now: a benchmark may change the directory."""
    return Path(given).absolute()


def parsed_options(
    parser: argparse.ArgumentParser,
    workloads: Mapping[str, Workload],
    systems: Mapping[str, System],
) -> argparse.Namespace:
    options = parser.parse_args()
    asked = options.systems.split(",")
    if unknown := {*options.workloads} - {*workloads}:
        parser.error(f"no such workloads: {', '.join(sorted(unknown))}")
    if unknown := {*asked} - {*systems}:
        parser.error(f"no such systems: {', '.join(sorted(unknown))}")
    if BASELINE not in asked:
        parser.error(f"the ratios are to {BASELINE}, so it must be among the systems")
    return options


# ---- Measuring -----------------------------------------------------------------------------


def measure_all(
    name: str,
    options: argparse.Namespace,
    workloads: Mapping[str, Workload],
    systems: Mapping[str, System],
) -> None:
    """Measure what *options* ask for, print it, and write it where they say."""
    found = present(systems[system] for system in options.systems.split(","))
    results = _report.Results(name, [system.name for system in found], machine())
    for workload_name in options.workloads or workloads:
        workload, rounds = scaled(workloads[workload_name], options)
        those = [
            system for system in found if not workload.systems or system.name in workload.systems
        ]
        reason = workload.missing()
        if not any(system.name == workload.baseline for system in those):
            reason = f"{workload.baseline}, to which it is compared, is not measured"
        if reason:
            print(f"\n{workload.title}: left out, {reason}")
            results.left_out[workload_name] = reason
            continue
        samples = measured(workload, those, rounds, results.left_out)
        row = _report.Row(workload.title, workload.baseline, workload.compared, samples)
        results.rows[workload_name] = row
        _measure.report(workload.title, samples, workload.baseline)
        for line in row.remarks():
            print(line)
        # Whatever was measured is kept, should the rest fail.
        if options.json:
            results.write_json(options.json)
    if options.markdown:
        options.markdown.write_text(results.markdown())
    if options.plot:
        importlib.import_module("_plots").write(results, options.plot)


def measured(
    workload: Workload, systems: list[System], rounds: int, left_out: dict[str, str]
) -> dict[str, list[_measure.Sample]]:
    """Measure the systems in turns, A B A B. A peer that cannot do it is left out, with a word."""
    samples: dict[str, list[_measure.Sample]] = {system.name: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            if system.name not in samples:
                continue
            try:
                found = workload.measure(system, workload.amount)
            except ProgramFailedError as exc:
                if system.is_trio:
                    raise
                print(f"\n{workload.title}: {system.name} left out, {exc}")
                left_out[f"{workload.name}, {system.name}"] = str(exc)
                del samples[system.name]
            else:
                samples[system.name].append(found)
    return samples


def scaled(workload: Workload, options: argparse.Namespace) -> tuple[Workload, int]:
    """Return the workload as large as the options ask for, and how many rounds of it."""
    if options.smoke:
        return workload.for_smoke(), options.rounds or 1
    if options.short:
        amount = max(1, workload.amount // SHORT_SHARE)
        return attrs.evolve(workload, amount=amount), options.rounds or SHORT_ROUNDS
    return workload, options.rounds or ROUNDS


def present(systems: Iterator[System]) -> list[System]:
    """Return those that can be measured, and say why the others cannot."""
    found = []
    for system in systems:
        if reason := system.missing():
            print(f"{system.name}: left out, {reason}")
        else:
            found.append(system)
    return found


def machine() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    kernel = ".".join(os.uname().release.split(".")[:2])
    return f"Linux {kernel}, {os.cpu_count()} cores, {platform.python_implementation()} {version}"
