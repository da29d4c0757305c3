"""`Ring` on a real kernel, without tasks or an event loop."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import resource
import select
import signal
import socket
import threading
import weakref
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from accounting import open_fds
from children import in_child, in_thread

from trio_uring import ForkedRingError, RingConfig, SQPoll
from trio_uring._engine import _buffer_pool, _ring
from trio_uring._engine._buffer_pool import BufferPool, BufferPools
from trio_uring._engine._in_flight import BATCH_DONE
from trio_uring._engine._ring import REAP_MAX, Completion, Ring
from trio_uring._kernel import ffi
from trio_uring._kernel.uapi import CqeFlag, RegisterOpcode, SetupFlag, SqeFlag
from trio_uring.lowlevel import Operation, operations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Pair: TypeAlias = tuple[socket.socket, socket.socket]

SMALL = RingConfig(entries=8, completion_entries=16)

# Long enough that no machine is too slow; a test that works never waits for it.
LONG = 30.0


class KeptRing(Ring):
    """A ring that keeps the memory of operations in flight, and counts them."""

    def __init__(self, config: RingConfig, *, register_fd: bool = True) -> None:
        super().__init__(config)
        if register_fd:
            self.register_fd()
        self.in_flight = 0
        self._early: list[Completion] = []
        self._kept: list[Operation[Any]] = []

    def push(self, operation: Operation[Any], user_data: int) -> bool:
        while not super().push(operation, user_data):
            self._early += super().submit_and_wait(0) or ()
        self.in_flight += 1
        self._kept.append(operation)
        return True

    def submit_and_wait(self, timeout: float) -> list[Completion] | None:
        completions: list[Completion] | None = self._early
        self._early = []
        if not completions:
            completions = super().submit_and_wait(timeout)
        self.in_flight -= len(completions or ())
        return completions

    def reap(self, count: int) -> list[Completion]:
        """Return exactly *count* completions."""
        completions: list[Completion] = []
        while len(completions) < count:
            reaped = self.submit_and_wait(LONG)
            assert reaped != [], f"{len(completions)} of {count} completions"
            completions += reaped or ()
        assert len(completions) == count
        return completions

    def drain(self) -> None:
        if self.in_flight:
            self.push(operations.async_cancel_any(), 0)
            self.reap(self.in_flight)
        self._kept.clear()

    def nops(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.push(operations.nop(), number)


@contextmanager
def opened(config: RingConfig, *, register_fd: bool = True) -> Iterator[KeptRing]:
    ring = KeptRing(config, register_fd=register_fd)
    yield ring
    if not ring.closed:
        ring.drain()
        ring.close()


@pytest.fixture
def ring() -> Iterator[KeptRing]:
    with opened(SMALL) as ring:
        yield ring


@pytest.fixture
def pair() -> Iterator[Pair]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


# --- Pushing --------------------------------------------------------------------------------


def test_nothing_is_submitted_before_the_turn(ring: KeptRing) -> None:
    enters, submitted = ring.enters, ring.submitted
    ring.push(operations.nop(), 1)
    assert (ring.unsubmitted, ring.enters, ring.submitted) == (1, enters, submitted)
    assert ring.submit_and_wait(LONG) == [(1, 0, 0)]
    assert (ring.unsubmitted, ring.enters, ring.submitted) == (0, enters + 1, submitted + 1)


def test_flush_submits_and_takes_no_completion(ring: KeptRing) -> None:
    ring.push(operations.nop(), 1)
    ring.flush()
    assert ring.unsubmitted == 0
    assert ring.submit_and_wait(0) == [(1, 0, 0)]


def test_a_device_gets_its_operations_before_the_turn_ends(ring: KeptRing) -> None:
    enters = ring.enters
    for number in range(7):
        operation = operations.nop()
        operation.for_device = True
        ring.push(operation, number)
    assert (ring.unsubmitted, ring.enters) == (7, enters)
    operation = operations.nop()
    operation.for_device = True
    ring.push(operation, 7)
    assert (ring.unsubmitted, ring.enters) == (0, enters + 1)
    assert [user_data for user_data, _, _ in ring.reap(8)] == list(range(8))


def test_flush_of_nothing(ring: KeptRing) -> None:
    ring.flush()
    assert ring.submit_and_wait(0) == []


def test_more_operations_than_entries_in_one_tick(ring: KeptRing) -> None:
    assert ring.entries == 8
    ring.nops(range(100))
    assert ring.unsubmitted <= 8
    assert [number for number, _, _ in ring.reap(100)] == list(range(100))


def test_entries_are_rounded_up_and_clamped() -> None:
    with opened(RingConfig(entries=9, completion_entries=9)) as ring:
        assert (ring.entries, ring.completion_entries) == (16, 16)


def test_the_queue_wraps_around(ring: KeptRing) -> None:
    for number in range(1000):
        ring.push(operations.nop(), number)
        ring.push(operations.nop(), number + 1_000_000)
        assert ring.submit_and_wait(LONG) == [(number, 0, 0), (number + 1_000_000, 0, 0)]


def test_user_data_has_64_bits(ring: KeptRing) -> None:
    ring.push(operations.nop(), 2**64 - 1)
    assert ring.submit_and_wait(LONG) == [(2**64 - 1, 0, 0)]


def test_a_bad_operation_does_not_keep_the_others_from_being_flushed(ring: KeptRing) -> None:
    # Without SUBMIT_ALL the kernel stops there: see the tests of the flag ladder too.
    for number in range(8):
        bad = Operation(operations.nop().opcode, lambda *_: None, sqe_flags=0x80)
        ring.push(bad if number % 2 else operations.nop(), number)
    ring.flush()
    assert ring.unsubmitted == 0
    results = {number: res for number, res, _ in ring.reap(8)}
    assert all((res < 0) == bool(number % 2) for number, res in results.items())


def test_every_completion_arrives_in_one_flood_of_a_turn(ring: KeptRing, pair: Pair) -> None:
    # More than a turn copies out.
    count = REAP_MAX + 10
    for number in range(count):
        ring.push(operations.poll_add(pair[0].fileno(), select.POLLIN), number)
    assert ring.submit_and_wait(0) == []
    pair[1].send(b"x")
    first = ring.submit_and_wait(LONG)
    assert first is not None
    assert 0 < len(first) <= REAP_MAX
    rest = ring.reap(count - len(first))
    assert Counter(number for number, _, _ in first + rest) == Counter(range(count))


def test_a_turn_fetches_no_more_than_there_is_room_for() -> None:
    with opened(RingConfig(entries=256, completion_entries=4096)) as ring:
        count = REAP_MAX + 500
        ring.nops(range(count))
        first, rest = ring.submit_and_wait(LONG), ring.submit_and_wait(LONG)
        assert first is not None
        assert rest is not None
        assert (len(first), len(rest)) == (REAP_MAX, 500)
        assert [number for number, _, _ in first + rest] == [*range(count)]


def test_a_flush_lets_what_was_cancelled_release_its_file(ring: KeptRing, pair: Pair) -> None:
    ours, theirs = pair
    theirs.setblocking(False)
    ring.push(operations.recv(ours.fileno(), bytearray(1)), 1)
    ring.flush()
    ring.push(operations.async_cancel(1), 2)
    ring.flush()
    ours.close()
    assert theirs.recv(1) == b""  # its peer holds it no more
    ring.reap(2)


# --- A full completion queue ----------------------------------------------------------------


def test_one_call_fetches_what_takes_several_enters() -> None:
    """One enter runs 20 work items. Those that wait for more must not wait for later calls."""
    read_end, write_end = os.pipe()
    ring = Ring(RingConfig())
    for number in range(200):
        ring.push(operations.poll_add(read_end, select.POLLIN), number)
    ring.flush()
    os.write(write_end, b"x")
    completions = ring.submit_and_wait(LONG)
    ring.close()
    os.close(read_end)
    os.close(write_end)
    assert completions is not None
    assert sorted(user_data for user_data, _, _ in completions) == [*range(200)]


def test_overflow_by_operations_that_complete_at_once() -> None:
    with opened(RingConfig(entries=8, completion_entries=8)) as ring:
        assert ring.completion_entries == 8
        ring.nops(range(5000))
        completions = ring.reap(5000)
        assert Counter(number for number, _, _ in completions) == Counter(range(5000))
        assert ring.submit_and_wait(0) == []


def test_overflow_by_operations_that_waited(pair: Pair) -> None:
    with opened(RingConfig(entries=8, completion_entries=16)) as ring:
        for number in range(3000):
            ring.push(operations.poll_add(pair[0].fileno(), select.POLLIN), number)
        assert ring.submit_and_wait(0) == []
        pair[1].send(b"x")
        completions = ring.reap(3000)
        assert Counter(number for number, _, _ in completions) == Counter(range(3000))
        assert {res for _, res, _ in completions} == {select.POLLIN}


def test_overflow_while_more_is_pushed() -> None:
    """The queue is full all the time."""
    with opened(RingConfig(entries=8, completion_entries=8)) as ring:
        seen: Counter[int] = Counter()
        for start in range(0, 3000, 60):
            ring.nops(range(start, start + 60))
            seen.update(number for number, _, _ in ring.submit_and_wait(LONG) or ())
        seen.update(number for number, _, _ in ring.reap(3000 - seen.total()))
        assert seen == Counter(range(3000))


# --- Waiting --------------------------------------------------------------------------------


def test_empty_only_if_the_time_ran_out(ring: KeptRing, pair: Pair) -> None:
    assert ring.submit_and_wait(0) == []
    assert ring.submit_and_wait(0.001) == []
    ring.push(operations.recv(pair[0].fileno(), bytearray(1)), 1)
    # This enter submitted as well, and so the kernel does not say that the time ran out.
    assert ring.submit_and_wait(0.001) is None
    assert ring.submit_and_wait(0.001) == []
    pair[1].send(b"x")
    assert ring.submit_and_wait(LONG) == [(1, 1, 0)]


def test_the_shortest_wait_is_a_wait(ring: KeptRing) -> None:
    # Half a nanosecond must not become "only look".
    assert ring.submit_and_wait(5e-10) == []


def test_the_longest_wait(ring: KeptRing) -> None:
    ring.push(operations.nop(), 1)
    assert ring.submit_and_wait(86400.0) == [(1, 0, 0)]


def test_what_is_there_is_returned_without_a_wait(ring: KeptRing) -> None:
    ring.push(operations.nop(), 1)
    ring.flush()
    assert ring.submit_and_wait(86400.0) == [(1, 0, 0)]


def test_a_signal_ends_the_wait(ring: KeptRing) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: received.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        assert ring.submit_and_wait(LONG) is None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert received


def test_signals_lose_no_completion(ring: KeptRing) -> None:
    a, b = socket.socketpair()
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    interrupted = 0
    try:
        with a, b:
            for number in range(100):
                buffer = bytearray(1)
                ring.push(operations.recv(a.fileno(), buffer), number)
                while interrupted <= number:  # until one comes while it waits
                    completions = ring.submit_and_wait(LONG)
                    assert not completions
                    interrupted += completions is None
                b.send(b"x")
                while (completions := ring.submit_and_wait(LONG)) is None:
                    interrupted += 1
                assert completions == [(number, 1, 0)]
                assert buffer == b"x"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted


# --- Registrations --------------------------------------------------------------------------


def test_the_limits_of_workers_are_registered() -> None:
    with opened(RingConfig(bounded_workers=3, unbounded_workers=5)) as ring:
        assert ring.refused == ()
        workers = ffi.new("unsigned int[2]")  # zeros: change nothing, say what it was
        ring.register(RegisterOpcode.IOWQ_MAX_WORKERS, workers, 2)
        assert list(map(int, (workers[0], workers[1]))) == [3, 5]
        assert ring.worker_limits == {"bounded_workers": 3, "unbounded_workers": 5}


def test_the_eventfd_is_written_to(ring: KeptRing) -> None:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    ring.register_eventfd(eventfd)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)
    ring.push(operations.nop(), 1)
    assert ring.submit_and_wait(LONG) == [(1, 0, 0)]
    assert os.eventfd_read(eventfd) == 1
    os.close(eventfd)


def test_the_eventfd_is_written_to_before_the_ring_is_entered(ring: KeptRing, pair: Pair) -> None:
    # What lets another thread wait for the ring, which polling its fd does not.
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    ring.register_eventfd(eventfd)
    buffer = bytearray(1)
    ring.push(operations.recv(pair[0].fileno(), buffer), 1)
    ring.flush()
    pair[1].send(b"x")
    assert select.select([eventfd], [], [], LONG)[0] == [eventfd]
    assert ring.submit_and_wait(0) == [(1, 1, 0)]
    os.close(eventfd)


def test_a_registration_that_is_refused(ring: KeptRing) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        ring.register_eventfd(1_000_000)


def test_what_the_kernel_supports(ring: KeptRing) -> None:
    assert operations.nop().opcode in ring.supported
    assert 255 not in ring.supported


def test_each_ring_that_asks_gets_the_same_answer(
    ring: KeptRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ring, "_supported", frozenset())
    with opened(SMALL) as another:
        assert another.supported == ring.supported


def test_what_the_configuration_allows() -> None:
    read, write = operations.read(0, bytearray(1), 0).opcode, operations.write(0, b"x", 0).opcode
    with opened(RingConfig(entries=8, allowed_operations=frozenset({"READ"}))) as ring:
        answers = [(ring.allows(opcode), ring.offers(opcode)) for opcode in (read, write, 255)]
        assert answers == [(True, True), (False, False), (False, False)]
    with opened(SMALL) as ring:
        answers = [(ring.allows(opcode), ring.offers(opcode)) for opcode in (read, write, 255)]
        assert answers == [(True, True), (True, True), (True, False)]


def test_a_setup_that_fails_leaves_no_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(errno.EPERM, "refused")

    monkeypatch.setattr(Ring, "_limit_workers", fail)
    before = open_fds()
    with pytest.raises(OSError, match="refused") as caught:
        Ring(SMALL)
    assert open_fds() == before, caught  # though the traceback still has it


def test_without_an_fd_for_a_duplicate_there_is_an_error(ring: KeptRing) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            ring.dup_fd()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_was_refused_is_noted_once(ring: KeptRing) -> None:
    for code in (errno.EPERM, errno.EINVAL):
        ring.note_refused("this", OSError(code, "refused"))
    ring.note_refused("this, too", OSError(errno.EINVAL, "refused"))
    assert ring.refused == ("this: EPERM", "this, too: EINVAL")


@pytest.mark.parametrize("field", ["fd", "splice_fd_in", "len"])
@pytest.mark.parametrize("position", range(3))
def test_which_fds_unsubmitted_operations_may_act_on(
    ring: KeptRing, field: str, position: int
) -> None:
    def nop(**fields: int) -> Operation[object]:
        return Operation(operations.nop().opcode, lambda _res, _flags: None, **fields)

    for number in range(3):
        ring.push(nop(**{field: 77}) if number == position else nop(), number)
    assert ring.unsubmitted_for(77)
    assert not ring.unsubmitted_for(78)
    ring.reap(3)
    assert not ring.unsubmitted_for(77)


def test_a_chain_that_is_longer_than_the_queue(ring: KeptRing) -> None:
    fields = ffi.new("struct sqe_fields[]", ring.entries + 1)
    for number in range(ring.entries):
        fields[number].sqe_flags = SqeFlag.IO_LINK
    with pytest.raises(OSError, match="Invalid argument"):
        ring.push_many(fields, 0, ring.entries + 1, 1)
    assert ring.push_many(fields, 1, ring.entries + 1, 1) == ring.entries + 1
    ring.in_flight += ring.entries
    ring.reap(ring.entries)


def test_a_batch_that_is_not_done_is_no_timeout(ring: KeptRing) -> None:
    batch, first = ring.open_batch(2)
    Ring.push(ring, operations.nop(), first)
    assert Ring.submit_and_wait(ring, LONG) is None
    Ring.push(ring, operations.nop(), first + 1)
    assert Ring.submit_and_wait(ring, LONG) == [(BATCH_DONE, batch, 0)]
    assert ring.close_batch(batch, 2) == [(0, 0), (0, 0)]


def test_no_room_for_the_first_of_many_is_no_error(
    ring: KeptRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 5.19, where completions do not fit."""
    for result in (0, 1):
        with monkeypatch.context() as context:
            context.setattr(_ring, "lib", SimpleNamespace(ring_push_many=lambda *_, r=result: r))
            assert ring.push_many(ffi.NULL, 0, 2, 1) == result


def test_the_number_of_a_batch_that_was_closed_is_free_again(ring: KeptRing) -> None:
    numbers = set()
    for _ in range(3):
        batch, first = ring.open_batch(1)
        Ring.push(ring, operations.nop(), first)
        assert Ring.submit_and_wait(ring, LONG) == [(BATCH_DONE, batch, 0)]
        ring.close_batch(batch, 1)
        numbers.add(batch)
    assert len(numbers) == 1


# --- Calls that give an fd ------------------------------------------------------------------


def test_the_fd_0_is_an_fd() -> None:
    """In a program that has closed its standard input."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONG)
        address = listener.getsockname()

        def use() -> None:
            with opened(SMALL) as ring, socket.create_connection(address):
                select.select([listener], [], [])
                os.close(0)
                for give in (
                    ring.dup_fd,
                    lambda: _ring.open_cached(os.fsencode(__file__), os.O_RDONLY),
                    lambda: _ring.accept_stream(listener.fileno(), poll_first=False),
                ):
                    assert give() == 0
                    os.close(0)

        assert in_child(use) == 0


def test_reading_a_file_that_is_gone_is_an_error() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _ring.Reader(64).read("/no/such/file")
    assert caught.value.filename == "/no/such/file"


def test_without_the_core_no_mount_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(__file__, "rb") as file:
        assert _ring.mount_of(file.fileno()) > 0
        monkeypatch.setattr(_ring, "why_no_core", "it is not there")
        assert _ring.mount_of(file.fileno()) == 0


# --- Closing, other threads, children -------------------------------------------------------


def calls(ring: Ring) -> dict[str, Callable[[], object]]:
    """Return all calls that a ring has."""
    return {
        "push": lambda: ring.push(operations.nop(), 1),
        "flush": ring.flush,
        "submit_and_wait": lambda: ring.submit_and_wait(0),
        "register": lambda: ring.register(RegisterOpcode.UNREGISTER_EVENTFD, ffi.NULL, 0),
        "register_eventfd": lambda: ring.register_eventfd(0),
        "open_buffer_ring": lambda: ring.open_buffer_ring(
            7, 2, 64, ffi.new("char[128]"), incremental=False
        ),
    }


CALLS = list(calls(Ring.__new__(Ring)))


@pytest.mark.parametrize("call", CALLS)
def test_a_closed_ring_refuses(ring: KeptRing, call: str) -> None:
    ring.push(operations.nop(), 1)
    ring.close()
    with pytest.raises(RuntimeError, match="this ring is closed"):
        calls(ring)[call]()


def test_a_closed_ring_still_tells_what_it_was(ring: KeptRing) -> None:
    ring.nops(range(3))
    ring.reap(3)
    ring.push(operations.nop(), 4)  # never submitted
    before = (ring.enters, ring.submitted, ring.entries, ring.setup_flags, ring.features)
    ring.close()
    ring.close()
    assert before == (ring.enters, ring.submitted, ring.entries, ring.setup_flags, ring.features)
    assert (ring.closed, ring.unsubmitted, ring.fd) == (True, 0, -1)


@pytest.mark.parametrize("register_fd", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_another_thread_is_refused(call: str, register_fd: bool) -> None:
    def use(ring: Ring) -> None:
        # A registered ring fd is an index of the thread: here it would be this other ring.
        with opened(SMALL) as other:
            assert other.usable
            assert not ring.usable
            with pytest.raises(RuntimeError, match="belongs to another thread"):
                calls(ring)[call]()
            other.nops(range(3))
            other.reap(3)

    with opened(SMALL, register_fd=register_fd) as ring:
        assert ring.usable
        in_thread(lambda: use(ring))
        ring.nops(range(3))
        ring.reap(3)


def test_a_thread_with_the_identity_of_one_that_ended() -> None:
    theirs, identity = in_thread(lambda: (Ring(SMALL), threading.get_ident()))

    def use() -> int:
        assert not theirs.usable
        with pytest.raises(RuntimeError, match="belongs to another thread"):
            theirs.submit_and_wait(0)
        return threading.get_ident()

    assert any(in_thread(use) == identity for _ in range(100)), "they are not used again"
    theirs.close()


def test_closing_in_another_thread() -> None:
    ring = Ring(SMALL)
    fd = ring.fd
    in_thread(ring.close)
    assert ring.closed
    assert not Path(f"/proc/self/fd/{fd}").exists()


@pytest.mark.parametrize("used", [False, True])
def test_a_ring_that_was_forgotten(used: bool) -> None:
    """It is closed, unless the kernel may still write to memory."""

    def forget() -> None:
        a, b = socket.socketpair()
        memory = bytearray(1)
        ring = Ring(SMALL)
        ring.push(operations.recv(a.fileno(), memory) if used else operations.nop(), 1)
        ring.flush()
        path = Path(f"/proc/self/fd/{ring.fd}")
        assert path.exists()
        del ring
        assert path.exists() == used
        b.close()

    assert in_child(forget) == 0  # where the ring that is left can disturb nobody


# Python 3.12 warns where other threads run. Trio's idle workers of earlier tests may.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
def test_a_forked_child_is_refused(ring: KeptRing, call: str) -> None:
    def use() -> None:
        with pytest.raises(ForkedRingError, match="start a new run in the child"):
            calls(ring)[call]()
        assert (ring.unsubmitted, ring.submitted) == (0, 1)
        ring.close()
        assert ring.closed

    ring.push(operations.nop(), 1)
    assert in_child(use) == 0
    # What the child did to it has left no trace.
    assert ring.submit_and_wait(LONG) == [(1, 0, 0)]


def mappings_not_inherited() -> int:
    """Return how many of this process's mappings a forked child does not get."""
    flags = re.findall("^VmFlags:(.*)$", Path("/proc/self/smaps").read_text(), re.MULTILINE)
    return sum("dc" in line.split() for line in flags)


def test_the_memory_of_a_ring_is_not_inherited() -> None:
    """A child's copies would be of memory that the kernel shares with its parent."""
    before = mappings_not_inherited()
    with opened(SMALL) as ring:
        assert mappings_not_inherited() == before + 2  # the queues' indexes, and the SQEs
        pool = BufferPool(ring, group=1, count=4, size=64)
        assert mappings_not_inherited() == before + 3
        pool.close()


def test_the_entries_of_buffers_that_the_kernel_may_still_use_stay() -> None:
    before = mappings_not_inherited()
    with opened(SMALL) as ring:
        pool = BufferPool(ring, group=1, count=4, size=64)
        ring.close()
        with pytest.raises(RuntimeError, match="this ring is closed"):
            pool.close()
    assert mappings_not_inherited() == before + 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_unmaps_nothing_of_its_own(ring: KeptRing, pool: BufferPool) -> None:
    """The places of what it did not inherit are free there, until something is mapped."""

    def use() -> None:
        pages = [mmap.mmap(-1, size) for size in (4096, 8192) for _ in range(100)]
        pool.close()
        ring.close()
        assert not any(page[0] or page[-1] for page in pages)

    assert in_child(use) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_keeps_what_has_the_fd_of_a_closed_duplicate(ring: KeptRing) -> None:
    fd = ring.dup_fd()
    assert not os.get_inheritable(fd)
    os.close(fd)
    ring.forget_dup_fd()
    with open(os.devnull) as file:
        assert file.fileno() == fd  # the lowest number that is free
        assert in_child(lambda: os.fstat(fd)) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_makes_a_ring_of_its_own(ring: KeptRing) -> None:
    def use() -> None:
        with opened(SMALL) as own:
            own.nops(range(10))
            own.reap(10)
            assert in_child(grandchild) == 0
            own.nops(range(10))
            own.reap(10)
        ring.close()

    def grandchild() -> None:
        with opened(SMALL) as own:
            own.nops(range(10))
            own.reap(10)

    ring.push(operations.nop(), 1)
    assert in_child(use) == 0
    assert ring.submit_and_wait(LONG) == [(1, 0, 0)]


# --- The kernel's polling thread ------------------------------------------------------------


@pytest.fixture
def polled() -> Iterator[KeptRing]:
    with opened(RingConfig(entries=8, completion_entries=64, sqpoll=SQPoll(idle=0.001))) as ring:
        assert ring.setup_flags & SetupFlag.SQPOLL
        ring.nops([0])
        ring.reap(1)  # its thread runs, and has given itself its name
        yield ring


def wait_until_it_sleeps() -> None:
    """Wait until the polling thread is asleep. Before that it has asked to be woken."""
    while {state for state in polling_threads() if state not in "XZ"} != {"S"}:
        os.sched_yield()


def polling_threads() -> Iterator[str]:
    """Yield the state of each polling thread, maybe also those of rings that were just closed."""
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            name, _, rest = (task / "stat").read_text().partition(" (")[2].rpartition(") ")
            if name.startswith("iou-sqp-"):
                yield rest[0]


def test_sqpoll_wakes_its_thread(polled: KeptRing) -> None:
    for number in range(20):
        wait_until_it_sleeps()
        polled.push(operations.nop(), number)
        assert polled.submit_and_wait(LONG) == [(number, 0, 0)]


def test_sqpoll_opens_nothing_with_old_credentials(
    polled: KeptRing, ring: KeptRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/dev/null"
    for each in (polled, ring):
        Ring.push(each, operations.openat(path, os.O_RDONLY), 1)
        [(_, fd, _)] = each.submit_and_wait(LONG) or ()
        os.close(fd)
        each.in_flight = 0
    monkeypatch.setattr(os, "getegid", lambda: 12345)
    with pytest.raises(PermissionError, match="old ones") as caught:
        polled.push(operations.openat(path, os.O_RDONLY), 1)
    assert caught.value.filename == path
    polled.nops([2])  # needs none
    assert polled.reap(1) == [(2, 0, 0)]
    assert ring.credentials is None  # the kernel takes those of the calling thread


def test_sqpoll_flush_waits_until_all_is_taken(polled: KeptRing) -> None:
    for asleep in [True, False] * 10:
        if asleep:
            wait_until_it_sleeps()
        polled.nops(range(8))
        polled.flush()
        assert polled.unsubmitted == 0
        assert [number for number, _, _ in polled.reap(8)] == list(range(8))


def test_sqpoll_flush_before_close(polled: KeptRing, pair: Pair) -> None:
    """Flushed and cancelled operations never act on the next file with the same fd."""
    for number in range(1, 400, 2):
        old, peer = socket.socketpair()
        fd = old.fileno()
        polled.push(operations.recv(fd, bytearray(1)), number)
        polled.push(operations.async_cancel(number), number + 1)
        polled.flush()
        old.close()
        os.dup2(pair[0].fileno(), fd)
        pair[1].send(b"x")
        results = {user_data: res for user_data, res, _ in polled.reap(2)}
        assert results == {number: -errno.ECANCELED, number + 1: 0}
        assert pair[0].recv(1) == b"x"
        os.close(fd)
        peer.close()


def test_sqpoll_more_operations_than_entries(polled: KeptRing) -> None:
    for asleep in [True, False] * 5:
        if asleep:
            wait_until_it_sleeps()
        polled.nops(range(200))
        assert Counter(number for number, _, _ in polled.reap(200)) == Counter(range(200))


def test_sqpoll_timeouts(polled: KeptRing, pair: Pair) -> None:
    assert polled.submit_and_wait(0.001) == []
    polled.push(operations.recv(pair[0].fileno(), bytearray(1)), 1)
    assert polled.submit_and_wait(0.001) == []
    pair[1].send(b"x")
    assert polled.submit_and_wait(LONG) == [(1, 1, 0)]


# --- Provided buffers -----------------------------------------------------------------------


@pytest.fixture
def pool(ring: KeptRing) -> Iterator[BufferPool]:
    pool = BufferPool(ring, group=3, count=2, size=64)
    yield pool
    ring.drain()
    pool.close()


def test_the_kernel_chooses_a_buffer(ring: KeptRing, pool: BufferPool, pair: Pair) -> None:
    ring.push(operations.recv_select(pair[0].fileno(), pool, 64), 1)
    assert ring.submit_and_wait(0) == []
    pair[1].send(b"data")
    [(_, res, flags)] = ring.reap(1)
    assert pool.take(res, flags) == b"data"


def test_all_buffers_are_used_again_and_again(ring: KeptRing, pool: BufferPool, pair: Pair) -> None:
    seen = set()
    for number in range(1000):
        data = bytes([number % 256]) * (number % 64 + 1)
        pair[1].send(data)
        ring.push(operations.recv_select(pair[0].fileno(), pool, 64), number)
        [(_, res, flags)] = ring.reap(1)
        assert pool.take(res, flags) == data
        seen.add(flags >> 16)
    assert seen == {0, 1}


def test_no_buffer_left_loses_nothing(ring: KeptRing, pool: BufferPool) -> None:
    pairs = [socket.socketpair() for _ in range(5)]
    for number, (a, b) in enumerate(pairs):
        b.send(b"%d" % number)
        ring.push(operations.recv_select(a.fileno(), pool, 64), number)
    held = ring.reap(5)
    assert [res for _, res, _ in held] == [1, 1, *[-errno.ENOBUFS] * 3]
    received = [pool.take(res, flags) for _, res, flags in held if res > 0]
    for number in range(2, 5):
        ring.push(operations.recv_select(pairs[number][0].fileno(), pool, 64), number)
        [(_, res, flags)] = ring.reap(1)
        received.append(pool.take(res, flags))
    assert received == [b"0", b"1", b"2", b"3", b"4"]
    for end in (end for pair in pairs for end in pair):
        end.close()


def test_cancelling_costs_no_buffer(ring: KeptRing, pool: BufferPool, pair: Pair) -> None:
    # Half of them are cancelled with the data there: in one enter with what waited.
    for number in range(1, 2000, 2):
        ring.push(operations.recv_select(pair[0].fileno(), pool, 64), number)
        if number % 4 == 1:
            assert ring.submit_and_wait(0) == []
            pair[1].send(b"x")
        ring.push(operations.async_cancel(number), number + 1)
        for user_data, res, flags in ring.reap(2):
            if user_data == number and res > 0:
                assert pool.take(res, flags) == b"x"
            elif user_data == number:
                assert (res, flags) == (-errno.ECANCELED, 0)
                if number % 4 == 1:
                    assert pair[0].recv(64) == b"x"
    test_no_buffer_left_loses_nothing(ring, pool)


def test_the_end_of_a_stream_costs_no_buffer(ring: KeptRing, pool: BufferPool) -> None:
    for number in range(10):
        a, b = socket.socketpair()
        b.close()
        ring.push(operations.recv_select(a.fileno(), pool, 64), number)
        [(_, res, flags)] = ring.reap(1)
        assert pool.take(res, flags) == b""
        a.close()
    test_no_buffer_left_loses_nothing(ring, pool)


def test_failures_cost_no_buffer(ring: KeptRing, pool: BufferPool) -> None:
    directory = os.open("/", os.O_RDONLY)
    unconnected = socket.socket()
    for number in range(10):
        ring.push(operations.recv_select(directory, pool, 64), number)
        ring.push(operations.read_select(directory, pool, 64), number + 10)
        ring.push(operations.recv_select(unconnected.fileno(), pool, 64), number + 20)
        for _, res, flags in ring.reap(3):
            assert res < 0
            pool.give_back(flags)
    os.close(directory)
    unconnected.close()
    test_no_buffer_left_loses_nothing(ring, pool)


def test_a_group_that_is_taken(ring: KeptRing, pool: BufferPool) -> None:
    with pytest.raises(OSError, match="File exists"):
        BufferPool(ring, group=pool.group, count=2, size=64)


def test_a_group_is_free_again(ring: KeptRing) -> None:
    for _ in range(3):
        BufferPool(ring, group=1, count=4, size=64).close()


def test_groups_are_numbered(ring: KeptRing, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = BufferPools(ring, 2)
    first, second = pools.open(3, 64), pools.open(1, 64)
    assert (first.group, second.group) == (0, 1)
    pools.close(first)
    with pytest.raises(OSError, match="Invalid argument"):
        pools.open(1 << 16, 1)  # more than the kernel has in a group
    assert pools.open(1, 64).group == 0
    monkeypatch.setattr("trio_uring._engine._buffer_pool._GROUPS_MAX", 2)
    with pytest.raises(OSError, match="all buffer groups are in use"):
        pools.open(1, 64)
    assert pools.open_receive() is None
    assert "PBUF_RING" in pools.refused
    pools.close_all()
    assert pools.open(1, 64).group in (0, 1)
    pools.close_all()


def test_buffers_can_be_seen_until_they_are_given_back(
    ring: KeptRing, pool: BufferPool, pair: Pair
) -> None:
    ring.push(operations.recv_select(pair[0].fileno(), pool, 64), 1)
    pair[1].send(b"data")
    [(_, res, flags)] = ring.reap(1)
    seen = pool.view(res, flags)
    assert seen == b"data"
    assert seen.readonly
    pool.give_back(flags)
    test_no_buffer_left_loses_nothing(ring, pool)


def test_buffers_outlive_a_ring_that_was_closed_first(ring: KeptRing) -> None:
    # The order is wrong, and what the kernel could write to is leaked, not freed.
    pool = BufferPool(ring, group=1, count=4, size=64)
    ring.close()
    with pytest.raises(RuntimeError, match="this ring is closed"):
        pool.close()
    assert pool._memory in _buffer_pool._leaked


def test_buffers_keep_their_ring_alive() -> None:
    ring = Ring(SMALL)
    pool, remembered = BufferPool(ring, group=1, count=4, size=64), weakref.ref(ring)
    del ring
    gc.collect()
    assert remembered() is not None
    pool.close()


def test_how_often_the_kernel_found_no_buffer(ring: KeptRing) -> None:
    pools = BufferPools(ring, 2)
    first, second = pools.open(2, 64), pools.open(2, 64)
    assert pools.ran_out() == 0
    for pool in (first, second, first):
        pool.failed(-errno.ENOBUFS, 0)
    assert (first.ran_out, second.ran_out, pools.ran_out()) == (2, 1, 3)
    for pool in (first, second):
        pools.close(pool)
        assert pools.ran_out() == 3


def test_a_failed_receive_of_the_native_engine_counts(ring: KeptRing) -> None:
    pools = BufferPools(ring, 2)
    pools.failed(-errno.ENOBUFS, 0)  # before there is a pool
    assert pools.ran_out() == 0
    pool = pools.for_native_engine(pools.open(2, 64))
    assert pools.for_native_engine(pools.open(2, 64)) is pool
    pools.failed(-errno.ENOBUFS, 0)
    assert (pool.ran_out, pools.ran_out()) == (1, 1)
    pools.close_all()


@pytest.mark.parametrize("old", [True, False])
def test_the_native_engine_gets_an_incremental_pool_if_there_is_one(
    ring: KeptRing, monkeypatch: pytest.MonkeyPatch, *, old: bool
) -> None:
    open_real = ring.open_buffer_ring

    def open_plain(*args: Any, incremental: bool) -> Any:
        if incremental:
            raise OSError(errno.EINVAL, "before Linux 6.12")
        return open_real(*args, incremental=False)

    if old:
        monkeypatch.setattr(ring, "open_buffer_ring", open_plain)
    pools = BufferPools(ring, 2)
    shared = pools.open(2, 64)
    pool = pools.for_native_engine(shared)
    if ring.refused:
        assert ring.refused == ("PBUF_RING, incremental: EINVAL",)
        assert pool is shared
        assert pools.for_native_engine(shared) is shared
    else:
        assert not old
        assert pool.incremental
        assert pool is not shared
    pools.close_all()


class Trial:
    """What `BufferPools.for_streams` calls to perform its test."""

    def __init__(self, ring: KeptRing, pools: BufferPools, result: int) -> None:
        self.ring, self.pools, self.result = ring, pools, result
        self.limits: list[int] = []

    def __call__(self, operation: Operation[bytes]) -> tuple[int, int]:
        """Perform *operation*, or fail as an older kernel does."""
        self.limits.append(operation.sqe[6])
        if self.result == -errno.EINVAL:
            return self.result, 0
        pool = self.pools.receive
        assert pool is not None
        data = os.readv(operation.fd, [pool._memory])
        return data, int(CqeFlag.BUFFER) | (CqeFlag.MORE if self.result else 0)


@pytest.mark.parametrize(
    ("result", "refused"),
    [(0, ()), (-errno.EINVAL, ("RECV with a limit: EINVAL",)), (1, ("RECV with a limit: EINVAL",))],
    ids=["works", "before Linux 6.17", "goes on"],
)
def test_receives_with_a_limit_are_tried_once(
    ring: KeptRing, monkeypatch: pytest.MonkeyPatch, result: int, refused: tuple[str, ...]
) -> None:
    monkeypatch.setattr(_buffer_pool, "_recv_once_works", False)
    pools = BufferPools(ring, 2)
    trial = Trial(ring, pools, result)
    pool = pools.for_streams(trial)
    assert pools.for_streams(trial) is pool
    assert (pool is None) == bool(refused)
    if pool is not None:
        assert pool is pools.receive
    assert (trial.limits, ring.refused, len(pools._open)) == ([2], refused, 1)
    others = BufferPools(ring, 2)
    monkeypatch.setattr(others, "_free_groups", [5])
    others.receive = shared = others.open(2, 64)
    again = Trial(ring, others, result)
    assert others.for_streams(again) is (None if refused else shared)
    assert len(again.limits) == bool(refused)  # what works is tried once in the process
    pools.close_all()
    others.close_all()


def test_without_buffers_no_receive_is_tried(
    ring: KeptRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    for works in (True, False):
        monkeypatch.setattr(_buffer_pool, "_recv_once_works", works)
        pools = BufferPools(ring, 1 << 16)  # more than the kernel has in a group
        trial = Trial(ring, pools, 0)
        assert pools.for_streams(trial) is None
        assert pools.for_streams(trial) is None
        assert trial.limits == []
        assert ring.refused == ()
        assert _buffer_pool._recv_once_works == works


def test_the_trial_receive_gives_back_its_buffer(ring: KeptRing, pool: BufferPool) -> None:
    assert isinstance(_buffer_pool._try_recv_once(pool, lambda _: (-errno.ENOBUFS, 0)), OSError)
    assert pool.ran_out == 1


def test_the_kernel_gets_more_buffers_when_it_finds_none(ring: KeptRing) -> None:
    pool = BufferPool(ring, group=1, count=4, size=64, first=1)
    pairs = [socket.socketpair() for _ in range(8)]

    def received() -> int:
        for number, (a, b) in enumerate(pairs):
            b.send(b"data")
            ring.push(operations.recv_select(a.fileno(), pool, 64), number)
        completions = ring.reap(8)
        for _, res, flags in completions:
            if res > 0:
                pool.take(res, flags)
            else:
                pool.failed(res, flags)
        return sum(res > 0 for _, res, _ in completions)

    pool.failed(-errno.ECONNRESET, 0)  # for another reason
    assert received() == 1
    assert received() == 4  # there are no more than that
    assert received() == 4
    for end in (end for pair in pairs for end in pair):
        end.close()
    pool.close()


def test_receives_share_an_incremental_buffer(ring: KeptRing) -> None:
    try:
        pool = BufferPool(ring, group=1, count=1, size=64, incremental=True)
    except OSError as exc:
        pytest.skip(f"since Linux 6.12: {exc}")
    pairs = [socket.socketpair() for _ in range(3)]
    for number, (a, b) in enumerate(pairs):
        b.send(b"data")
        ring.push(operations.recv_select(a.fileno(), pool, 64), number)
    for _, res, flags in ring.reap(3):
        assert res == 4
        assert flags & CqeFlag.BUFFER
        assert flags & CqeFlag.BUF_MORE
    for end in (end for pair in pairs for end in pair):
        end.close()
    pool.close()


def test_a_closed_pool_refuses(ring: KeptRing) -> None:
    pool = BufferPool(ring, group=1, count=4, size=64)
    pool.close()
    with pytest.raises(AttributeError):
        pool.take(1, 1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_takes_what_came_before(
    ring: KeptRing, pool: BufferPool, pair: Pair
) -> None:
    pair[1].send(b"data")
    ring.push(operations.recv_select(pair[0].fileno(), pool, 64), 1)
    [(_, res, flags)] = ring.reap(1)

    def use() -> None:
        assert pool.take(res, flags) == b"data"
        pool.close()

    assert in_child(use) == 0
    assert pool.take(res, flags) == b"data"
    test_no_buffer_left_loses_nothing(ring, pool)


@pytest.mark.parametrize(
    ("size", "more", "kept"), [(2, False, True), (2, True, False), (1, False, False)]
)
def test_a_limit_that_the_kernel_does_not_keep(
    ring: KeptRing, size: int, *, more: bool, kept: bool
) -> None:
    """It goes on to receive after the first completion, or stops before it has all."""
    ring_pool = BufferPool(ring, group=7, count=1, size=4096)
    flags = int(CqeFlag.BUFFER) | (int(CqeFlag.MORE) if more else 0)

    def perform_now(operation: Operation[bytes]) -> tuple[int, int]:
        return os.readv(operation.fd, [memoryview(ring_pool._memory)[:size]]), flags

    error = _buffer_pool._try_recv_once(ring_pool, perform_now)
    assert (error is None) == kept
    ring_pool.close()


def test_a_failed_receive_gives_back_its_buffer(ring: KeptRing, pair: Pair) -> None:
    pool = BufferPool(ring, group=7, count=1, size=64)
    for _ in range(3):
        pair[1].send(b"data")
        ring.push(operations.recv_select(pair[0].fileno(), pool, 64), 1)
        [(_, res, flags)] = ring.reap(1)
        assert res == 4
        pool.failed(-errno.EIO, flags)  # as if it had failed
    assert pool.ran_out == 0
    pool.close()


def test_there_are_as_many_groups_as_an_sqe_can_name(ring: KeptRing) -> None:
    pools = BufferPools(ring, 2)
    pool = pools.open(1, 64)
    pools._open = dict.fromkeys(range(1 << 16), pool)
    with pytest.raises(OSError, match="all buffer groups are in use"):
        pools.open(1, 64)
    del pools._open[(1 << 16) - 1]
    last = pools.open(1, 64)
    assert last.group == (1 << 16) - 1
    last.close()
    pool.close()
