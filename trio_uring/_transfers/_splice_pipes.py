"""The pipes of a run, for splices: the kernel moves bytes between two files only through one.

What goes through a pipe are references to pages; nothing is copied.

Which splices go to the ring
----------------------------

Facts. io_uring hands every splice to a kernel worker: 10 µs more than the call itself takes. Our
pipes and Trio's sockets are non-blocking, so that a splice between them never waits. One that
reads or writes a file may wait for the disk.

What does this mean for us? Between file and pipe the ring does it. Between socket and pipe we
call splice(2), in the loop's own thread, where a send would copy as much. As long as `send_file`
had both done by workers, as one chain, it took more than twice the CPU time: 350 µs for 1 MiB
over loopback instead of 130 (benchmarks/bench_send_file.py). If the socket is full, or empty, we
wait by epoll, so a slow peer never holds a worker. Pipes are few; who finds none left takes the
bytes through the program instead of waiting for one, or slow peers would stop the others.
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

# Pipes in use at once in a run, and so kernel workers that use files for us: half of
# RingConfig.unbounded_workers' default. With half, or double, of it, one transfer is as fast.
PIPES_MAX: Final = 16
# The most that an unprivileged process may ask for (pipe(7)). A step costs a task switch and a
# worker hop: with the default of 64 KiB, 16 times as often (benchmarks/bench_splice.py).
PIPE_SIZE: Final = 1 << 20
_F_SETPIPE_SZ: Final = 1031  # from linux/fcntl.h; Python has it under another name
_F_GETPIPE_SZ: Final = 1032
_SPLICE_F_NONBLOCK: Final = 2


class Pipe:
    """A pipe, as large as we may make it."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.left = 0  # bytes in it
        with suppress(OSError):  # this user has too many: pipe-user-pages-soft in pipe(7); ENOMEM
            fcntl.fcntl(self._write_fd, _F_SETPIPE_SZ, PIPE_SIZE)
        self.size: int = fcntl.fcntl(self._write_fd, _F_GETPIPE_SZ)

    def fill_from_socket(self, fd: int, size: int) -> int:
        """Take at most *size* bytes out of a socket; 0 at the end, or before urgent data.

        Raises:
          BlockingIOError: there is nothing now.
          OSError: as recv(2) and splice(2).
        """
        count = os.splice(fd, self._write_fd, size, flags=_SPLICE_F_NONBLOCK)
        self.left += count
        return count

    def empty_into_socket(self, fd: int) -> int:
        """Give a socket as much as it takes; returns how many bytes.

        Raises:
          BlockingIOError: it is full.
          OSError: as send(2) and splice(2).
        """
        count = os.splice(self._read_fd, fd, self.left, flags=_SPLICE_F_NONBLOCK)
        self.left -= count
        return count

    async def fill_from_file(self, manager: UringIOManager, fd: int, size: int, offset: int) -> int:
        """Take at most *size* bytes out of a file; 0 is its end. Not cancelled midway.

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
        """Write what a file takes at once; returns how many bytes. Not cancelled midway.

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
        """Return what is left in it, which is empty then."""
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
    """The pipes of a run: at most `PIPES_MAX` in use, and those that are not kept for later."""

    def __init__(self) -> None:
        self.free: list[Pipe] = []
        self.in_use = 0
        self._closed = False

    @contextmanager
    def lent(self) -> Generator[Pipe | None]:
        """Lend a pipe; None if all are in use, or no more fds are to be had."""
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
        """Close the pipes that are not lent now, and the others when they come back."""
        self._closed = True
        while self.free:
            self.free.pop().close()


def current_pipes() -> Pipes:
    """Return the current run's."""
    return current_run_state().get(Pipes)
