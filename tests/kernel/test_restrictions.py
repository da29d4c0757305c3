"""``RingConfig(allowed_operations=...)``: the kernel refuses all others."""

from __future__ import annotations

import errno
import socket as stdlib_socket
from typing import TYPE_CHECKING

import pytest
import trio
from outcome import Value
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import (
    OperationCancelledError,
    RegisteredBuffers,
    RingConfig,
    SQPoll,
    perform_many,
)
from trio_uring._transfers import _send_file
from trio_uring.lowlevel import RingStatistics, operations, perform

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fd_ledger")

NOTHING = frozenset[str]()
SOCKETS = frozenset({"RECV", "SEND"})


def statistics() -> RingStatistics:
    found = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(found, RingStatistics)
    return found


async def use_what_is_allowed() -> None:
    ours, theirs = stdlib_socket.socketpair()
    with theirs, trio.socket.from_stdlib_socket(ours) as sock:
        assert await perform(operations.send(sock.fileno(), b"x")) == 1
        assert theirs.recv(2) == b"x"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sock.recv, 1)
            await wait_all_tasks_blocked()
            theirs.send(b"x")
        with trio.CancelScope() as scope:
            scope.cancel()
            await sock.recv(1)
        assert scope.cancelled_caught


async def try_what_is_not() -> None:
    before = statistics().completed.get("NOP", 0)
    for operation in (operations.openat("/dev/null", 0, 0), operations.pipe()):
        with pytest.raises(PermissionError, match=r"may not perform (OPENAT|PIPE)") as raised:
            await perform(operation)
        assert raised.value.errno == errno.EACCES
    await perform(operations.nop())
    assert statistics().completed["NOP"] == before + 1


@pytest.mark.ring(allowed_operations=SOCKETS)
async def test_a_restricted_run_refuses_what_is_not_allowed() -> None:
    await use_what_is_allowed()
    await try_what_is_not()
    assert statistics().refused == ()
    assert "R_DISABLED" not in statistics().setup_flags
    assert {"SINGLE_ISSUER", "DEFER_TASKRUN"} <= set(statistics().setup_flags)


@pytest.mark.ring(allowed_operations=SOCKETS, sqpoll=SQPoll(idle=0.001))
async def test_a_restricted_run_may_have_a_polling_thread() -> None:
    await use_what_is_allowed()
    await try_what_is_not()


@pytest.mark.ring(allowed_operations=NOTHING)
async def test_a_run_that_allows_nothing_works() -> None:
    """Except what every run needs: wake-ups, other threads, registration of memory."""
    await try_what_is_not()
    assert await trio.to_thread.run_sync(int) == 0
    with RegisteredBuffers(1, 1) as buffers:
        assert buffers.registered
    ours, theirs = stdlib_socket.socketpair()
    with ours, theirs, pytest.raises(PermissionError, match="may not perform SEND"):
        await perform(operations.send(ours.fileno(), b"x"))


async def test_by_default_all_is_allowed(tmp_path: Path) -> None:
    await perform(operations.mkdirat(tmp_path / "directory"))
    assert statistics().completed["MKDIRAT"] == 1


@pytest.mark.parametrize(
    ("allowed", "error"),
    [
        (["RECV"], TypeError),
        ({"RECV"}, TypeError),
        ("RECV", TypeError),
        (True, TypeError),
        (frozenset("RECV"), ValueError),
        (frozenset({"recv"}), ValueError),
        (frozenset({"IORING_OP_RECV"}), ValueError),
        (frozenset({"RECV", ""}), ValueError),
        (frozenset({"RECV", 27}), ValueError),
        (frozenset({1, "a", None}), ValueError),
    ],
)
def test_wrong_settings_are_refused(allowed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="allowed_operations"):
        RingConfig(allowed_operations=allowed)  # type: ignore[arg-type]


@pytest.mark.ring(allowed_operations=NOTHING)
async def test_a_batch_is_restricted_too() -> None:
    """Forbidden operations and their chains fail. All others are performed."""
    nop = operations.nop
    outcomes = await perform_many(
        [nop(), operations.fsync(0), operations.linked([nop(), operations.pipe(), nop()]), nop()]
    )
    assert outcomes[0] == outcomes[5] == Value(None)
    for number, error in (
        (1, PermissionError),
        (2, OperationCancelledError),
        (3, PermissionError),
        (4, OperationCancelledError),
    ):
        with pytest.raises(error):
            outcomes[number].unwrap()


@pytest.mark.ring(allowed_operations=SOCKETS)
async def test_a_forbidden_operation_of_a_file_or_transfer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what is forbidden. They neither hang nor use another route."""
    # What is in the page cache needs no operation.
    monkeypatch.setattr(_send_file, "is_cached", lambda *_args: False)
    path = tmp_path / "file"
    path.write_bytes(b"data")
    with pytest.raises(PermissionError, match="may not perform"):
        async with await trio.open_file(path, "wb") as file:
            await file.write(b"x")
    ours, theirs = stdlib_socket.socketpair()
    sock = trio.socket.from_stdlib_socket(ours)
    with sock, theirs, path.open("rb") as opened, pytest.raises(PermissionError, match="may not"):
        await trio_uring.send_file(sock, opened)


def test_a_restricted_run_works_as_a_plain_one() -> None:
    config = RingConfig(require=True, allowed_operations=SOCKETS)
    trio_uring.run(try_what_is_not, ring=config)
