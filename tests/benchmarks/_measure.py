"""What the benchmarks share: interleaved rounds, medians, a table of ratios."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@attrs.frozen
class Sample:
    """One round: operations per second, and CPU microseconds per operation."""

    rate: float
    cpu_us: float


def interleave(
    variants: Mapping[str, Callable[[], Sample]], rounds: int
) -> dict[str, list[Sample]]:
    """Measure every variant *rounds* times, in turns: A B A B. The first turn is for warming up."""
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, measure in variants.items():
            sample = measure()
            if number:
                samples[name].append(sample)
    return samples


def report(title: str, samples: Mapping[str, Sequence[Sample]], baseline: str) -> None:
    """Print medians, and their ratios to *baseline*'s."""
    print(f"\n{title} (median of {len(samples[baseline])} rounds, ratios to {baseline})")
    print(f"{'':26} {'ops/s':>10} {'ratio':>7} {'CPU µs/op':>10} {'ratio':>7}")
    rate_0 = statistics.median(sample.rate for sample in samples[baseline])
    cpu_0 = statistics.median(sample.cpu_us for sample in samples[baseline])
    for name, row in samples.items():
        rate = statistics.median(sample.rate for sample in row)
        cpu = statistics.median(sample.cpu_us for sample in row)
        print(f"{name:26} {rate:10.0f} {rate / rate_0:7.2f} {cpu:10.2f} {cpu / cpu_0:7.2f}")
