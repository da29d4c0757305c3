"""What a benchmark beside other systems found, as JSON and as Markdown tables."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Literal

import _measure
import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    Samples = Mapping[str, Sequence[_measure.Sample]]

# Ratios of CPU time, ratios of rates, or no ratios: how long the loop held up ticks.
Compared = Literal["CPU", "rate", "ticks"]


@attrs.frozen
class Row:
    """The samples of a workload, by system."""

    title: str
    baseline: str
    compared: Compared
    samples: Samples

    def ratios(self) -> dict[str, _measure.Spread]:
        """Return each system's ratio to the baseline, of its CPU time or its rate."""
        ratio = _measure.rate_ratio if self.compared == "rate" else _measure.cpu_ratio
        return {name: ratio(row, self.samples[self.baseline]) for name, row in self.samples.items()}

    def baseline_cell(self) -> str:
        row = self.samples[self.baseline]
        if self.compared == "rate":
            return f"{statistics.median(sample.rate for sample in row):,.0f}"
        return f"{statistics.median(sample.cpu_us for sample in row):,.1f}"

    def shares(self) -> dict[str, tuple[float, float]]:
        """Return the least and the greatest that a connection got, if the workload counts it.

        Where the mean is 1, and in the worst of the rounds.
        """
        return {
            name: (
                min(sample.other["least"] for sample in row),
                max(sample.other["greatest"] for sample in row),
            )
            for name, row in self.samples.items()
            if all("least" in sample.other for sample in row)
        }

    def ticks(self) -> dict[str, tuple[_measure.Spread, _measure.Spread]]:
        """Return milliseconds, each the p99 of a round: held up by the loop itself, and in all."""
        if self.compared != "ticks":
            return {}
        return {
            name: (
                _measure.Spread.of(sample.cpu_us / 1e3 for sample in row),
                _measure.Spread.of(sample.other["late_p99_ms"] for sample in row),
            )
            for name, row in self.samples.items()
        }

    def remarks(self) -> Iterator[str]:
        for system, (least, greatest) in self.shares().items():
            yield f"{system:26} a connection was served {least:.2f} to {greatest:.2f} of the mean"
        for system, (cpu, late) in self.ticks().items():
            yield (
                f"{system:26} the loop held up a tick for {cpu.median:.2f} ms (at most "
                f"{cpu.high:.2f}), which was {late.median:.2f} ms late (p99 of each round)"
            )


@attrs.define
class Results:
    """The rows of all workloads."""

    name: str
    systems: list[str]
    machine: str
    rows: dict[str, Row] = attrs.Factory(dict)
    left_out: dict[str, str] = attrs.Factory(dict)

    def write_json(self, path: Path) -> None:
        found = {
            "machine": self.machine,
            "left_out": self.left_out,
            "workloads": {
                name: {
                    "title": row.title,
                    "baseline": row.baseline,
                    "samples": {
                        system: [attrs.asdict(sample) for sample in samples]
                        for system, samples in row.samples.items()
                    },
                }
                for name, row in self.rows.items()
            },
        }
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def groups(self) -> dict[tuple[Compared, str], dict[str, Row]]:
        """Group the rows whose ratios are of the same kind, by that and by their baseline."""
        groups: dict[tuple[Compared, str], dict[str, Row]] = {}
        for name, row in self.rows.items():
            if row.compared != "ticks":
                groups.setdefault((row.compared, row.baseline), {})[name] = row
        return groups

    def systems_of(self, rows: Mapping[str, Row]) -> list[str]:
        """Return the systems that are in any of the rows."""
        return [
            system for system in self.systems if any(system in row.samples for row in rows.values())
        ]

    def markdown(self) -> str:
        """Return tables: ratios with the least and the greatest, and what else was counted."""
        tables = [self._ratios(*key, rows) for key, rows in self.groups().items()]
        if shares := {name: row for name, row in self.rows.items() if row.shares()}:
            cells = {
                name: {
                    system: f"{least:.2f}–{greatest:.2f}"
                    for system, (least, greatest) in row.shares().items()
                }
                for name, row in shares.items()
            }
            tables.append(self._absolute("Least and most served, mean 1", shares, cells))
        if ticks := {name: row for name, row in self.rows.items() if row.ticks()}:
            cells = {
                name: {system: f"{cpu.median:.2f}" for system, (cpu, _late) in row.ticks().items()}
                for name, row in ticks.items()
            }
            tables.append(self._absolute("How long the loop held up a tick, ms, p99", ticks, cells))
        return "\n".join([*("\n".join([*lines, ""]) for lines in tables), f"{self.machine}.", ""])

    def _ratios(self, compared: Compared, baseline: str, rows: Mapping[str, Row]) -> list[str]:
        others = [system for system in self.systems_of(rows) if system != baseline]
        heading = f"Rate | {baseline}, per second"
        if compared == "CPU":
            heading = f"CPU per operation | {baseline}, µs"
        lines = [
            f"| {heading} | {' | '.join(others)} |",
            f"|---{'|---:' * (len(others) + 1)}|",
        ]
        for row in rows.values():
            ratios = row.ratios()
            cells = [
                f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "–"
                for ratio in map(ratios.get, others)
            ]
            lines.append(f"| {row.title} | {row.baseline_cell()} | {' | '.join(cells)} |")
        return lines

    def _absolute(
        self, heading: str, rows: Mapping[str, Row], cells: Mapping[str, Mapping[str, str]]
    ) -> list[str]:
        systems = self.systems_of(rows)
        return [
            f"| {heading} | {' | '.join(systems)} |",
            f"|---{'|---:' * len(systems)}|",
            *(
                f"| {row.title} | {' | '.join(cells[name].get(s, '–') for s in systems)} |"
                for name, row in rows.items()
            ),
        ]
