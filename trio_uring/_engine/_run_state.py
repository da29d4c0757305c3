"""`RunState`: the objects that the package keeps for one run.

Each object is created on first use and closed when the run ends. The state of a run with a ring is
in its I/O manager. The state of another run is in a `trio.lowlevel.RunVar`. A system task, which
Trio cancels at the end of the run, closes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import trio
from trio.lowlevel import RunVar, spawn_system_task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")


class RunResource:
    """An object that is kept for one run. The default methods do nothing and report nothing."""

    def close(self, *, drained: bool) -> None:
        """Close it, at the end of the run.

        Args:
          drained: Whether nothing is in flight any more. If False, the kernel may still access the
            memory and files of operations, and the calling thread may not be the run's.
        """

    def routes(self) -> Mapping[str, int]:
        """Return this object's part of `RingStatistics.routes`."""
        return {}

    def refused(self) -> tuple[str, ...]:
        """Return this object's part of `RingStatistics.refused`."""
        return ()


ResourceT = TypeVar("ResourceT", bound=RunResource)


class RunState:
    """The `RunResource` objects of one run, one of each class."""

    def __init__(self) -> None:
        self._resources: dict[object, RunResource] = {}

    def get(self, kind: Callable[[Unpack[Ts]], ResourceT], *args: Unpack[Ts]) -> ResourceT:
        """Return the run's object of class *kind*; on first use, create it as ``kind(*args)``."""
        resource = self._resources.get(kind)
        if resource is None:
            resource = self._resources[kind] = kind(*args)
        return resource  # type: ignore[return-value]  # typing.cast would double the call's time

    def routes(self) -> Mapping[str, int]:
        """Return how many calls took each route."""
        return {
            route: count
            for resource in self._resources.values()
            for route, count in resource.routes().items()
        }

    def refused(self) -> tuple[str, ...]:
        """Return what the run requested and did not get."""
        return tuple(
            reason for resource in self._resources.values() for reason in resource.refused()
        )

    def close(self, *, drained: bool) -> None:
        """Close every object; see `RunResource.close`."""
        for resource in self._resources.values():
            resource.close(drained=drained)


_without_ring: Final[RunVar[RunState]] = RunVar("trio_uring run state")


def run_state_without_ring() -> RunState:
    """Return the state of the current run, which has no ring."""
    try:
        return _without_ring.get()
    except LookupError:
        state = RunState()
        _without_ring.set(state)
        spawn_system_task(_close_when_run_ends, state)
        return state


async def _close_when_run_ends(state: RunState) -> None:
    try:
        await trio.sleep_forever()
    finally:
        state.close(drained=True)
