"""Direct I/O and registered buffers on a real disk, and the errors on other file systems."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from children import in_child
from races import current_manager
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import DirectFile, RegisteredBuffers, RingConfig, open_direct
from trio_uring._files import _direct
from trio_uring._files._spare_buffers import SPARE_SIZE, SpareBuffers, spare_buffers
from trio_uring.lowlevel import RingStatistics, operations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from trio_uring import BufferLease

SIZE: Final = 4096
CONTENT: Final = b"".join(bytes([number]) * SIZE for number in range(16))

pytestmark = pytest.mark.usefixtures("fd_ledger")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file on a file system that supports direct I/O."""
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the temporary directory has no O_DIRECT")
    if not _direct._logical_block_size(file.stat()):
        pytest.skip("the temporary directory is in no block device")
    return file


def statistics() -> RingStatistics:
    found = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(found, RingStatistics)
    return found


async def in_both_ways(test: Callable[[], Awaitable[object]]) -> None:
    """Run *test* in this run, and in a run without a ring."""
    await test()
    await trio.to_thread.run_sync(trio.run, test)


# --- Reading and writing --------------------------------------------------------------------


async def test_registered_buffers(path: Path) -> None:
    with RegisteredBuffers(4, SIZE) as buffers:
        assert buffers.registered
        async with await open_direct(path, "r+") as file:
            for number in range(16):
                with await buffers.lease() as lease:
                    assert await file.read_into_at(lease, number * SIZE) == SIZE
                    assert lease.memory == bytes([number]) * SIZE
                    lease.memory[:] = bytes([number + 100]) * SIZE
                    assert await file.write_at(lease, number * SIZE) == SIZE
            await file.fdatasync()
    assert path.read_bytes() == b"".join(bytes([number + 100]) * SIZE for number in range(16))
    assert statistics().completed["READ_FIXED"] == 16
    assert statistics().completed["WRITE_FIXED"] == 16
    assert statistics().refused == ()


async def test_what_was_written_with_dsync_is_stored(path: Path) -> None:
    async def test() -> None:
        with RegisteredBuffers(1, SIZE) as buffers:
            async with await open_direct(path, "r+") as file:
                with await buffers.lease() as lease, mmap.mmap(-1, SIZE) as memory:
                    lease.memory[:] = b"l" * SIZE
                    assert await file.write_at(lease, 0, dsync=True) == SIZE
                    assert await file.write_at(lease, SIZE) == SIZE
                    assert await file.write_at(memory, 0, dsync=True) == SIZE
                    assert await file.writev_at([memory], 2 * SIZE, dsync=True) == SIZE
        assert path.read_bytes()[: 3 * SIZE] == bytes(SIZE) + b"l" * SIZE + bytes(SIZE)

    await in_both_ways(test)


async def test_memory_that_is_not_registered_will_do(path: Path) -> None:
    async def test() -> None:
        async with await open_direct(path, "r+") as file:
            with mmap.mmap(-1, 2 * SIZE) as memory:
                assert await file.read_into_at(memory, 3 * SIZE) == 2 * SIZE
                assert memory[:] == CONTENT[3 * SIZE : 5 * SIZE]
                assert await file.write_at(memory, 3 * SIZE) == 2 * SIZE
                with memoryview(memory) as view, view[:512] as first, view[512:1024] as second:
                    assert await file.readv_at([first, second], 0) == 1024
                    assert await file.writev_at([second, first], 0) == 1024
            assert await file.read_at(SIZE, SIZE) == CONTENT[SIZE : 2 * SIZE]
            assert await file.read_at(0, 0) == b""

    await in_both_ways(test)


async def test_leases_where_nothing_is_registered(path: Path) -> None:
    """In a run without a ring, and with buffers that are registered with another run's ring."""
    theirs: list[RegisteredBuffers] = []

    async def test() -> None:
        with RegisteredBuffers(1, SIZE) as buffers:
            theirs.append(buffers)
            async with await open_direct(path, "r+") as file:
                with await buffers.lease() as lease:
                    assert await file.read_into_at(lease, SIZE) == SIZE
                    assert lease.memory == CONTENT[SIZE : 2 * SIZE]
                    assert await file.write_at(lease, SIZE) == SIZE
                    assert buffers.registered == trio_uring.lowlevel.on_ring()

    await in_both_ways(test)
    assert not theirs[1].registered

    with RegisteredBuffers(1, SIZE) as buffers:

        async def other_run() -> None:
            async with await open_direct(path) as file:
                with buffers.lease_nowait() as lease:
                    assert await file.read_into_at(lease, SIZE) == SIZE
            assert statistics().completed["READ"] == 1
            assert "READ_FIXED" not in statistics().completed

        def run() -> None:
            trio_uring.run(other_run, ring=RingConfig(require=True))

        await trio.to_thread.run_sync(run)


async def test_the_disk_gets_many_reads_before_the_turn_ends(path: Path) -> None:
    """Or it would be idle while the tasks run."""
    manager = current_manager()
    path.write_bytes(bytes(32 * SIZE))

    class Unsubmitted(trio.abc.Instrument):
        most = 0

        def before_io_wait(self, timeout: float) -> None:
            self.most = max(self.most, manager.ring.unsubmitted)

    async with await trio_uring.open_direct(path) as file:
        unsubmitted = Unsubmitted()
        trio.lowlevel.add_instrument(unsubmitted)
        before = manager.ring.submitted
        async with trio.open_nursery() as nursery:
            for number in range(32):
                nursery.start_soon(file.read_at, SIZE, number * SIZE)
        trio.lowlevel.remove_instrument(unsubmitted)
    assert manager.ring.submitted - before == 32
    assert unsubmitted.most < 8


async def test_the_end_of_the_file_gives_a_short_read(path: Path) -> None:
    path.write_bytes(CONTENT[: SIZE + 100])
    async with await open_direct(path, "r+") as file:
        with RegisteredBuffers(1, 2 * SIZE) as buffers, await buffers.lease() as lease:
            assert await file.read_into_at(lease, 0) == SIZE + 100
            assert await file.read_into_at(lease, 4 * SIZE) == 0
            assert await file.write_at(lease.memory[:SIZE], SIZE) == SIZE
        assert await file.read_at(SIZE, SIZE) == CONTENT[:SIZE]
        await file.truncate(SIZE + 1)
    assert path.stat().st_size == SIZE + 1


async def test_many_tasks_share_few_buffers(path: Path) -> None:
    async def read(number: int) -> None:
        with await buffers.lease() as lease:
            assert await file.read_into_at(lease, number * SIZE) == SIZE
            assert lease.memory == bytes([number]) * SIZE

    with RegisteredBuffers(3, SIZE) as buffers:
        async with await open_direct(path) as file, trio.open_nursery() as nursery:
            for number in [*range(16)] * 20:
                nursery.start_soon(read, number)
        assert buffers.leased == 0
    assert statistics().completed["READ_FIXED"] == 320


async def test_cancelled_reads_end_before_their_buffer_is_given_back(path: Path) -> None:
    with RegisteredBuffers(1, SIZE) as buffers:
        async with await open_direct(path) as file:
            for number in range(200):
                with trio.CancelScope() as scope:
                    lease = await buffers.lease()
                    with lease:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(file.read_into_at, lease, number % 16 * SIZE)
                            await trio.lowlevel.checkpoint()
                            if lease.users:
                                with pytest.raises(BufferError, match="an operation"):
                                    lease.release()
                            scope.cancel()
                assert lease.users == buffers.leased == 0


async def test_cancelled_before_it_begins_it_reads_nothing(path: Path) -> None:
    buffers = RegisteredBuffers(1, SIZE)
    async with await open_direct(path) as file:
        with trio.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(trio.Cancelled):
                await open_direct(path)
            with pytest.raises(trio.Cancelled):
                await buffers.lease()
            with buffers.lease_nowait() as lease, pytest.raises(trio.Cancelled):
                await file.read_into_at(lease, 0)
            await file.read_at(SIZE, 0)
        assert scope.cancelled_caught
    buffers.close()


# --- What is wrong, in words ----------------------------------------------------------------


async def test_what_is_not_aligned_is_refused(path: Path) -> None:
    async def test() -> None:
        async with await open_direct(path, "r+", block_size=512) as file:
            assert (file.block_size, file.memory_alignment) == (512, 512)
            with RegisteredBuffers(1, SIZE + 1) as buffers, await buffers.lease() as lease:
                page = lease.memory[:SIZE]
                cases: list[tuple[Any, int, str]] = [
                    (page, 100, "offset, 100, is not a multiple of 512"),
                    (page[:100], 0, "size, 100, is not a multiple of 512"),
                    (lease, 0, f"size, {SIZE + 1}, is not a multiple of 512"),
                    (lease, 1, "offset, 1, is not a multiple of 512"),
                    (page[16 : 16 + 512], 0, r"address, 0x\w+10, is not a multiple of 512"),
                ]
                for buffer, offset, message in cases:
                    for method in (file.read_into_at, file.write_at):
                        with pytest.raises(ValueError, match=message):
                            await method(buffer, offset)
                with pytest.raises(ValueError, match="address"):
                    await file.readv_at([page[:512], page[512 + 16 : 1024 + 16]], 0)
                for size, offset in ((100, 0), (512, 100), (-1, 0), (512, -512)):
                    with pytest.raises(ValueError, match=r"multiple of 512|0 or more"):
                        await file.read_at(size, offset)

    await in_both_ways(test)


async def test_what_the_kernel_takes_is_what_is_allowed(path: Path) -> None:
    """The kernel also refuses half of the alignment that is reported."""
    async with await open_direct(path) as file:
        with mmap.mmap(-1, 2 * SIZE) as memory, memoryview(memory) as view:
            block = file.block_size
            with view[:block] as buffer:
                assert os.preadv(file.fileno(), [buffer], block) == block
                with pytest.raises(OSError, match="Invalid argument"):
                    os.preadv(file.fileno(), [buffer], block // 2)


@pytest.mark.parametrize("mode", ["", "rw", "rt", "bb", "U", "r++"])
async def test_wrong_modes_are_refused(mode: str, path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        await open_direct(path, mode)


@pytest.mark.parametrize("block_size", [0, -512, 1000])
async def test_wrong_block_sizes_are_refused(block_size: int, path: Path) -> None:
    with pytest.raises(ValueError, match="power of two"):
        await open_direct(path, block_size=block_size)


async def test_modes(path: Path) -> None:
    with pytest.raises(FileExistsError):
        await open_direct(path, "x")
    async with await open_direct(path, "wb") as file:
        assert path.stat().st_size == 0
        with pytest.raises(OSError, match="Bad file descriptor"):
            await file.read_at(SIZE, 0)
    async with await open_direct(path.with_name("new"), "xb+") as file:
        assert await file.read_at(SIZE, 0) == b""
        assert "new" in repr(file)
    assert "closed" in repr(file)
    with pytest.raises(trio.ClosedResourceError):
        await file.read_at(SIZE, 0)
    with pytest.raises(FileNotFoundError) as raised:
        await open_direct(path.with_name("none"))
    assert raised.value.filename == str(path.with_name("none"))


async def test_files_without_direct_io_are_refused() -> None:
    async def test() -> None:
        for name in ("/proc/self/status", "/dev/null"):
            with pytest.raises(OSError, match=r"no direct I/O .*has no O_DIRECT") as raised:
                await open_direct(name)
            assert raised.value.errno == errno.EOPNOTSUPP
            assert raised.value.filename == name

    await in_both_ways(test)


async def test_a_file_system_in_memory_is_refused() -> None:
    fd = os.memfd_create("file")
    try:

        async def test() -> None:
            name = f"/proc/self/fd/{fd}"
            with pytest.raises(OSError, match=r"no direct I/O .*(tmpfs|O_DIRECT)") as raised:
                await open_direct(name)
            assert raised.value.errno == errno.EOPNOTSUPP

        await in_both_ways(test)
    finally:
        os.close(fd)


async def test_a_file_for_which_statx_says_no(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose data ext4 keeps in its journal."""
    plain = operations.statx_alignment

    def zeros(fd: int) -> Any:
        operation = plain(fd)
        operation.decode = lambda _res, _flags: (0, 0)
        return operation

    monkeypatch.setattr(operations, "statx_alignment", zeros)
    with pytest.raises(OSError, match="statx"):
        await open_direct(path)


async def test_statx_and_the_device_agree(path: Path) -> None:
    async with await open_direct(path) as file:
        assert file.block_size % _direct._logical_block_size(path.stat()) == 0


# --- Leases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 0), (-1, 1), (1, -1), (2, 1 << 30)])
async def test_wrong_sizes_are_refused(count: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"between 1 and|1 GiB"):
        RegisteredBuffers(count, size)


async def test_leases_are_aligned_and_apart() -> None:
    with RegisteredBuffers(5, 5000) as buffers:
        leases = [await buffers.lease() for _ in range(5)]
        addresses = sorted(
            operations._operation.address_of_buffer(lease.memory) for lease in leases
        )
        assert all(address % 4096 == 0 for address in addresses)
        assert all(b - a == 8192 for a, b in pairwise(addresses))
        assert buffers.leased == 5
        with pytest.raises(trio.WouldBlock):
            buffers.lease_nowait()
        for lease in leases:
            lease.release()
            lease.release()
            with pytest.raises(RuntimeError, match="given back"):
                _ = lease.memory
        assert buffers.leased == 0


async def test_the_first_in_line_is_the_first_to_get_one() -> None:
    got: list[int] = []

    async def borrow(number: int) -> None:
        with await buffers.lease():
            got.append(number)

    with RegisteredBuffers(1, 1) as buffers:
        async with trio.open_nursery() as nursery:
            first = buffers.lease_nowait()
            for number in range(5):
                nursery.start_soon(borrow, number)
                await wait_all_tasks_blocked()
            first.release()
            with pytest.raises(trio.WouldBlock):
                buffers.lease_nowait()
    assert got == [0, 1, 2, 3, 4]


async def test_cancelled_in_line_a_task_takes_no_buffer() -> None:
    with RegisteredBuffers(1, 1) as buffers:
        lease = buffers.lease_nowait()
        with trio.move_on_after(0) as scope:
            await buffers.lease()
        assert scope.cancelled_caught
        lease.release()
        assert buffers.leased == 0
        buffers.lease_nowait().release()


async def test_closing_while_buffers_are_out_and_tasks_in_line(path: Path) -> None:
    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await buffers.lease()

    buffers = RegisteredBuffers(2, SIZE)
    first, second = buffers.lease_nowait(), buffers.lease_nowait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        first.release()  # handed to a task that does not run before it is closed
        buffers.close()
        buffers.close()
    assert buffers.registered  # one is still out, and works
    async with await open_direct(path) as file:
        assert await file.read_into_at(second, 0) == SIZE
    second.release()
    assert not buffers.registered
    with pytest.raises(trio.ClosedResourceError):
        buffers.lease_nowait()
    with pytest.raises(trio.ClosedResourceError):
        await buffers.lease()


async def test_places_are_used_again() -> None:
    pools = [RegisteredBuffers(1, 1) for _ in range(65)]
    assert [pool.registered for pool in pools] == [True] * 64 + [False]
    assert statistics().refused == ("REGISTER_BUFFERS, 4096 bytes: ENOSPC",)
    for pool in pools:
        pool.close()
    for _ in range(200):
        with RegisteredBuffers(1, 1) as pool:
            assert pool.registered


async def test_it_can_be_closed_after_its_run() -> None:
    pools: list[RegisteredBuffers] = []

    async def leave_open() -> None:
        pools.append(RegisteredBuffers(1, 1))

    def run() -> None:
        trio_uring.run(leave_open, ring=RingConfig(require=True))

    await trio.to_thread.run_sync(run)
    pools[0].close()


def test_outside_a_run_it_is_refused() -> None:
    with pytest.raises(RuntimeError):
        RegisteredBuffers(1, 1)


def test_little_memory_may_be_locked(path: Path) -> None:
    """Then nothing is registered, the statistics say so, and everything works."""

    async def main() -> None:
        with RegisteredBuffers(64, 65536) as buffers:
            assert not buffers.registered
            async with await open_direct(path) as file:
                with await buffers.lease() as lease:
                    assert await file.read_into_at(lease.memory[:SIZE], SIZE) == SIZE
                    assert await file.read_into_at(lease, 0) == min(65536, len(CONTENT))
        assert statistics().completed["READ"] == 2
        assert statistics().refused[-1] == "REGISTER_BUFFERS, 4194304 bytes: ENOMEM"

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        if os.geteuid() == 0:
            os.setuid(65534)  # root may lock what it likes
        trio_uring.run(main, ring=RingConfig(require=True, entries=8, completion_entries=16))

    path.chmod(0o644)
    for parent in list(path.parents)[:3]:  # pytest makes its directories for one user only
        parent.chmod(0o755)
    assert in_child(child) == 0


def test_as_much_as_may_be_locked_is_registered(path: Path) -> None:
    """Further buffers are used unregistered. Released ones make room for others."""
    kib = 1024

    async def read(buffers: RegisteredBuffers) -> None:
        async with await open_direct(path) as file:
            with await buffers.lease() as lease:
                assert await file.read_into_at(lease, 0) == min(256 * kib, len(CONTENT))
                with trio.CancelScope() as scope:  # the only one: the next waits
                    scope.cancel()
                    await buffers.lease()
                assert scope.cancelled_caught

    async def main() -> None:
        room = RegisteredBuffers(1, 256 * kib)
        assert room.registered
        with RegisteredBuffers(1, 256 * kib) as buffers:
            assert not buffers.registered
            await read(buffers)
        await read(room)
        assert statistics().completed["READ"] == statistics().completed["READ_FIXED"] == 1
        room.close()
        while True:  # the kernel lets go of it a while later
            with RegisteredBuffers(1, 256 * kib) as again:
                if again.registered:
                    await read(again)
                    break
            await trio.lowlevel.checkpoint()

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (400 * kib, 400 * kib))
        if os.geteuid() == 0:
            os.setuid(65533)  # root may lock what it likes
        trio_uring.run(main, ring=RingConfig(require=True, entries=8, completion_entries=16))

    path.chmod(0o644)
    for parent in list(path.parents)[:3]:  # pytest makes its directories for one user only
        parent.chmod(0o755)
    assert in_child(child) == 0


def test_it_is_a_resource() -> None:
    assert issubclass(DirectFile, trio.abc.AsyncResource)


async def test_a_direct_file_is_duplicated_and_appended_to(path: Path) -> None:
    async def test() -> None:
        path.write_bytes(CONTENT)
        with RegisteredBuffers(1, SIZE) as buffers, mmap.mmap(-1, SIZE) as memory:
            async with await open_direct(path, "r+") as file, file.dup() as other:
                assert type(other) is DirectFile
                assert other.block_size == file.block_size
                assert await other.append(memory) == len(CONTENT)
                with await buffers.lease() as lease:
                    lease.memory[:] = b"l" * SIZE
                    assert await file.append(lease, dsync=True) == len(CONTENT) + SIZE
                    await other.write_all_at(lease, 0)
                    with pytest.raises(ValueError, match="size"):
                        await file.append(lease.memory[:1])
                assert await file.read_exactly_at(SIZE, 0) == b"l" * SIZE
                await file.truncate(SIZE + 1)
                with pytest.raises(EOFError, match="after 1 of them"):
                    await file.read_exactly_at(SIZE, SIZE)
                with pytest.raises(EOFError, match="after 0 of them"):
                    await file.read_exactly_at(SIZE, 2 * SIZE)

    await in_both_ways(test)


async def test_many_direct_reads_in_one_call(path: Path) -> None:
    async def test() -> None:
        async with await open_direct(path) as file:
            parts = [(SIZE, number * SIZE) for number in range(16)]
            assert b"".join(await file.read_many_at(parts)) == CONTENT
            assert await file.read_many_at([(3 * SIZE, SIZE), (2 * SIZE, 15 * SIZE), (0, 0)]) == [
                CONTENT[SIZE : 4 * SIZE],
                CONTENT[15 * SIZE :],
                b"",
            ]
            assert await file.read_many_at([]) == []
            with pytest.raises(ValueError, match="offset, 1, is not a multiple"):
                await file.read_many_at([(SIZE, 1)])

    await in_both_ways(test)


async def test_direct_reads_use_their_memory_again(path: Path) -> None:
    async with await open_direct(path) as file:

        async def read(number: int) -> None:
            for _ in range(3):
                assert await file.read_at(SIZE, number * SIZE) == CONTENT[number * SIZE :][:SIZE]

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(read, number)
        large = SPARE_SIZE + SIZE
        assert await file.read_at(large, 0) == CONTENT[:large]
    assert statistics().completed["READ_FIXED"] >= 48
    assert len(current_manager().run_state.get(SpareBuffers)._free) == 16


async def test_a_lease_that_was_forgotten_is_reported() -> None:
    buffers = RegisteredBuffers(1, SIZE)
    with pytest.warns(ResourceWarning, match="a BufferLease was not released"):
        buffers.lease_nowait()
    buffers.close()


async def test_a_forgotten_lease_is_given_back(path: Path) -> None:
    with RegisteredBuffers(1, SIZE) as buffers:
        kept = [await buffers.lease()]
        async with await open_direct(path) as file:
            await file.read_into_at(kept[0], 0)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def borrow() -> None:
                with await buffers.lease():
                    assert buffers.leased == 1

            await wait_all_tasks_blocked()
            with pytest.warns(ResourceWarning, match="a BufferLease was not released"):
                await trio.to_thread.run_sync(kept.clear)
        assert buffers.leased == 0


@pytest.mark.parametrize("whole", [True, False])
async def test_a_forgotten_lease_whose_memory_is_used_stays_lent(*, whole: bool) -> None:
    with RegisteredBuffers(1, SIZE) as buffers:
        lease = buffers.lease_nowait()
        used = lease.memory if whole else lease.memory[:1]
        with pytest.warns(ResourceWarning, match="a BufferLease was not released"):
            del lease
        await wait_all_tasks_blocked()
        assert buffers.leased == 1
        used[0] = 1


def test_a_lease_that_is_forgotten_after_the_run() -> None:
    async def main() -> tuple[RegisteredBuffers, list[BufferLease]]:
        buffers = RegisteredBuffers(1, SIZE)
        return buffers, [buffers.lease_nowait()]

    buffers, kept = trio_uring.run(main)
    with pytest.warns(ResourceWarning, match="a BufferLease was not released"):
        kept.clear()
    assert buffers.leased == 0
    buffers.close()


async def test_memory_of_a_released_lease_is_not_used(path: Path) -> None:
    with RegisteredBuffers(1, SIZE) as buffers:
        lease = buffers.lease_nowait()
        memory = lease.memory
        lease.release()
        async with await open_direct(path) as file:
            with pytest.raises(ValueError, match="released memoryview"):
                await file.read_into_at(memory, 0)


@pytest.mark.parametrize("first", ["take", "put_back"])
async def test_spare_buffers_are_not_used_again_once_the_ring_is_lost(first: str) -> None:
    """The kernel may still write to them, for reads that have failed."""
    spare = spare_buffers()
    old = [spare.take() for _ in range(20)]
    spare.put_back(old[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(current_manager(), "fallback_reason", "the run lost its ring")
        new = [spare.take()] if first == "take" else []
        for lease in old[1:]:
            spare.put_back(lease)
        new += [spare.take() for _ in range(40)]
        assert not {lease.pool for lease in old} & {lease.pool for lease in new}
        for lease in new:
            spare.put_back(lease)
        lease = spare.take()
        assert lease in new
        spare.put_back(lease)
