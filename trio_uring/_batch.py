"""`perform_many`: many operations as one step.

There are two ways, with the same results. Operations that all end by themselves, such as reads of
files, become completion batches: the C core counts their CQEs and hands Python one completion at
the end, so Python does little for each. Where an operation can block indefinitely or be cancelled,
each one has an in-flight entry of its own.
"""

from __future__ import annotations

import errno
from collections import Counter, deque
from itertools import repeat
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Final, Generic, NoReturn, TypeVar, cast

import outcome
import trio
from trio.lowlevel import (
    Abort,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from ._engine._completion_batches import CompletionBatch
from ._engine._in_flight import InFlight
from ._engine._io_manager import UringIOManager
from ._errors import OperationCancelledError, operation_cancelled
from ._operations import Linked, Operation, OperationArray
from ._operations._arrays import array_of
from ._trio_private import current_io_manager, is_cancelled

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trio.lowlevel import RaiseCancelT

T = TypeVar("T")

# What stands alone, or is linked.
Unit = tuple[Operation[T], ...]

_BY_THE_CHAIN: Final = "an operation before it in its linked chain did not succeed"
_BY_THE_TASK: Final = "the task was cancelled before this operation did anything"


@enable_ki_protection
async def perform_many(
    operations: Iterable[Operation[T] | Linked[T]] | Linked[T] | OperationArray[T],
) -> list[outcome.Outcome[T]]:
    """Submit many operations at once, and wait until all are done.

    One step for Trio, and as a rule one system call, however many they are. They run side by
    side, in no order; what must run in order goes into a chain: `trio_uring.linked`.

    Args:
      operations: Of `trio_uring.lowlevel.operations`, each to be performed once; and chains of
        them. Or what ``read_many`` there describes all at once. Any number: beyond
        ``RingConfig.entries`` they are submitted in parts. Of those on files (the ones that
        count against ``RingConfig.max_file_operations``) so many at most are in flight: when
        they are done, the next begin. They wait in line for their tokens with all other
        operations, first come first served, and two batches never wait for each other. In a
        chain with an operation that may wait for ever, none counts.

    Returns:
      An outcome for each operation, in their order; those of a chain stand one after the
      other. An ``outcome.Error`` has what `trio_uring.lowlevel.perform` would have raised:
      `OSError`; `UnsupportedOpcodeError`; `trio.BusyResourceError` (also if two of them wait
      for the same on one fd; nothing else of a chain is then begun); `trio.ClosedResourceError`.
      And `OperationCancelledError` where the chain was broken before.

    Raises:
      ValueError: an operation occurs twice; or a chain is longer than ``RingConfig.entries``,
        or has more operations on files than ``RingConfig.max_file_operations``.
      TypeError: something else than operations.
      RuntimeError: outside a run, or the run is not on io_uring.

    A checkpoint, always. If cancelled, all that can be cancelled is, and the last is waited for.
    If any operation succeeded the outcomes are returned, so that no fd and no byte is lost: of
    what was stopped, or not begun, the outcome is an `OperationCancelledError`.
    `trio.Cancelled` is raised only if nothing succeeded.

    Source: io_uring_enter(2).
    """
    manager = current_io_manager()
    if not isinstance(manager, UringIOManager):
        raise RuntimeError(
            "this Trio run is not on io_uring: start it with trio_uring.run, or see "
            "trio.lowlevel.current_statistics().io_statistics for why it fell back"
        )
    if isinstance(operations, OperationArray):
        return await _perform_batches(manager, operations, None)
    units = _units(operations, manager)
    if not units:
        await checkpoint()
        return []
    flat = [operation for unit in units for operation in unit]
    if any(operation.cancellable or operation.on_cqe_more is not None for operation in flat):
        return await Batch(manager, units).perform()
    return await _perform_batches(manager, _array(units), units)


def _units(
    operations: Iterable[Operation[T] | Linked[T]] | Linked[T], manager: UringIOManager
) -> list[Unit[T]]:
    """Return the operations and chains; raise for what cannot be performed together."""
    units: list[Unit[T]] = []
    for item in (operations,) if isinstance(operations, Linked) else operations:
        if isinstance(item, Operation):
            units.append((item,))
        elif isinstance(item, Linked):
            _check_chain(item, manager)
            units.append(item.operations)
        else:
            raise TypeError(f"expected operations, and chains of them, not {type(item).__name__}")
    seen = [id(operation) for unit in units for operation in unit]
    if len(set(seen)) != len(seen):
        raise ValueError("the same operation occurs twice: make a new one for each time")
    return units


def _check_chain(chain: Linked[T], manager: UringIOManager) -> None:
    count, entries = len(chain.operations), manager.ring.entries
    if count > entries:
        raise ValueError(f"a chain of {count} operations is longer than the ring's {entries}")
    tokens, limit = _tokens(chain.operations), manager.config.max_file_operations
    if tokens > limit:
        raise ValueError(
            f"a chain of {tokens} operations on files is longer than max_file_operations, {limit}"
        )


def _array(units: Iterable[Unit[T]]) -> OperationArray[T]:
    operations: list[Operation[T]] = []
    with_next: set[int] = set()
    for unit in units:
        with_next.update(range(len(operations), len(operations) + len(unit) - 1))
        operations += unit
    return array_of(operations, with_next)


def _tokens(unit: Unit[T]) -> int:
    """Return how many tokens of the limiter *unit* needs: 0 if it can block indefinitely.

    Otherwise others could block indefinitely for its tokens, even those that it waits for.
    """
    if any(operation.cancellable and not operation.limited for operation in unit):
        return 0
    return sum(operation.limited for operation in unit)


# ---- Outcomes ------------------------------------------------------------------------------

# `outcome.Value` writes its attributes through attrs' checks, which costs more than the kernel
# takes to read a cached page. This makes many at once by copying the slots of one, whatever
# they are: a third of the time (benchmarks/bench_batch.py).
_SLOTS: Final = [
    slot
    for class_ in outcome.Value.__mro__
    for slot in vars(class_).values()
    if isinstance(slot, MemberDescriptorType) and slot.__name__ != "__weakref__"
]
_MODEL: Final = outcome.Value(None)


def _values(values: Sequence[T]) -> list[outcome.Outcome[T]]:
    blank = map(outcome.Value.__new__, repeat(outcome.Value, len(values)))
    made = cast("list[outcome.Outcome[T]]", list(blank))
    for slot in _SLOTS:
        if slot.__name__ == "value":
            deque(map(slot.__set__, made, values), maxlen=0)
        else:
            deque(map(slot.__set__, made, repeat(slot.__get__(_MODEL))), maxlen=0)
    return made


def _outcome_of(operation: Operation[T], entry: InFlight) -> outcome.Outcome[T]:
    """Return what came of a completed operation, as `perform` would return or raise it."""
    try:
        if entry.res >= 0:
            return outcome.Value(operation.decode(entry.res, entry.flags))
        return outcome.Value(entry.table.failed(operation, entry))
    except OSError as exc:
        if exc.errno == errno.ECANCELED and not isinstance(exc, OperationCancelledError):
            return outcome.Error(operation_cancelled(_BY_THE_CHAIN))
        return outcome.Error(exc)
    except Exception as exc:  # noqa: BLE001 (whose they are, the outcome says)
        return outcome.Error(exc)


def _raise_operation_cancelled() -> NoReturn:
    raise operation_cancelled(_BY_THE_TASK)


def _is_value(result: outcome.Outcome[T]) -> bool:
    return isinstance(result, outcome.Value)


# ---- What ends by itself -------------------------------------------------------------------


async def _perform_batches(
    manager: UringIOManager, array: OperationArray[T], units: Sequence[Unit[T]] | None
) -> list[outcome.Outcome[T]]:
    task = current_task()
    results: list[tuple[int, int]] = []
    batch: CompletionBatch | None = None
    cancelled: RaiseCancelT | None = None
    in_kernel = False
    try:
        if is_cancelled(task):
            await checkpoint_if_cancelled()
        if not array.count:
            await checkpoint()
        for start, end in _parts(manager, array, units):
            tokens, opcodes = _counts(array, start, end)
            try:
                await manager.file_limiter.acquire_many(tokens)
            except trio.Cancelled:
                if not any(res >= 0 for res, _ in results):
                    raise
                break
            batch = CompletionBatch(array, start, end, opcodes, tokens, task)
            in_kernel = True
            manager.start_batch(batch)
            await wait_task_rescheduled(batch.abort)
            in_kernel = False
            results += batch.results
            cancelled = batch.raise_cancel
            if cancelled is not None and end < array.count:
                if not any(res >= 0 for res, _ in results):
                    cancelled()
                break
        return _outcomes(manager, array, results)
    finally:
        if not in_kernel:
            array.release()


def _parts(
    manager: UringIOManager, array: OperationArray[T], units: Sequence[Unit[T]] | None
) -> Iterable[tuple[int, int]]:
    """Yield the ranges that are in flight together."""
    limit = manager.config.max_file_operations
    if array.limited <= limit:
        return [(0, array.count)] if array.count else []
    if units is None:
        return [(start, min(start + limit, array.count)) for start in range(0, array.count, limit)]
    parts, start, end, tokens = [], 0, 0, 0
    for unit in units:
        needed = _tokens(unit)
        if tokens + needed > limit:
            parts.append((start, end))
            start, tokens = end, 0
        tokens += needed
        end += len(unit)
    return [*parts, (start, end)]


def _counts(array: OperationArray[T], start: int, end: int) -> tuple[int, dict[int, int]]:
    """Return the tokens that a part needs, and its operations by opcode."""
    if end - start == array.count:
        return array.limited, dict(array.opcodes)
    part = array.operations[start:end]
    if part:
        return sum(operation.limited for operation in part), Counter(o.opcode for o in part)
    return end - start, dict.fromkeys(array.opcodes, end - start)


def _outcomes(
    manager: UringIOManager, array: OperationArray[T], results: Sequence[tuple[int, int]]
) -> list[outcome.Outcome[T]]:
    operations = array.operations or [array.model] * array.count
    together = list(zip(operations, results, strict=False))
    if all([res >= 0 for res, _ in results]) and len(results) == array.count:  # noqa: C419 (faster)
        return _values([operation.decode(res, flags) for operation, (res, flags) in together])
    outcomes = [
        _outcome_of(operation, InFlight(manager, operation, res=res, flags=flags))
        for operation, (res, flags) in together
    ]
    missing = array.count - len(outcomes)
    outcomes += [outcome.Error(operation_cancelled(_BY_THE_TASK)) for _ in range(missing)]
    return outcomes


# ---- What may wait -------------------------------------------------------------------------


class Batch(Generic[T]):
    """Operations of which some may wait, and be cancelled; to be performed once."""

    def __init__(self, manager: UringIOManager, units: Sequence[Unit[T]]) -> None:
        self._manager = manager
        self._to_start = deque(units)
        self._operations = [operation for unit in units for operation in unit]
        self._entries: dict[Operation[object], InFlight] = {}
        self._refused: dict[Operation[object], Exception] = {}
        self._left = 0  # in flight
        self._tokens_left = 0  # of the limiter, that these hold
        self._chains: list[Sequence[InFlight]] = []
        self._task = current_task()
        self._parked = False
        self._raise_cancel: RaiseCancelT | None = None

    async def perform(self) -> list[outcome.Outcome[T]]:
        """Perform all of it; see `perform_many`."""
        stopped: trio.Cancelled | None = None
        try:
            if is_cancelled(self._task):
                await checkpoint_if_cancelled()
            while self._to_start and self._raise_cancel is None:
                units, tokens = self._next_units()
                try:
                    await self._manager.file_limiter.acquire_many(tokens)
                except trio.Cancelled as exc:
                    stopped = exc
                    break
                self._start(units)
                await self._wait()
            while self._left:
                await self._wait()
            return self._outcomes(stopped)
        finally:
            self._manager.on_cancel_missed.discard(self._cancel_chains)
            for operation in self._operations:
                entry = self._entries.get(operation)
                if entry is None or not entry.in_flight:
                    operation.release()

    def _next_units(self) -> tuple[list[Unit[T]], int]:
        """Take what can be started together: so many on files, and all the others."""
        limit = self._manager.config.max_file_operations
        units: list[Unit[T]] = []
        later: deque[Unit[T]] = deque()
        tokens = 0
        for unit in self._to_start:
            needed = _tokens(unit)
            # Those on files keep their order: behind one that has to come later, all do.
            if needed and (later or tokens + needed > limit):
                later.append(unit)
            else:
                units.append(unit)
                tokens += needed
        self._to_start = later
        return units, tokens

    # ---- Starting --------------------------------------------------------------------------

    def _start(self, units: Iterable[Unit[T]]) -> None:
        started: list[Unit[T]] = []
        entries: list[InFlight] = []
        for unit in units:
            chain = self._registered(unit)
            if not chain:
                self._manager.file_limiter.release_many(_tokens(unit))
                continue
            self._tokens_left += _tokens(unit)
            if len(chain) > 1:
                self._chains.append(chain)
                if not _tokens(unit):
                    for operation in unit:
                        operation.limited = False  # it took no token to give back
            started.append(unit)
            entries += chain
        if entries:
            self._left += len(entries)
            self._manager.start_many(entries, _array(started))

    def _registered(self, unit: Unit[T]) -> list[InFlight]:
        """Return the entries of *unit*; none if one waits for what another task waits for."""
        fd_waiters = self._manager.fd_waiters
        chain: list[InFlight] = []
        for operation in unit:
            entry = InFlight(self._manager, operation, on_done=self._entry_done)
            try:
                if operation.cancellable:
                    fd_waiters.register(entry)
            except trio.BusyResourceError as exc:
                for earlier in chain:
                    fd_waiters.unregister(earlier)
                self._refused.update((o, operation_cancelled(_BY_THE_CHAIN)) for o in unit)
                self._refused[operation] = exc
                return []
            chain.append(entry)
        self._entries.update((entry.operation, entry) for entry in chain)
        return chain

    # ---- Waiting ---------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Wait until the next units can begin, or if there are none, until all is done."""
        if self._is_enough():
            await cancel_shielded_checkpoint()
        else:
            self._parked = True
            await wait_task_rescheduled(self._abort)

    def _is_enough(self) -> bool:
        waits_for_tokens = self._to_start and self._raise_cancel is None
        return not (self._tokens_left if waits_for_tokens else self._left)

    def _entry_done(self, entry: InFlight) -> None:
        """Take note of the last CQE of one of the operations."""
        self._left -= 1
        if entry.operation.limited:
            self._tokens_left -= 1
        if self._raise_cancel is not None and self._left:
            self._cancel_chains()
        if self._parked and self._is_enough():
            self._parked = False
            reschedule(self._task)

    # ---- Cancelling ------------------------------------------------------------------------

    def _abort(self, raise_cancel: RaiseCancelT) -> Abort:
        self._raise_cancel = raise_cancel
        for entry in self._entries.values():
            if entry.in_flight and entry.operation.cancellable:
                self._cancel(entry)
        if self._chains:
            self._manager.on_cancel_missed.add(self._cancel_chains)
        return Abort.FAILED

    def _cancel(self, entry: InFlight) -> None:
        if not entry.closing:
            entry.raise_cancel = _raise_operation_cancelled
        self._manager.request_cancel(entry)

    def _cancel_chains(self) -> None:
        """Ask again to stop those that had not begun when they were asked to stop.

        The kernel knows an operation of a chain only when the one before it is done: until
        then it answers ``ENOENT``.
        """
        for chain in self._chains:
            entry = next((entry for entry in chain if entry.in_flight), None)
            if entry is not None and entry.operation.cancellable:
                entry.cancel_asked = False
                self._cancel(entry)

    # ---- Outcomes --------------------------------------------------------------------------

    def _outcomes(self, stopped: trio.Cancelled | None) -> list[outcome.Outcome[T]]:
        outcomes = [self._outcome(operation) for operation in self._operations]
        if not any(map(_is_value, outcomes)):
            if stopped is not None:
                raise stopped
            if self._raise_cancel is not None and any(map(self._was_cancelled, self._operations)):
                self._raise_cancel()
        return outcomes

    def _outcome(self, operation: Operation[T]) -> outcome.Outcome[T]:
        entry = self._entries.get(operation)
        if entry is not None:
            return _outcome_of(operation, entry)
        refused = self._refused.get(operation)
        return outcome.Error(refused or operation_cancelled(_BY_THE_TASK))

    def _was_cancelled(self, operation: Operation[T]) -> bool:
        entry = self._entries.get(operation)
        if entry is None:
            return operation not in self._refused
        return entry.raise_cancel is not None
