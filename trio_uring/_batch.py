"""`perform_many`: perform many operations together.

There are two implementations, with the same results. If all operations end by themselves, such as
reads of regular files, they become completion batches: the C core counts their CQEs and reports one
completion at the end, so that Python does little for each. If an operation can block indefinitely
or be cancelled, each operation has its own in-flight entry.
"""

from __future__ import annotations

import errno
from collections import Counter, deque
from copy import copy
from functools import cache
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

from ._arguments import wrong_type
from ._engine._completion_batches import CompletionBatch
from ._engine._in_flight import InFlight
from ._engine._io_manager import UringIOManager, no_ring_error
from ._errors import (
    CANCELLED_RESULTS,
    OperationCancelledError,
    no_worker_error,
    operation_cancelled,
)
from ._operations import Linked, Operation, OperationArray
from ._operations._arrays import array_of
from ._trio_private import current_io_manager, is_cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio.lowlevel import RaiseCancelT

T = TypeVar("T")

# One operation, or the operations of a linked chain.
Unit = tuple[Operation[T], ...]

_NOT_ITERABLE: Final = (Linked, OperationArray)

_BY_THE_CHAIN: Final = "an operation before it in its linked chain did not succeed"
_BY_THE_TASK: Final = "the task was cancelled before this operation did anything"


@enable_ki_protection
async def perform_many(
    operations: Iterable[Operation[T] | Linked[T]] | Linked[T] | OperationArray[T],
) -> list[outcome.Outcome[T]]:
    """Submit many operations together, and wait until all of them have completed.

    This is one step for Trio and usually one system call, whatever the number of operations. The
    operations run in parallel, in no particular order. To run operations in order, link them with
    `trio_uring.linked`.

    Operations on files, and others that run in kernel workers, each need a token of the run's
    limiter. So at most ``RingConfig.max_file_operations`` of them are in flight, and the next begin
    when these have completed. They wait for their tokens in FIFO order, together with all other
    operations of the run. Two batches never block each other. A chain with an operation that can
    block indefinitely needs no tokens.

    Args:
      operations: Operations of `trio_uring.lowlevel.operations`, and linked chains of them. One
        that has a buffer can be performed once. Or the result of ``read_many`` in that module,
        which makes many reads at once. Any number: more than ``RingConfig.entries`` are submitted
        in parts.

    Returns:
      The outcome of each operation, in the same order. The outcomes of a chain follow each other.
      An ``outcome.Error`` has the exception that `trio_uring.lowlevel.perform` would raise:
      `OSError`, `UnsupportedOpcodeError`, `trio.ClosedResourceError`, or `trio.BusyResourceError`
      (also if two of the operations wait for the same thing on one fd). The other operations of a
      chain that is busy don't begin. Operations behind a failed one in a chain have
      `OperationCancelledError`.

    Raises:
      ValueError: an operation occurs twice, a chain is longer than ``RingConfig.entries``, or a
        chain has more operations on files than ``RingConfig.max_file_operations``.
      TypeError: *operations* has something that is not an operation.
      OverflowError: a number of an operation does not fit in its field. None was performed.
      RuntimeError: outside a run, or the run is not on io_uring. Or an operation has a buffer, and
        was performed already.

    Always a checkpoint. If cancelled, it cancels every operation that can be cancelled, and waits
    until all have completed. If any operation succeeded, the outcomes are returned, so that no fd
    and no data is lost. Operations that were stopped, or didn't begin, then have
    `OperationCancelledError`. `trio.Cancelled` is raised only if no operation succeeded.

    Source: io_uring_enter(2).
    """
    if not hasattr(type(operations), "__iter__") and type(operations) not in _NOT_ITERABLE:
        raise wrong_type("operations", operations, "a list of operations")
    manager = current_io_manager()
    if not isinstance(manager, UringIOManager):
        raise no_ring_error()
    if isinstance(operations, OperationArray):
        operations.use()
        return await _perform_batches(manager, operations, None)
    units = _units(operations, manager)
    if not units:
        await checkpoint()
        return []
    flat = [operation for unit in units for operation in unit]
    credentials = manager.ring.credentials
    if credentials is not None:
        for operation in flat:
            credentials.check(operation)
    array = _array(units)  # raises OverflowError before anything has begun
    _use(flat)
    if any(operation.cancellable or operation.on_cqe_more is not None for operation in flat):
        return await Batch(manager, units).perform()
    return await _perform_batches(manager, array, units)


def _units(
    operations: Iterable[Operation[T] | Linked[T]] | Linked[T], manager: UringIOManager
) -> list[Unit[T]]:
    """Return the operations and chains as units. Raise if they cannot be performed together."""
    units: list[Unit[T]] = []
    for item in (operations,) if isinstance(operations, Linked) else operations:
        if isinstance(item, Operation):
            units.append((item,))
        elif isinstance(item, Linked):
            _check_chain(item, manager)
            units.append(item.operations)
        else:
            raise wrong_type("each of operations", item, "an operation, or a chain by linked()")
    seen = [id(operation) for unit in units for operation in unit]
    if len(set(seen)) != len(seen):
        raise ValueError("operations has the same operation twice: make a new one for each time")
    return units


def _use(operations: Sequence[Operation[T]]) -> None:
    """Note that all are about to be performed, or raise and change none."""
    for operation in operations:
        if operation.spent:
            operation.use()  # raises
    for operation in operations:
        operation.use()


def _check_chain(chain: Linked[T], manager: UringIOManager) -> None:
    count, entries = len(chain.operations), manager.ring.entries
    if count > entries:
        raise ValueError(
            f"operations has a chain of {count}, and the ring has {entries} entries: make the "
            "chain shorter, or raise RingConfig.entries"
        )
    tokens, limit = _tokens(chain.operations), manager.config.max_file_operations
    if tokens > limit:
        raise ValueError(
            f"operations has a chain of {tokens} on files, and the limit is {limit}: make the "
            "chain shorter, or raise RingConfig.max_file_operations"
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

    If it took tokens, other operations could wait for them indefinitely, even those that *unit*
    itself waits for.
    """
    if any(operation.cancellable and not operation.limited for operation in unit):
        return 0
    return sum(operation.limited for operation in unit)


# ---- Outcomes ------------------------------------------------------------------------------

# Making an `outcome.Value` takes longer than the kernel takes to read a cached page, because its
# attributes pass through the checks of attrs. Copying the slots of one, whatever they are, takes a
# third of the time (benchmarks/bench_batch.py).
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


def _outcome_of(
    operation: Operation[T],
    entry: InFlight,
    res_before: int,
    probe: Callable[[], RuntimeError | None],
) -> outcome.Outcome[T]:
    """Return the outcome of a completed operation: what `perform` would return or raise.

    *res_before* is the ``res`` of the operation before it in its linked chain, or 0. *probe* is
    `no_worker_error`, which starts a thread. It is called once for a batch at most, because each
    chain with a short read needs it: the operations behind it have the same result as those for
    which the kernel found no worker.
    """
    if res_before < 0 and entry.res in CANCELLED_RESULTS and not entry.cancel_asked:
        return outcome.Error(operation_cancelled(_BY_THE_CHAIN))
    try:
        if entry.res >= 0:
            return outcome.Value(operation.decode(entry.res, entry.flags))
        return outcome.Value(entry.table.failed(operation, entry, probe))
    except OSError as exc:
        if exc.errno == errno.ECANCELED and not isinstance(exc, OperationCancelledError):
            return outcome.Error(operation_cancelled(_BY_THE_CHAIN))
        return outcome.Error(exc)
    except Exception as exc:  # noqa: BLE001 (returned in the outcome)
        return outcome.Error(exc)


def _raise_operation_cancelled() -> NoReturn:
    raise operation_cancelled(_BY_THE_TASK)


def _is_value(result: outcome.Outcome[T]) -> bool:
    return isinstance(result, outcome.Value)


# ---- Operations that end by themselves -----------------------------------------------------


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
        return _outcomes(manager, array, results, units)
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
    manager: UringIOManager,
    array: OperationArray[T],
    results: Sequence[tuple[int, int]],
    units: Sequence[Unit[T]] | None,
) -> list[outcome.Outcome[T]]:
    operations = array.operations or [array.model] * array.count
    together = list(zip(operations, results, strict=False))
    if all([res >= 0 for res, _ in results]) and len(results) == array.count:  # noqa: C419 (faster)
        return _values([operation.decode(res, flags) for operation, (res, flags) in together])
    firsts = {id(unit[0]) for unit in units} if units is not None else None
    outcomes = []
    probe = cache(no_worker_error)
    res_before = 0
    for operation, (res, flags) in together:
        if firsts is None or id(operation) in firsts:
            res_before = 0
        entry = InFlight(manager, operation, res=res, flags=flags)
        outcomes.append(_outcome_of(operation, entry, res_before, probe))
        res_before = res
    missing = array.count - len(outcomes)
    outcomes += [outcome.Error(operation_cancelled(_BY_THE_TASK)) for _ in range(missing)]
    return outcomes


# ---- Operations that can block indefinitely ------------------------------------------------


class Batch(Generic[T]):
    """Operations of which some can block indefinitely or be cancelled. Performed once."""

    def __init__(self, manager: UringIOManager, units: Sequence[Unit[T]]) -> None:
        self._manager = manager
        self._to_start = deque(units)
        self._operations = [operation for unit in units for operation in unit]
        self._entries: dict[Operation[object], InFlight] = {}
        self._refused: dict[Operation[object], Exception] = {}
        self._left = 0  # operations in flight
        self._tokens_left = 0  # tokens of the limiter that they hold
        self._chains: list[Sequence[InFlight]] = []
        self._before: dict[Operation[object], InFlight] = {}  # the one before it in its chain
        self._task = current_task()
        self._parked = False
        self._raise_cancel: RaiseCancelT | None = None

    async def perform(self) -> list[outcome.Outcome[T]]:
        """Perform all operations; see `perform_many`."""
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
        """Take the units that can start together, and return them with the tokens they need."""
        limit = self._manager.config.max_file_operations
        units: list[Unit[T]] = []
        later: deque[Unit[T]] = deque()
        tokens = 0
        for unit in self._to_start:
            needed = _tokens(unit)
            # Units that need tokens keep their order: none overtakes another.
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
                self._before.update(zip(unit[1:], chain, strict=False))
            started.append(unit)
            entries += chain
        if entries:
            self._left += len(entries)
            self._manager.start_many(entries, _array(started))

    def _registered(self, unit: Unit[T]) -> list[InFlight]:
        """Return the registered entries of *unit*; none if an fd is busy with another task."""
        fd_waiters = self._manager.fd_waiters
        chain: list[InFlight] = []
        holds_tokens = _tokens(unit) > 0
        for operation in unit:
            performed = operation
            if operation.limited and not holds_tokens:
                performed = copy(operation)  # others may be performing the same
                performed.limited = False  # it holds no token to return
            entry = InFlight(self._manager, performed, on_done=self._entry_done)
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
        self._entries.update(zip(unit, chain, strict=True))
        return chain

    # ---- Waiting ---------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Wait until the next units can begin. If there are none, wait until all are done."""
        if self._is_enough():
            await cancel_shielded_checkpoint()
        else:
            self._parked = True
            await wait_task_rescheduled(self._abort)

    def _is_enough(self) -> bool:
        waits_for_tokens = self._to_start and self._raise_cancel is None
        return not (self._tokens_left if waits_for_tokens else self._left)

    def _entry_done(self, entry: InFlight) -> None:
        """Note that an operation is done: its last CQE has arrived."""
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
        """Request again the cancellation of operations of chains that hadn't begun.

        The kernel finds an operation of a chain only after the one before it has completed. Until
        then a request to cancel it fails with ``ENOENT``.
        """
        for chain in self._chains:
            entry = next((entry for entry in chain if entry.in_flight), None)
            if entry is not None and entry.operation.cancellable:
                entry.cancel_asked = False
                self._cancel(entry)

    # ---- Outcomes --------------------------------------------------------------------------

    def _outcomes(self, stopped: trio.Cancelled | None) -> list[outcome.Outcome[T]]:
        probe = cache(no_worker_error)
        outcomes = [self._outcome(operation, probe) for operation in self._operations]
        if not any(map(_is_value, outcomes)):
            if stopped is not None:
                raise stopped
            if self._raise_cancel is not None and any(map(self._was_cancelled, self._operations)):
                self._raise_cancel()
        return outcomes

    def _outcome(
        self, operation: Operation[T], probe: Callable[[], RuntimeError | None]
    ) -> outcome.Outcome[T]:
        entry = self._entries.get(operation)
        if entry is not None:
            before = self._before.get(operation)
            return _outcome_of(operation, entry, 0 if before is None else before.res, probe)
        refused = self._refused.get(operation)
        return outcome.Error(refused or operation_cancelled(_BY_THE_TASK))

    def _was_cancelled(self, operation: Operation[T]) -> bool:
        entry = self._entries.get(operation)
        if entry is None:
            return operation not in self._refused
        return entry.raise_cancel is not None
