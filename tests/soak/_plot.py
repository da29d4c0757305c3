"""A plot of a soak: memory, fds, operations in flight and latencies of each process, over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from soak import Process

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "font.size": 8})

# A point for each second would be a megabyte of SVG.
POINTS: Final = 150


def slowest(what: str) -> Callable[[dict[str, Any]], float]:
    return lambda sample: 1000 * max(sample[what], default=0)


PANELS: Final[dict[str, Callable[[dict[str, Any]], float]]] = {
    "RSS, MiB": lambda sample: sample["rss"] / (1 << 20),
    "open fds": lambda sample: sample["fds"],
    "in flight": lambda sample: sample["in_flight"],
    "slowest echo, ms": slowest("echo"),
    "latest 1 ms timer, ms": slowest("timer"),
}


def write(processes: list[Process], path: Path) -> None:
    """Write a panel for each of PANELS, one above the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(len(PANELS), figsize=(9, 11), sharex=True, layout="constrained")
    for axes, (title, value) in zip(panels, PANELS.items(), strict=True):
        for number, process in enumerate(processes):
            samples = process.samples[:: len(process.samples) // POINTS + 1]
            axes.plot(
                [sample["seconds"] / 60 for sample in samples],
                [value(sample) for sample in samples],
                color=f"C{number % 10}",
                linestyle="-" if process.name.startswith("native") else ":",
                linewidth=0.8,
                label=process.name,
            )
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("minutes")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path)
    plt.close(figure)
