"""Helpers of the benchmarks: interleaved rounds, medians, a table of ratios."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


@attrs.frozen
class Sample:
    """One round: operations per second, CPU microseconds per operation, and what else counts."""

    rate: float
    cpu_us: float
    other: Mapping[str, float] = {}


@attrs.frozen
class Spread:
    """The median of some rounds, and the least and the greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


def interleave(
    variants: Mapping[str, Callable[[], Sample]], rounds: int
) -> dict[str, list[Sample]]:
    """Measure every variant *rounds* times, alternating: A B A B. The first round is a warm-up."""
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, measure in variants.items():
            sample = measure()
            if number:
                samples[name].append(sample)
    return samples


def rate_ratio(row: Sequence[Sample], baseline: Sequence[Sample]) -> Spread:
    """Compare rates. A machine has slow minutes, so a ratio is one of two runs of one round."""
    return Spread.of(a.rate / b.rate for a, b in zip(row, baseline, strict=True))


def cpu_ratio(row: Sequence[Sample], baseline: Sequence[Sample]) -> Spread:
    """Compare CPU times, again inside each round."""
    return Spread.of(a.cpu_us / b.cpu_us for a, b in zip(row, baseline, strict=True))


def report(title: str, samples: Mapping[str, Sequence[Sample]], baseline: str) -> None:
    """Print medians, and their ratios to *baseline*'s; for CPU time, how far the rounds differ."""
    print(f"\n{title} (median of {len(samples[baseline])} rounds, ratios to {baseline})")
    print(f"{'':26} {'ops/s':>10} {'ratio':>7} {'CPU µs/op':>10} {'ratio':>7}  min–max")
    for name, row in samples.items():
        rate = statistics.median(sample.rate for sample in row)
        cpu = statistics.median(sample.cpu_us for sample in row)
        ratio = cpu_ratio(row, samples[baseline])
        print(
            f"{name:26} {rate:10.0f} {rate_ratio(row, samples[baseline]).median:7.2f} "
            f"{cpu:10.2f} {ratio.median:7.2f}  {ratio.low:.2f}–{ratio.high:.2f}"
        )
