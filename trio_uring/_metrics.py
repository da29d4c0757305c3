"""What `trio_uring.prometheus` and `trio_uring.opentelemetry` export, and of which runs."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

import attrs

from ._fallback import as_statistics
from ._statistics import FallbackStatistics, RingStatistics, totals
from ._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from ._fallback import PlainStatistics

    class HasStatistics(Protocol):
        """A run's I/O manager."""

        def statistics(self) -> Statistics | PlainStatistics:
            """Return the run's statistics."""
            ...


Statistics = RingStatistics | FallbackStatistics

# Another thread reads the statistics while the loop runs. If a dict changes just then, Python says
# so, and the next attempt succeeds.
_TRIES: Final = 10

# From what takes one system call to what waits for people.
SECONDS_BUCKETS: Final = tuple(
    digit * 10.0**power for power in range(-5, 1) for digit in (1, 2.5, 5)
)


@attrs.frozen
class Metric:
    """A number of each run, or several with a label.

    Args:
      name: Its name, in the words that it is exported under.
      kind: A counter only grows.
      description: What it counts.
      values: Returns the numbers by label; by an empty one if there is no label.
      label: The name of the label.
    """

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    values: Callable[[Statistics], Mapping[str, float]]
    label: str = ""


def _counter(name: str, description: str, values: Callable[[Statistics], float]) -> Metric:
    return Metric(name, "counter", description, lambda found: {"": values(found)})


def _gauge(name: str, description: str, values: Callable[[Statistics], float]) -> Metric:
    return Metric(name, "gauge", description, lambda found: {"": values(found)})


RUN_METRICS: Final = (
    Metric(
        "run", "gauge", "1 for a run with this engine", lambda found: {found.engine: 1}, "engine"
    ),
    Metric(
        "operations", "counter", "Completed operations", lambda found: found.completed, "opcode"
    ),
    _gauge("operations_in_flight", "Operations in flight", lambda found: found.in_flight),
    _counter("operations_cancelled", "Cancelled operations", lambda found: found.cancelled),
    _counter("submitted", "Submission queue entries that the kernel took", lambda s: s.submitted),
    _counter("enters", "Calls of io_uring_enter", lambda found: found.enters),
    _counter("buffers_ran_out", "Receives without a free buffer", lambda s: s.buffers_ran_out),
    Metric("file_calls", "counter", "Calls on files and paths", lambda s: s.routes, "route"),
    _gauge("tasks_waiting_read", "Tasks that wait to read", lambda s: s.tasks_waiting_read),
    _gauge("tasks_waiting_write", "Tasks that wait to write", lambda s: s.tasks_waiting_write),
    _gauge("tasks_waiting_for_limit", "Tasks in line for files", lambda s: s.waiting_for_limit),
)


def threads_of(pid: int | Literal["self"]) -> tuple[int, int]:
    """Return how many threads process *pid* has itself, and how many kernel workers."""
    threads = workers = 0
    for path in Path(f"/proc/{pid}/task").glob("*/comm"):
        try:
            is_worker = path.read_text().startswith("iou-")
        except OSError:  # it has ended
            continue
        workers += is_worker
        threads += not is_worker
    return threads, workers


@attrs.frozen
class ProcessMetric:
    """A number of the process."""

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    value: Callable[[], float]


PROCESS_METRICS: Final = (
    ProcessMetric(
        "fallback_runs", "counter", "Runs that got no ring", lambda: totals.fallback_runs
    ),
    ProcessMetric("kernel_workers", "gauge", "Kernel workers", lambda: threads_of("self")[1]),
)


class ExportedRuns:
    """The runs whose statistics one exporter exports."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, HasStatistics] = {}

    @contextmanager
    def exporting(self, name: str) -> Generator[None]:
        """Export the current run under *name*.

        Raises:
          RuntimeError: outside a run, or another run is exported under this name.
        """
        manager = current_io_manager()
        with self._lock:
            if name in self._runs:
                raise RuntimeError(f"a run is exported as {name!r} already: give this one a name")
            self._runs[name] = manager  # type: ignore[assignment]
        try:
            yield
        finally:
            with self._lock:
                del self._runs[name]

    def read(self) -> dict[str, Statistics]:
        """Return the statistics of each run. It may be called in any thread."""
        with self._lock:
            runs = dict(self._runs)
        return {name: _read(manager) for name, manager in runs.items()}


def _read(manager: HasStatistics) -> Statistics:
    for _ in range(_TRIES - 1):
        try:
            return as_statistics(manager.statistics())
        except RuntimeError:
            continue
    return as_statistics(manager.statistics())
