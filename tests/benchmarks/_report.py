"""What `bench_sockets.py` found, as JSON and as a Markdown table."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING

import _measure
import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Samples = Mapping[str, Sequence[_measure.Sample]]


@attrs.define
class Results:
    """The samples of all workloads, by system."""

    systems: list[str]
    baseline: str
    machine: str
    titles: dict[str, str] = attrs.Factory(dict)
    samples: dict[str, Samples] = attrs.Factory(dict)
    left_out: dict[str, str] = attrs.Factory(dict)

    def add(self, name: str, title: str, samples: Samples) -> None:
        self.titles[name] = title
        self.samples[name] = samples

    def cpu_ratios(self, workload: str) -> dict[str, _measure.Spread]:
        """Return each system's CPU time, as a ratio to the baseline's."""
        samples = self.samples[workload]
        return {
            name: _measure.cpu_ratio(row, samples[self.baseline]) for name, row in samples.items()
        }

    def shares(self, workload: str) -> dict[str, tuple[float, float]]:
        """Return the least and the greatest that a connection got, if the workload counts it.

        Where the mean is 1, and in the worst of the rounds.
        """
        return {
            name: (
                min(sample.other["least"] for sample in row),
                max(sample.other["greatest"] for sample in row),
            )
            for name, row in self.samples[workload].items()
            if all("least" in sample.other for sample in row)
        }

    def write_json(self, path: Path) -> None:
        found = {
            "machine": self.machine,
            "baseline": self.baseline,
            "left_out": self.left_out,
            "workloads": {
                name: {
                    "title": self.titles[name],
                    "samples": {
                        system: [attrs.asdict(sample) for sample in row]
                        for system, row in samples.items()
                    },
                }
                for name, samples in self.samples.items()
            },
        }
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def markdown(self) -> str:
        """Return a table: ratios of CPU time, with the least and the greatest."""
        others = [system for system in self.systems if system != self.baseline]
        lines = [
            f"| CPU per operation | {self.baseline}, µs | {' | '.join(others)} |",
            f"|---{'|---:' * (len(others) + 1)}|",
        ]
        for name, samples in self.samples.items():
            ratios = self.cpu_ratios(name)
            cpu = statistics.median(sample.cpu_us for sample in samples[self.baseline])
            cells = [
                f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "–"
                for ratio in map(ratios.get, others)
            ]
            lines.append(f"| {self.titles[name]} | {cpu:,.1f} | {' | '.join(cells)} |")
        if counted := [name for name in self.samples if self.shares(name)]:
            lines += [
                "",
                f"| Least and most served, mean 1 | {' | '.join(self.systems)} |",
                f"|---{'|---:' * len(self.systems)}|",
            ]
        for name in counted:
            found = map(self.shares(name).get, self.systems)
            cells = [f"{share[0]:.2f}–{share[1]:.2f}" if share else "–" for share in found]
            lines.append(f"| {self.titles[name]} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", f"{self.machine}.", ""])
