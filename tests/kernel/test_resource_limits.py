"""Little address space, a full disk, files that may not grow, and very many operations at once.

Limits of fds and of locked memory are in test_ring_setup.py, of processes in
test_kernel_workers.py.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

import pytest
import trio
from accounting import ByteLedger
from children import output_of, run_python
from races import current_manager, file_size_limit
from transfers import RUNS, connected

import trio_uring
from trio_uring import open_positional, receive_file, write_file
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fd_ledger")


# --- Address space --------------------------------------------------------------------------

ADDRESS_SPACE = """
    import encodings.idna, gc, resource, sys, warnings
    from pathlib import Path
    import scenarios, trio, trio_uring
    from accounting import open_fds

    if sys.version_info < (3, 11):
        from exceptiongroup import BaseExceptionGroup

    warnings.simplefilter("ignore")
    PAGE = resource.getpagesize()

    def limit(free):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (size + free, resource.RLIM_INFINITY))

    def no_limit():
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

    async def main(free=None):
        if free is not None:
            limit(free)
        await scenarios.echo()
        await scenarios.cancel()
        await trio.Path(sys.argv[1]).write_bytes(bytes(100_000))
        return trio.lowlevel.current_statistics().io_statistics.backend

    def leaves(exc):
        if isinstance(exc, BaseExceptionGroup):
            return [leaf for each in exc.exceptions for leaf in leaves(each)]
        return [exc]

    def attempt(free, inside):
        try:
            if not inside:
                limit(free)
            return trio_uring.run(main, free if inside else None)
        except BaseException as exc:
            names = {type(leaf).__name__ for leaf in leaves(exc)}
            # The others are peers of the tasks that failed.
            assert names <= {"MemoryError", "BrokenResourceError"} or "new thread" in str(exc), exc
            return "MemoryError"
        finally:
            no_limit()

    trio_uring.run(main)
    gc.collect()
    before = open_fds()
    for kib in (0, 64, 1024, 4096, 8192, 65536):
        print(attempt(kib * 1024, inside=True), attempt(kib * 1024, inside=False))
        assert trio_uring.run(main) == "io_uring"
        gc.collect()
        assert open_fds() == before, kib
"""


def test_without_address_space_there_is_a_memory_error_and_the_next_run_works(
    tmp_path: Path,
) -> None:
    lines = output_of(run_python(ADDRESS_SPACE, tmp_path / "file", options=()))
    assert "MemoryError" in lines[0]  # in a run, free memory of the process may be enough
    assert lines[-1] == "io_uring io_uring"


# --- Files that cannot grow -----------------------------------------------------------------

SIZE: Final = 1 << 20  # of what is written
ROOM: Final = 300_000  # about as much is there


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Mount a disk with less room than is needed."""
    options = f"size={ROOM}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("it needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


async def through_a_file(path: Path, data: bytes) -> None:
    async with await trio.open_file(path, "wb") as file:
        await file.write(data)


async def through_an_unbuffered_file(path: Path, data: bytes) -> None:
    async with await trio.open_file(path, "wb", buffering=0) as file:
        written = 0
        while written < len(data):
            written += await file.write(data[written:])


async def through_text(path: Path, data: bytes) -> None:
    await trio.Path(path).write_text(data.decode("ascii"), encoding="ascii")


async def at_once(path: Path, data: bytes) -> None:
    await write_file(path, data)


async def at_positions(path: Path, data: bytes) -> None:
    async with await open_positional(path, "w") as file:
        for start in range(0, len(data), 50_000):
            await file.write_at(data[start : start + 50_000], start)


async def from_a_socket(path: Path, data: bytes) -> None:
    with path.open("wb") as file, connected("TCP") as (ours, theirs):
        progress = trio_uring.ReceiveProgress()

        async def send() -> None:
            await theirs.send_all(data)
            await theirs.send_eof()

        failed: OSError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            try:
                await receive_file(ours, file, progress=progress)
            except OSError as exc:
                failed = exc
                nursery.cancel_scope.cancel()
        # What was taken from the socket is in the file or here.
        left = bytes(progress.left)
        assert path.read_bytes() + left == data[: progress.bytes_received + len(left)]
        if failed is not None:
            raise failed


WRITERS: Final = [
    *(through_a_file, through_an_unbuffered_file, through_text),
    *(at_once, at_positions, from_a_socket),
]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("runs_on", RUNS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG], ids=["full disk", "RLIMIT_FSIZE"])
def test_a_file_that_cannot_grow(
    code: int,
    runs_on: str,
    writer: Callable[[Path, bytes], Awaitable[None]],
    tmp_path: Path,
) -> None:
    """What fits is written, in order, the error is that of write(2), and all works afterwards."""
    path = tmp_path / "file"
    data = b"0123456789" * (SIZE // 10)
    disk: AbstractContextManager[None] = nullcontext()
    limited: AbstractContextManager[None] = file_size_limit(ROOM)
    if code == errno.ENOSPC:
        disk, limited = small_disk(tmp_path), nullcontext()

    async def main() -> None:
        with limited:
            with pytest.raises(OSError, match=r"too large|No space") as caught:
                await writer(path, data)
            assert caught.value.errno == code
        found = path.read_bytes()
        assert found == data[: len(found)]
        # A stream from a socket ends on its own: some pages are with the one who received them.
        assert ROOM // 2 <= len(found) <= ROOM + resource.getpagesize()
        path.unlink()
        await writer(path, data[: ROOM // 2])
        assert path.read_bytes() == data[: ROOM // 2]

    with disk:
        RUNS[runs_on](main)


# --- Very many ------------------------------------------------------------------------------

CONNECTIONS: Final = 10_000
QUEUED: Final = 50_000


@contextmanager
def as_many_fds_as_there_may_be() -> Iterator[int]:
    """Yield how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_ten_thousand_busy_connections() -> None:
    """Each has a message under way all the time, and all of them arrive."""
    rounds = 3

    async def send(stream: trio.SocketStream, ledger: ByteLedger) -> None:
        for number in range(rounds):
            await stream.send_all(ledger.take(100 + number))
            await trio.lowlevel.checkpoint()

    async def receive(stream: trio.SocketStream, ledger: ByteLedger) -> None:
        count = 0
        while count < sum(range(100, 100 + rounds)):
            data = await stream.receive_some()
            ledger.received(data)
            count += len(data)

    with as_many_fds_as_there_may_be() as fds, ExitStack() as stack:
        count = min(CONNECTIONS, (fds - 200) // 2)
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                ours, theirs = stack.enter_context(connected("UNIX"))
                ledger = ByteLedger()
                nursery.start_soon(receive, theirs, ledger)
                nursery.start_soon(send, ours, ledger)
        statistics = current_manager().statistics()
        assert statistics.in_flight == 0
        assert statistics.tasks_waiting_read <= 1  # the loop's own


async def test_fifty_thousand_operations_at_once() -> None:
    done = 0

    async def one() -> None:
        nonlocal done
        await perform(operations.nop())
        done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(QUEUED):
            nursery.start_soon(one)
    assert done == QUEUED
    assert current_manager().statistics().in_flight == 0


@pytest.mark.ring(entries=8, completion_entries=8, max_file_operations=2)
async def test_fifty_thousand_operations_that_wait_for_a_limit_are_cancelled(
    tmp_path: Path,
) -> None:
    """None that waits is begun later, and the next finds the limit free."""
    path = tmp_path / "file"
    path.touch()
    done = 0

    async def one() -> None:
        nonlocal done
        await perform(operations.statx(path))
        done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(QUEUED):
            nursery.start_soon(one)
        while current_manager().statistics().waiting_for_limit < QUEUED - 100:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    statistics = current_manager().statistics()
    assert (statistics.in_flight, statistics.waiting_for_limit) == (0, 0)
    assert done + statistics.cancelled <= QUEUED
    await one()
