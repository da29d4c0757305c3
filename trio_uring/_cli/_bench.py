"""``trio-uring bench``: a short comparison of event loops on the user's own machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import attrs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trio_uring._config import RingConfig
from trio_uring._errors import RingUnavailableError
from trio_uring._kernel import why_no_native
from trio_uring._run import probe

from ._extra import import_extra
from ._workloads import WORKLOADS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

# What everything is compared with.
_BASELINE: Final = "Trio"
# A child that has not ended by then hangs.
_CHILD_SECONDS: Final = 60.0


@attrs.frozen
class Variant:
    """An event loop to measure: its name for people, and for `_workloads`."""

    name: str
    loop: str
    engine: str = ""


@attrs.frozen
class Spread:
    """The median of some rounds, and the least and the greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of *values*."""
        return cls(statistics.median(values), min(values), max(values))


@attrs.frozen
class Row:
    """The results of one variant. The ratios are to the baseline in the same round."""

    name: str
    rate: Spread
    rate_ratio: Spread
    cpu_us: Spread
    cpu_ratio: Spread


def main(options: argparse.Namespace) -> int:
    """Measure, and print a table for each workload."""
    console = Console()
    plot = import_extra("._plot") if options.plot else None
    if plot is not None:
        plot.check_path(options.plot)
    variants, notes = _variants()
    rows = {
        workload: compare(samples)
        for workload, samples in _measure(variants, options.rounds, options.seconds).items()
    }
    if options.json:
        print(json.dumps({name: [*map(attrs.asdict, each)] for name, each in rows.items()}))
    else:
        console.print(_machine(), highlight=False)
        for workload, each in rows.items():
            console.print(_table(workload, each, options.rounds))
        for note in notes:
            console.print(note, highlight=False)
    if plot is not None:
        plot.draw(options.plot, rows, _machine())
        print(f"plotted to {options.plot}", file=sys.stderr)
    return 0


def _variants() -> tuple[list[Variant], list[str]]:
    """Return what can be measured here, and why the rest cannot."""
    notes: list[str] = []
    ours: list[Variant] = []
    try:
        probe(RingConfig())
    except RingUnavailableError as exc:
        notes.append(f"trio_uring was not measured: {exc.reason}")
    else:
        if why_no_native:
            notes.append(f"The native engine was not measured: {why_no_native}")
        else:
            ours.append(Variant("trio_uring", "trio_uring", "native"))
        ours.append(Variant("trio_uring Python", "trio_uring", "python"))
    others = [Variant("Trio", "trio"), Variant("asyncio", "asyncio")]
    if find_spec("uvloop") is not None:
        others.append(Variant("uvloop", "uvloop"))
    else:
        notes.append("uvloop was not measured: install it with pip install uvloop")
    return ours + others, notes


def _measure(
    variants: Sequence[Variant], rounds: int, seconds: float
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Return the samples of each workload and variant. Variants alternate: A B C A B C."""
    samples: dict[str, dict[str, list[dict[str, float]]]]
    samples = {workload: defaultdict(list) for workload in WORKLOADS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(WORKLOADS) * rounds * len(variants))
        for workload in WORKLOADS:
            for _ in range(rounds):
                for variant in variants:
                    progress.update(bar, description=f"{workload}: {variant.name}")
                    samples[workload][variant.name].append(_sample(variant, workload, seconds))
                    progress.advance(bar)
    return samples


def _sample(variant: Variant, workload: str, seconds: float) -> dict[str, float]:
    """Measure in a process of its own, so that no variant finds what another one left."""
    inherited = {name: value for name, value in os.environ.items() if name[:10] != "TRIO_URING"}
    command = [sys.executable, "-m", "trio_uring._cli._workloads", workload, variant.loop]
    result = subprocess.run(
        [*command, str(seconds)],
        env={**inherited, "TRIO_URING_ENGINE": variant.engine},
        stdout=subprocess.PIPE,
        text=True,
        check=True,  # what it says is on our standard error
        timeout=_CHILD_SECONDS + seconds,
    )
    sample: dict[str, float] = json.loads(result.stdout)
    return sample


def compare(samples: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Return the row of each variant.

    A machine has slow minutes, so a ratio is one of two samples of one round.
    """
    baseline = samples[_BASELINE]
    return [
        Row(
            name,
            *(
                spread
                for key in ("rate", "cpu_us")
                for spread in (
                    Spread.of([one[key] for one in own]),
                    Spread.of([a[key] / b[key] for a, b in zip(own, baseline, strict=True)]),
                )
            ),
        )
        for name, own in samples.items()
    ]


def _table(workload: str, rows: Sequence[Row], rounds: int) -> Table:
    table = Table(
        title=WORKLOADS[workload],
        title_justify="left",
        caption=(
            f"medians of {rounds} rounds, and the extremes of the ratios to {_BASELINE}"
            if rounds > 1
            else f"one round, and ratios to {_BASELINE}: with more rounds, medians and extremes"
        ),
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("ops/s", "ratio", "extremes", "CPU µs", "ratio", "extremes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.rate.median:,.0f}",
            *_ratio(row.rate_ratio),
            f"{row.cpu_us.median:.1f}",
            *_ratio(row.cpu_ratio),
        )
    return table


def _ratio(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.2f}", f"{spread.low:.2f}-{spread.high:.2f}"


def _machine() -> str:
    return (
        f"Linux {platform.release()}, {os.cpu_count()} CPUs, {platform.machine()}; "
        f"{platform.python_implementation()} {platform.python_version()}, Trio {version('trio')}"
    )
