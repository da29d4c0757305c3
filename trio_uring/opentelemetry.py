"""Exports the statistics of runs by OpenTelemetry: ``pip install 'trio-uring[opentelemetry]'``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from opentelemetry.metrics import Meter, Observation, get_meter

from ._metrics import PROCESS_METRICS, RUN_METRICS, SECONDS_BUCKETS, ExportedRuns
from ._operation_times import OperationTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from opentelemetry.metrics import CallbackOptions, Histogram

    from ._metrics import Metric, ProcessMetric

    Callback = Callable[[CallbackOptions], Iterable[Observation]]

__all__ = ["export_statistics", "operation_times"]

_PREFIX: Final = "trio_uring."
_exported: Final[WeakKeyDictionary[Meter, ExportedRuns]] = WeakKeyDictionary()
_histograms: Final[WeakKeyDictionary[Meter, Histogram]] = WeakKeyDictionary()


@contextmanager
def export_statistics(name: str = "main", *, meter: Meter | None = None) -> Generator[None]:
    """Export the statistics of the current run by OpenTelemetry, as long as the block lasts.

    They are read when they are exported, in the thread that does so. Nothing is counted for this
    in between.

    Args:
      name: The attribute ``run`` of the metrics, to tell the runs of a process apart.
      meter: Where to export them; None for the global meter ``trio_uring``.

    Raises:
      RuntimeError: outside a run, or another run is exported under this name.
    """
    meter = meter or get_meter("trio_uring")
    runs = _exported.get(meter)
    if runs is None:  # instruments cannot be removed, so they are made once
        runs = _exported[meter] = ExportedRuns()
        for metric in RUN_METRICS:
            _observe(meter, metric, _of_runs(runs, metric))
        for of_process in PROCESS_METRICS:
            _observe(meter, of_process, _of_process(of_process))
    with runs.exporting(name):
        yield


def operation_times(*, meter: Meter | None = None) -> OperationTimes:
    """Return an instrument that exports how long operations take, as a histogram.

    The histogram is ``trio_uring.operation.duration``, in seconds, with the attribute ``opcode``.
    See `trio_uring.lowlevel.OperationTimes` for what the instrument measures and costs.

    Args:
      meter: Where to export it; None for the global meter ``trio_uring``.
    """
    meter = meter or get_meter("trio_uring")
    histogram = _histograms.get(meter)
    if histogram is None:
        histogram = _histograms[meter] = meter.create_histogram(
            f"{_PREFIX}operation.duration",
            unit="s",
            description="How long tasks wait for operations on the ring",
            explicit_bucket_boundaries_advisory=SECONDS_BUCKETS,
        )

    def observe(opcode: str, seconds: float) -> None:
        histogram.record(seconds, {"opcode": opcode})

    return OperationTimes(observe)


def _observe(meter: Meter, metric: Metric | ProcessMetric, callback: Callback) -> None:
    create = (
        meter.create_observable_counter
        if metric.kind == "counter"
        else meter.create_observable_gauge
    )
    create(f"{_PREFIX}{metric.name}", callbacks=[callback], description=metric.description)


def _of_runs(runs: ExportedRuns, metric: Metric) -> Callback:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        for name, statistics in runs.read().items():
            for label, value in metric.values(statistics).items():
                attributes = {"run": name, metric.label: label} if metric.label else {"run": name}
                yield Observation(value, attributes)

    return observe


def _of_process(metric: ProcessMetric) -> Callback:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        yield Observation(metric.value())

    return observe
