"""The statistics of runs, exported to Prometheus and by OpenTelemetry."""

from __future__ import annotations

import gc
import os
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

if not os.environ.get("CI"):
    pytest.importorskip("prometheus_client", reason="the extra `prometheus` is not installed")
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest

import trio_uring
from trio_uring import RingConfig, opentelemetry, prometheus
from trio_uring._metrics import PROCESS_METRICS, RUN_METRICS, _read
from trio_uring._trio_private import current_io_manager
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

HOUR_NS = 3600 * 10**9


# --- Prometheus -----------------------------------------------------------------------------


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"trio_uring_{name}", labels)


async def test_prometheus_gets_the_statistics_of_a_run(registry: CollectorRegistry) -> None:
    with prometheus.export_statistics(registry=registry):
        for _ in range(3):
            await perform(operations.nop())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operations.timeout(HOUR_NS))
            await wait_all_tasks_blocked()
            assert value(registry, "operations_in_flight", run="main") == 1
            nursery.cancel_scope.cancel()
        statistics = trio_uring.statistics()
        assert value(registry, "operations_total", run="main", opcode="NOP") == 3
        assert value(registry, "operations_cancelled_total", run="main") == 1
        assert value(registry, "run", run="main", engine=statistics.engine) == 1
        assert value(registry, "enters_total", run="main") == statistics.enters
        assert value(registry, "kernel_workers") == 0
        # As a server of metrics does, in another thread.
        text = (await trio.to_thread.run_sync(generate_latest, registry)).decode()
    assert 'trio_uring_operations_total{opcode="NOP",run="main"} 3.0' in text
    assert "# TYPE trio_uring_operations_in_flight gauge" in text
    assert "# TYPE trio_uring_fallback_runs_total counter" in text
    assert value(registry, "enters_total", run="main") is None


async def test_each_metric_has_its_name_once(registry: CollectorRegistry) -> None:
    with prometheus.export_statistics(registry=registry):
        names = [family.name for family in registry.collect()]
    assert len(set(names)) == len(names) == len(RUN_METRICS) + len(PROCESS_METRICS)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(prometheus._Collector())


def test_runs_have_names(registry: CollectorRegistry) -> None:
    async def main() -> None:
        with prometheus.export_statistics(registry=registry):
            with pytest.raises(RuntimeError, match="a run is exported as 'main' already"):
                prometheus.export_statistics(registry=registry).__enter__()
            await trio.to_thread.run_sync(trio.run, second)
        with prometheus.export_statistics(registry=registry):  # the name is free again
            pass

    async def second() -> None:
        with prometheus.export_statistics("second", registry=registry):
            assert value(registry, "run", run="second", engine="none") == 1
            assert value(registry, "enters_total", run="second") == 0
            assert (value(registry, "enters_total", run="main") or 0) > 0

    trio_uring.run(main, ring=RingConfig(require=True))


def test_outside_a_run_it_is_an_error(registry: CollectorRegistry) -> None:
    with pytest.raises(RuntimeError, match="has no Trio run"):
        prometheus.export_statistics(registry=registry).__enter__()


def test_a_registry_is_not_kept(registry: CollectorRegistry) -> None:
    prometheus.operation_times(registry=registry)
    with pytest.raises(RuntimeError):
        prometheus.export_statistics(registry=registry).__enter__()
    own = CollectorRegistry()
    prometheus.operation_times(registry=own)
    gone = weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None


async def test_prometheus_gets_a_histogram_of_times(registry: CollectorRegistry) -> None:
    for times in (prometheus.operation_times(registry=registry) for _ in range(2)):
        trio.lowlevel.add_instrument(times)
        await perform(operations.timeout(1_000_000))
        trio.lowlevel.remove_instrument(times)
    assert value(registry, "operation_seconds_count", opcode="TIMEOUT") == 2
    assert (value(registry, "operation_seconds_sum", opcode="TIMEOUT") or 0) >= 0.002
    assert value(registry, "operation_seconds_bucket", opcode="TIMEOUT", le="0.0005") == 0


async def test_a_dict_that_changes_while_another_thread_reads_it() -> None:
    class Changing:
        def __init__(self) -> None:
            self.left = 3

        def statistics(self) -> Any:
            self.left -= 1
            if self.left:
                raise RuntimeError("dictionary changed size during iteration")
            return current_io_manager().statistics()  # type: ignore[attr-defined]

    assert _read(Changing()).backend == "io_uring"
    always = Changing()
    always.left = -1
    with pytest.raises(RuntimeError, match="dictionary changed"):
        _read(always)


# --- OpenTelemetry --------------------------------------------------------------------------


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def meter(reader: InMemoryMetricReader) -> Meter:
    return MeterProvider(metric_readers=[reader]).get_meter("test")


def points(reader: InMemoryMetricReader) -> dict[tuple[object, ...], Any]:
    """Return the data points by the name of the metric and the attributes."""
    data = reader.get_metrics_data()
    return {
        (metric.name, *sorted((point.attributes or {}).values())): point
        for resource in (data.resource_metrics if data is not None else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }


async def test_opentelemetry_gets_the_statistics_of_a_run(
    reader: InMemoryMetricReader, meter: Meter
) -> None:
    with opentelemetry.export_statistics(meter=meter):
        for _ in range(3):
            await perform(operations.nop())
        statistics = trio_uring.statistics()
        found = await trio.to_thread.run_sync(points, reader)
        assert found["trio_uring.operations", "NOP", "main"].value == 3
        assert found["trio_uring.run", "main", statistics.engine].value == 1
        assert found["trio_uring.enters", "main"].value >= statistics.enters
        assert found["trio_uring.kernel_workers",].value == 0
    assert not [key for key in points(reader) if "main" in key]
    with opentelemetry.export_statistics("again", meter=meter):
        assert points(reader)["trio_uring.operations", "NOP", "again"].value == 3


async def test_opentelemetry_gets_a_histogram_of_times(
    reader: InMemoryMetricReader, meter: Meter
) -> None:
    for times in (opentelemetry.operation_times(meter=meter) for _ in range(2)):
        trio.lowlevel.add_instrument(times)
        await perform(operations.timeout(1_000_000))
        trio.lowlevel.remove_instrument(times)
    point = points(reader)["trio_uring.operation.duration", "TIMEOUT"]
    assert point.count == 2
    assert point.sum >= 0.002
    assert point.explicit_bounds[0] == pytest.approx(0.00001)


async def test_opentelemetry_without_an_sdk_does_nothing() -> None:
    with opentelemetry.export_statistics():
        opentelemetry.operation_times()
