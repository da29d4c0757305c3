"""The mailbox of a run: its deliveries, and how long the fd stays open that messages go to."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from children import in_child
from trio.testing import wait_all_tasks_blocked

from trio_uring._engine._mailbox import Mailbox, WakeMessage
from trio_uring.lowlevel import operations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio_uring._engine._in_flight import InFlightTable
    from trio_uring._engine._ring import Ring


class FakeRing:
    """What a mailbox needs of the ring of its run."""

    def __init__(self, *, fds_left: bool = True) -> None:
        self.fds_left = fds_left
        self.forgotten = 0

    def dup_fd(self) -> int:
        if not self.fds_left:
            raise OSError(errno.EMFILE, "too many open files")
        return os.open("/dev/null", os.O_RDONLY)

    def forget_dup_fd(self) -> None:
        self.forgotten += 1


class FakeTable:
    """What a mailbox needs of the ring that sends a message."""

    def __init__(
        self, *, offered: bool = True, room: bool = True, lost: bool = False, taken: bool = True
    ) -> None:
        self.ring: Any = self
        self.fd_waiters: Any = None
        self.offered, self.room, self.lost, self.taken = offered, room, lost, taken
        self.unsubmitted = 0
        self.messages: list[WakeMessage] = []

    def offers(self, _opcode: int) -> bool:
        return self.offered

    def start_if_room(self, message: WakeMessage) -> bool:
        if self.lost:
            raise OSError(errno.EPERM, "refused")
        self.unsubmitted += self.room
        self.messages += [message] * self.room
        return self.room

    def flush(self) -> None:
        if self.taken:
            self.unsubmitted = 0


def mailbox_of(ring: FakeRing) -> Mailbox:
    return Mailbox(cast("Ring", ring))


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def in_a_child_without_stdin(function: Callable[[], Awaitable[None]]) -> int:
    """Run *function* in a child where 0 is the next fd; return its exit status."""

    def run() -> None:
        async def main() -> None:
            os.close(0)
            await function()

        trio.run(main)

    return in_child(run)


async def test_only_the_first_delivery_wakes_the_run() -> None:
    mailbox = Mailbox(None)
    delivered: list[int] = []
    for _ in range(2):
        asked = [mailbox.put(lambda number=number: delivered.append(number)) for number in (1, 2)]
        assert asked == [True, False]
        mailbox.deliver_all()
    assert delivered == [1, 2, 1, 2]
    mailbox.close(drained=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_the_fd_stays_open_for_the_last_message() -> None:
    async def main() -> None:
        ring = FakeRing()
        mailbox = mailbox_of(ring)
        assert [mailbox.acquire_fd(), mailbox.acquire_fd()] == [0, 0]
        mailbox.close(drained=True)
        assert (mailbox.acquire_fd(), ring.forgotten) == (-1, 1)
        for _ in range(2):
            assert is_open(0)
            mailbox.release_fd(0)
        assert not is_open(0)

    assert in_a_child_without_stdin(main) == 0


async def test_without_an_fd_there_is_no_message() -> None:
    for ring in (FakeRing(fds_left=False), None):
        mailbox, table = Mailbox(cast("Ring | None", ring)), FakeTable()
        assert mailbox.acquire_fd() == -1
        assert not mailbox.wake_from(cast("InFlightTable", table))
        assert table.messages == []
        mailbox.close(drained=True)


async def test_a_lost_ring_gets_no_messages_but_its_run_the_deliveries() -> None:
    ring = FakeRing()
    mailbox = mailbox_of(ring)
    fd, delivered = mailbox.acquire_fd(), []
    assert mailbox.last_iteration > 0
    mailbox.put(lambda: delivered.append(1))
    mailbox.ring_lost()
    assert (delivered, mailbox.last_iteration, ring.forgotten) == ([1], 0, 1)
    assert mailbox.acquire_fd() == -1
    assert is_open(fd)  # for the message
    mailbox.release_fd(fd)
    assert not is_open(fd)
    mailbox.close(drained=True)
    assert ring.forgotten == 1
    without_ring = Mailbox(None)
    without_ring.ring_lost()
    without_ring.close(drained=True)


async def test_a_closed_mailbox_delivers_at_once() -> None:
    class Dependent:
        ended = 0

        def run_ended(self, _mailbox: Mailbox) -> None:
            self.ended += 1

    mailbox, dependent, delivered = Mailbox(None), Dependent(), []
    mailbox.dependents.add(dependent)
    mailbox.put(lambda: delivered.append(("first", mailbox.closed)))
    mailbox.put(lambda: delivered.append(("second", mailbox.closed)))
    for _ in range(2):
        mailbox.close(drained=True)
    assert (dependent.ended, delivered) == (1, [("second", True), ("first", True)])
    assert not mailbox.put(lambda: delivered.append(("third", mailbox.closed)))
    assert delivered[2:] == [("third", True)]


@pytest.mark.parametrize(
    ("table", "submitted", "in_flight"),
    [
        (FakeTable(), True, 1),
        (FakeTable(offered=False), False, 0),
        (FakeTable(room=False), False, 0),
        (FakeTable(lost=True), False, 0),
        (FakeTable(taken=False), False, 1),  # its completion releases the fd
    ],
    ids=["works", "not offered", "no room", "ring lost", "not taken"],
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_message_holds_the_fd_while_it_is_in_flight(
    table: FakeTable, submitted: bool, in_flight: int
) -> None:
    async def main() -> None:
        mailbox = mailbox_of(FakeRing())
        assert mailbox.wake_from(cast("InFlightTable", table)) == submitted
        assert len(table.messages) == in_flight
        mailbox.close(drained=True)
        assert is_open(0) == bool(in_flight)
        for message in table.messages:
            message.done()
        assert not is_open(0)

    assert in_a_child_without_stdin(main) == 0


@pytest.mark.parametrize("ended", ["done", "discard"])
@pytest.mark.parametrize("res", [0, -errno.EBADF])
async def test_a_message_that_fails_wakes_the_run_through_its_token(res: int, ended: str) -> None:
    mailbox, delivered = mailbox_of(FakeRing()), []
    mailbox.put(lambda: delivered.append(res))
    operation = operations.msg_ring(mailbox.acquire_fd(), 3)
    message = WakeMessage(cast("InFlightTable", FakeTable()), operation, mailbox=mailbox)
    message.res = res
    getattr(message, ended)()
    await wait_all_tasks_blocked()
    assert delivered == ([res] if res else [])
    mailbox.close(drained=True)
    assert not is_open(operation.fd)
