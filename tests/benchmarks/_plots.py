"""Plots of what `bench_sockets.py` found, as SVG. Only this file needs matplotlib."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

    from _report import Results
    from matplotlib.figure import Figure

GROWTH = "growth-"
RATIO_MAX = 2.0  # shown; what is beyond is cut, and its number stands beside

# The same results give the same file, and its text stays text.
mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trio_uring", "font.size": 9})


def write(results: Results, directory: Path) -> None:
    """Write a plot of all ratios, and one of how cost grows with the connections."""
    directory.mkdir(parents=True, exist_ok=True)
    growing = [name for name in results.samples if name.startswith(GROWTH)]
    if others := [name for name in results.samples if name not in growing]:
        save(ratios(results, others), directory / "sockets.svg")
    if growing:
        save(growth(results, growing), directory / "growth.svg")


def ratios(results: Results, workloads: list[str]) -> Figure:
    """Draw a bar for each system and workload, with the least and the greatest round."""
    systems = [system for system in results.systems if system != results.baseline]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(workloads) + 1.2), layout="constrained")
    height = 0.8 / len(systems)
    for number, system in enumerate(systems):
        rows = [row for row, name in enumerate(workloads) if system in results.samples[name]]
        found = [results.cpu_ratios(workloads[row])[system] for row in rows]
        places = [row + (number - (len(systems) - 1) / 2) * height for row in rows]
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
            if ratio.median > RATIO_MAX:
                axes.text(RATIO_MAX, place, f" {ratio.median:.1f}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(workloads)), [results.titles[name] for name in workloads])
    axes.set_xlim(0, RATIO_MAX)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
    axes.set_xlabel(f"CPU time per operation, ratio to {results.baseline}. {results.machine}")
    figure.legend(loc="outside upper center", ncols=len(systems))
    return figure


def growth(results: Results, workloads: list[str]) -> Figure:
    """Draw CPU time per message over the number of connections."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for system in results.systems:
        costs = {
            int(name.removeprefix(GROWTH)): statistics.median(
                sample.cpu_us for sample in results.samples[name][system]
            )
            for name in workloads
            if system in results.samples[name]
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
