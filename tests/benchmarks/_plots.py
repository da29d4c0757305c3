"""Plots of what a benchmark beside other systems found, as SVG. Only this needs matplotlib."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from _report import Results, Row
    from matplotlib.figure import Figure

GROWTH = "growth-"
# What README.md shows: a few of the socket programs, beside plain Trio and uvloop.
HEADLINES = ("echo-1", "echo-64", "echo-512", "echo-5000", "echo-16k", "storm", "anyio", "httpx-32")
HEADLINE_SYSTEMS = ("trio_uring", "uvloop")
RATIO_MAX = 2.0  # shown; what is beyond is cut, and its number stands beside

# The same results give the same file, and its text stays text.
mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trio_uring", "font.size": 9})


def write(results: Results, directory: Path) -> None:
    """Write a plot of the ratios to each baseline, of headlines, and of growing connections."""
    directory.mkdir(parents=True, exist_ok=True)
    growing = {name: row for name, row in results.rows.items() if name.startswith(GROWTH)}
    for (compared, baseline), rows in results.groups().items():
        if others := [row for name, row in rows.items() if name not in growing]:
            suffix = "" if baseline == "trio" else f"-{baseline}"
            systems = [system for system in results.systems_of(rows) if system != baseline]
            figure = ratios(results, others, baseline, systems, rates=compared == "rate")
            save(figure, directory / f"{results.name}{suffix}.svg")
    if headlines := [row for name, row in results.rows.items() if name in HEADLINES]:
        figure = ratios(results, headlines, "trio", HEADLINE_SYSTEMS)
        save(figure, directory / "headlines.svg")
    if growing:
        save(growth(results, growing), directory / "growth.svg")


def ratios(
    results: Results,
    rows: list[Row],
    baseline: str,
    systems: Sequence[str],
    *,
    rates: bool = False,
) -> Figure:
    """Draw a bar for each system and workload, with the least and the greatest round."""
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.2), layout="constrained")
    height = 0.8 / len(systems)
    for number, system in enumerate(systems):
        there = [place for place, row in enumerate(rows) if system in row.samples]
        found = [rows[place].ratios()[system] for place in there]
        places = [place + (number - (len(systems) - 1) / 2) * height for place in there]
        axes.barh(
            places,
            [ratio.median for ratio in found],
            height,
            color=color(results, system),
            label=system,
            xerr=[
                [ratio.median - ratio.low for ratio in found],
                [ratio.high - ratio.median for ratio in found],
            ],
            error_kw={"elinewidth": 0.6},
        )
        for place, ratio in zip(places, found, strict=True):
            if not rates and ratio.median > RATIO_MAX:
                axes.text(RATIO_MAX, place, f" {ratio.median:.1f}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    if rates:
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, RATIO_MAX)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    measured = "Rate" if rates else "CPU time per operation"
    axes.set_xlabel(f"{measured}, ratio to {baseline}. {results.machine}")
    figure.legend(loc="outside upper center", ncols=min(len(systems), 6))
    return figure


def growth(results: Results, rows: dict[str, Row]) -> Figure:
    """Draw CPU time per message over the number of connections."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for system in results.systems:
        costs = {
            int(name.removeprefix(GROWTH)): statistics.median(
                sample.cpu_us for sample in row.samples[system]
            )
            for name, row in rows.items()
            if system in row.samples
        }
        axes.plot(
            [*costs],
            [*costs.values()],
            color=color(results, system),
            marker="o",
            markersize=3,
            label=system,
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"connections, each with a message of 64 B in flight. {results.machine}")
    axes.set_ylabel("CPU µs per message")
    figure.legend(loc="outside right upper")
    return figure


def color(results: Results, system: str) -> str:
    """Return the same color for a system in all plots."""
    return f"C{results.systems.index(system)}"


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
