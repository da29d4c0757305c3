"""`OwnedFd`: a file descriptor that many tasks use, and that is closed after the last of them."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from trio.lowlevel import (
    ParkingLot,
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
)

from trio_uring._arguments import check_count
from trio_uring._engine._file_systems import FileSystem, file_system_of
from trio_uring._errors import UnsupportedOpcodeError

from ._bridge import current_files
from ._raw import IN_WORKER_MIN

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from trio_uring._operations import Operation

    from ._bridge import FilesRun

T = TypeVar("T")

_CLOSED: Final = -1


class OwnedFd(trio.abc.AsyncResource):
    """A file descriptor, how it is closed, and the ways of its calls: ring, direct or thread."""

    def __init__(
        self, fd: int, name: str | bytes | int | None = None, *, closefd: bool = True
    ) -> None:
        self.name: str | bytes | int = fd if name is None else name
        self._appends = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)
        self._fd = fd
        self._closefd = closefd
        self._users = 0
        self._waiters = ParkingLot()
        self._has_server = file_system_of(fd) is FileSystem.SERVER
        self._written = 0  # bytes
        # Held where the file's position is used, which duplicates of the fd share.
        self._position = trio.Lock()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self._fd
        return f"<trio_uring.{type(self).__name__} {self.name!r}, {state}>"

    def fileno(self) -> int:
        """Return the file descriptor, which the object still owns; -1 after `aclose`."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `aclose` has begun."""
        return self._fd == _CLOSED

    def dup(self) -> Self:
        """Return another object for the same open file, with an fd of its own. Does not block.

        Each of the two must be closed. They share the flags of the file and its locks.

        Raises:
          OSError: ``EMFILE``.
          trio.ClosedResourceError: the file is closed.

        Source: dup(2).
        """
        other = self._with_fd(os.dup(self._check()))
        other._position = self._position  # noqa: SLF001 (the same class)
        return other

    def _with_fd(self, fd: int) -> Self:
        return type(self)(fd, self.name)

    # ---- Closing ---------------------------------------------------------------------------

    @enable_ki_protection
    async def aclose(self) -> None:
        """Wait for the calls that other tasks have begun, and close the file.

        Calls that begin later raise `trio.ClosedResourceError`. If cancelled, the file is closed
        nevertheless.

        Raises:
          OSError: ``EIO``, ``ENOSPC``, ``EDQUOT``, from file systems that write data when a file is
            closed.

        Source: close(2).
        """
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            with trio.CancelScope(shield=True):
                if self._users:
                    await self._waiters.park()
                if self._closefd:
                    await self._close(fd)
        await trio.lowlevel.checkpoint()

    async def _close(self, fd: int) -> None:
        # For the reasons that `RingFileIO.close` has.
        files = current_files()
        if files is None or self._has_server or self._written > IN_WORKER_MIN:
            await trio.to_thread.run_sync(os.close, fd)
        else:
            os.close(fd)
            files.manager.ring.flush()

    # ---- Helpers ---------------------------------------------------------------------------

    def _check(self, offset: int = 0) -> int:
        if self._fd == _CLOSED:
            raise trio.ClosedResourceError("the file is closed")
        if type(offset) is not int or offset < 0:
            check_count("offset", offset)
        return self._fd

    @enable_ki_protection
    async def _call(
        self,
        operation: Callable[..., Operation[None]],
        function: Callable[..., object],
        *args: int,
        fd: int | None = None,
    ) -> None:
        """Perform an operation; without a ring, call the blocking *function* in a thread.

        *fd* is for the end of a call, which goes on while the file closes.
        """
        await checkpoint_if_cancelled()
        if fd is None:
            fd = self._check()
        files = current_files()
        if files is not None:
            try:
                return await self._perform(files, operation(fd, *args))
            except UnsupportedOpcodeError:  # ftruncate, before Linux 6.9
                files.in_thread += 1
            except OSError as exc:
                if exc.errno != errno.EFBIG:
                    raise
                # SIGXFSZ was delivered to the kernel worker, and lost. A thread's is not.
        await self._in_thread(function, fd, *args)
        return None

    @enable_ki_protection
    async def _call_directly(self, function: Callable[..., T], *args: object) -> T:
        """Call *function*, which does not wait unless the file has a server; then in a thread."""
        await checkpoint_if_cancelled()
        fd = self._check()
        if self._has_server:
            return await self._in_thread(function, fd, *args)
        result = function(fd, *args)
        files = current_files()
        if files is not None:
            files.inline += 1
        await cancel_shielded_checkpoint()
        return result

    async def _perform(self, files: FilesRun, operation: Operation[T]) -> T:
        self._users += 1
        try:
            result = await files.manager.perform(operation)
        finally:
            self._leave()
        files.on_ring += 1
        return result

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        self._users += 1
        try:
            return await trio.to_thread.run_sync(function, *args)
        finally:
            self._leave()

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._waiters.unpark_all()
