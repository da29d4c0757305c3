"""The pipes of a run, for splice(2), which moves bytes only into a pipe or out of one.

A pipe holds references to pages: nothing is copied.

Which splices go to the ring
----------------------------

Facts. io_uring hands every splice to a kernel worker, which takes 10 µs more than the call itself.
Our pipes and Trio's sockets are non-blocking, so a splice between them never waits. A splice
between a file and a pipe may wait for the disk.

What does this mean for us? Splices between a file and a pipe go to the ring. For a socket and a
pipe we call splice(2) in the loop's thread, where a send would copy as much. Both on the ring, as
one chain, took more than twice the CPU time: 350 µs for 1 MiB over loopback instead of 130
(benchmarks/bench_send_file.py). If the socket is full, or empty, we wait by epoll, so a slow peer
never occupies a worker. The number of pipes is limited. A transfer that finds none free reads and
sends instead of waiting for one, or slow peers would block the others.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from trio_uring import _operations as operations
from trio_uring._engine._io_manager import current_run_state
from trio_uring._engine._run_state import RunResource

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Generator

    from trio_uring._engine._io_manager import UringIOManager

# Pipes in use at once in a run, and so kernel workers that use files for transfers: half of
# RingConfig.unbounded_workers' default. With half or double, one transfer is as fast.
PIPES_MAX: Final = 16
# The most that an unprivileged process may ask for (pipe(7)). Each step costs a task switch and a
# hop to a worker. The default of 64 KiB would need 16 times as many (benchmarks/bench_splice.py).
PIPE_SIZE: Final = 1 << 20
_F_SETPIPE_SZ: Final = 1031  # from linux/fcntl.h; Python has it under another name
_F_GETPIPE_SZ: Final = 1032
_SPLICE_F_NONBLOCK: Final = 2


class Pipe:
    """A pipe of `PIPE_SIZE`, or smaller if the user has too many."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.left = 0  # bytes in it
        with suppress(OSError):  # this user has too many: pipe-user-pages-soft in pipe(7); ENOMEM
            fcntl.fcntl(self._write_fd, _F_SETPIPE_SZ, PIPE_SIZE)
        self.size: int = fcntl.fcntl(self._write_fd, _F_GETPIPE_SZ)

    def fill_from_socket(self, fd: int, size: int) -> int:
        """Move at most *size* bytes out of a socket; 0 at the end, or before urgent data.

        Raises:
          BlockingIOError: the socket has no data now.
          OSError: as recv(2) and splice(2).
        """
        count = os.splice(fd, self._write_fd, size, flags=_SPLICE_F_NONBLOCK)
        self.left += count
        return count

    def empty_into_socket(self, fd: int) -> int:
        """Move as much into a socket as it takes; return how many bytes.

        Raises:
          BlockingIOError: the socket is full.
          OSError: as send(2) and splice(2).
        """
        count = os.splice(self._read_fd, fd, self.left, flags=_SPLICE_F_NONBLOCK)
        self.left -= count
        return count

    async def fill_from_file(self, manager: UringIOManager, fd: int, size: int, offset: int) -> int:
        """Move at most *size* bytes out of a file; 0 at its end. Ignores cancellation.

        Raises:
          OSError: as pread(2) and splice(2).
        """
        operation = operations.splice(
            fd, self._write_fd, size, offset_in=offset, flags=_SPLICE_F_NONBLOCK
        )
        count = await manager.perform_shielded(operation)
        self.left += count
        return count

    async def empty_into_file(self, manager: UringIOManager, fd: int, offset: int) -> int:
        """Move as much into a file as it takes; return how many bytes. Ignores cancellation.

        Raises:
          OSError: as pwrite(2) and splice(2).
        """
        operation = operations.splice(
            self._read_fd, fd, self.left, offset_out=offset, flags=_SPLICE_F_NONBLOCK
        )
        count = await manager.perform_shielded(operation)
        self.left -= count
        return count

    def take_rest(self) -> bytes:
        """Read and return what is left in the pipe."""
        parts = []
        while self.left:
            parts.append(os.read(self._read_fd, self.left))
            self.left -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read_fd)
        os.close(self._write_fd)


class Pipes(RunResource):
    """The pipes of a run: at most `PIPES_MAX` in use. Others are free, for later transfers."""

    def __init__(self) -> None:
        self.free: list[Pipe] = []
        self.in_use = 0
        self._closed = False

    @contextmanager
    def lent(self) -> Generator[Pipe | None]:
        """Lend a pipe; None if `PIPES_MAX` are in use, or there are too many open files."""
        pipe = self._take()
        if pipe is None:
            yield None
            return
        self.in_use += 1
        clean = False
        try:
            yield pipe
            clean = True
        finally:
            self.in_use -= 1
            if clean and not self._closed:
                assert not pipe.left
                self.free.append(pipe)
            else:
                pipe.close()

    def _take(self) -> Pipe | None:
        if self.free:
            return self.free.pop()
        if self.in_use == PIPES_MAX:
            return None
        try:
            return Pipe()
        except OSError:  # EMFILE, ENFILE
            return None

    def close(self, *, drained: bool) -> None:
        """Close the free pipes; those in use are closed when they are given back."""
        self._closed = True
        while self.free:
            self.free.pop().close()


def current_pipes() -> Pipes:
    """Return the pipes of the current run."""
    return current_run_state().get(Pipes)
