"""Plots the results of ``trio-uring bench``, by matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure

from ._workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from ._bench import Row, Spread

_SUFFIXES: Final = (".svg", ".png", ".pdf")
_OURS: Final = "#1f77b4"
_OTHERS: Final = "#999999"


def check_path(path: str) -> None:
    """Exit with a sentence if *path* is none that can be plotted to."""
    if Path(path).suffix not in _SUFFIXES:
        sys.exit(f"trio-uring: --plot {path}: the name must end with {', '.join(_SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        sys.exit(f"trio-uring: --plot {path}: there is no such directory")


def draw(path: str, rows: Mapping[str, Sequence[Row]], machine: str) -> None:
    """Draw for each workload a panel of rates and one of CPU times, with a bar for each variant."""
    figure = Figure(figsize=(11, 2.2 * len(rows) + 0.8), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (rates, times), (workload, each) in zip(panels, rows.items(), strict=True):
        names = [row.name for row in each]
        _draw_bars(rates, names, [row.rate_ratio for row in each], [_rate(row) for row in each])
        _draw_bars(times, names, [row.cpu_ratio for row in each], [_time(row) for row in each])
        rates.set_title(f"{WORKLOADS[workload]}\nrate, Trio = 1", loc="left", fontsize="medium")
        times.set_title("CPU time of each, Trio = 1", loc="left", fontsize="medium")
        times.set_yticks([])
    figure.supxlabel(machine, fontsize="small")
    figure.savefig(path)


def _draw_bars(axes: Axes, names: list[str], spreads: list[Spread], labels: list[str]) -> None:
    errors = [
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    ]
    colors = [_OURS if name.startswith("trio_uring") else _OTHERS for name in names]
    bars = axes.barh(names, [spread.median for spread in spreads], xerr=errors, color=colors)
    axes.bar_label(bars, labels, padding=6)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _rate(row: Row) -> str:
    return f"{row.rate.median:,.0f}/s"


def _time(row: Row) -> str:
    return f"{row.cpu_us.median:.1f} µs"
