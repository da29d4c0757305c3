"""`open_positional`: opens a `PositionalFile`."""

from __future__ import annotations

import os
import sys

import trio
from trio.lowlevel import checkpoint_if_cancelled

from trio_uring._arguments import check_path

from ._bridge import current_files
from ._modes import flags_of
from ._open import open_fd
from ._positional import PositionalFile


async def open_positional(
    file: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int,
    mode: str = "r",
    *,
    permissions: int = 0o666,
    flags: int = 0,
    closefd: bool = True,
) -> PositionalFile:
    """Open a file for positional reads and writes, by any number of tasks at once.

    Works in every run. In a run without a ring, the file's methods use threads.

    Args:
      file: The path of a regular file or a block device; or the fd of an open one, for which
        *mode*, *permissions* and *flags* have no effect.
      mode: As for `open`: ``"r"``, ``"w"`` (creates or truncates the file), ``"x"`` (creates it) or
        ``"a"`` (appends), with ``"+"`` for both reading and writing. The file is always binary.
      permissions: Of a file that is created, before the umask is applied.
      flags: More flags for `os.open`: `os.O_DSYNC`, `os.O_NOFOLLOW`, ... ``"r+"`` with `os.O_CREAT`
        creates the file if it does not exist, and does not truncate it. Child processes do not
        inherit the file.
      closefd: False if *file* is an fd which `PositionalFile.aclose` shall not close.

    Returns:
      The open file. Close it with ``async with`` or `PositionalFile.aclose`.

    Raises:
      OSError: as `os.open`, with its ``filename``; ``EBADF`` for an fd that is not open.
      TypeError: *mode* is not a string.
      ValueError: *mode* is none of these, or *flags* contradict it; *closefd* is False for a path.

    A checkpoint. If cancelled before it begins, nothing happens. Once begun, it completes.

    Source: io_uring_prep_openat(3), open(2).
    """
    all_flags = flags_of(mode, flags)
    if isinstance(file, int):
        await trio.lowlevel.checkpoint()
        return PositionalFile(file, closefd=closefd)
    if not closefd:
        raise ValueError("closefd must be True for a path: nobody else would close the file")
    name = check_path("file", file)
    files = current_files()
    if files is None:
        fd = await trio.to_thread.run_sync(os.open, name, all_flags, permissions)
    else:
        await checkpoint_if_cancelled()
        sys.audit("open", name, None, all_flags)
        fd = await open_fd(files.manager, name, all_flags, permissions)
    return PositionalFile(fd, name)
