"""Exports the statistics of runs to Prometheus: ``pip install 'trio-uring[prometheus]'``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ._metrics import PROCESS_METRICS, RUN_METRICS, SECONDS_BUCKETS, ExportedRuns
from ._operation_times import OperationTimes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from ._metrics import Metric, ProcessMetric, Statistics

__all__ = ["export_statistics", "operation_times"]

_PREFIX: Final = "trio_uring_"
_collectors: Final[WeakKeyDictionary[CollectorRegistry, _Collector]] = WeakKeyDictionary()
_histograms: Final[WeakKeyDictionary[CollectorRegistry, Histogram]] = WeakKeyDictionary()


@contextmanager
def export_statistics(
    name: str = "main", *, registry: CollectorRegistry = REGISTRY
) -> Generator[None]:
    """Export the statistics of the current run to Prometheus, as long as the block lasts.

    They are read when Prometheus asks for them, in whatever thread that is. Nothing is counted for
    this while nobody asks.

    Args:
      name: The label ``run`` of the metrics, to tell the runs of a process apart.
      registry: Where to export them.

    Raises:
      RuntimeError: outside a run, or another run is exported under this name.
    """
    collector = _collectors.get(registry)
    if collector is None:
        collector = _collectors[registry] = _Collector()
        registry.register(collector)
    with collector.runs.exporting(name):
        yield


def operation_times(*, registry: CollectorRegistry = REGISTRY) -> OperationTimes:
    """Return an instrument that exports how long operations take, as a histogram.

    The histogram is ``trio_uring_operation_seconds``, with the label ``opcode``. See
    `trio_uring.lowlevel.OperationTimes` for what the instrument measures and costs.

    Args:
      registry: Where to export it.
    """
    histogram = _histograms.get(registry)
    if histogram is None:
        histogram = _histograms[registry] = Histogram(
            f"{_PREFIX}operation_seconds",
            "How long tasks wait for operations on the ring",
            ["opcode"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )

    def observe(opcode: str, seconds: float) -> None:
        histogram.labels(opcode).observe(seconds)

    return OperationTimes(observe)


class _Collector(Collector):
    """What Prometheus asks for the metrics."""

    def __init__(self) -> None:
        self.runs = ExportedRuns()

    def describe(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Return the metrics without their numbers, so that a name cannot be used twice."""
        return self._families({})

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Return the metrics of all runs."""
        return self._families(self.runs.read())

    def _families(
        self, runs: dict[str, Statistics]
    ) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        for metric in RUN_METRICS:
            label = [metric.label] if metric.label else []
            family = _family(metric, ["run", *label])
            for name, statistics in runs.items():
                for value_label, value in metric.values(statistics).items():
                    family.add_metric([name, value_label] if label else [name], value)
            yield family
        for of_process in PROCESS_METRICS:
            family = _family(of_process, [])
            family.add_metric([], of_process.value())
            yield family


def _family(
    metric: Metric | ProcessMetric, labels: list[str]
) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(f"{_PREFIX}{metric.name}", metric.description, labels=labels)
