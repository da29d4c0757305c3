"""`SqpollCredentials`: whose permissions an SQPOLL thread has.

The thread has the credentials that the process had when the ring was set up, and keeps them. So
after setuid(2) and the like, an operation on a path would be allowed what the process no longer is
(seen on Linux 6.18). Operations on open files need no permission.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trio_uring._operations import Operation


class SqpollCredentials:
    """The credentials of this process at the time when a ring was set up."""

    def __init__(self) -> None:
        self._ids = _ids()

    @property
    def changed(self) -> bool:
        """Whether the process has others now. Capabilities are not looked at."""
        return _ids() != self._ids

    def check(self, operation: Operation[object]) -> None:
        """Raise `PermissionError` if *operation* needs permissions, and the thread has old ones."""
        if operation.filename is not None and self.changed:
            raise PermissionError(
                errno.EPERM,
                "the process has changed its user or groups, and this run's SQPOLL thread still "
                "has the old ones: change them before the run begins",
                operation.filename,
            )


def _ids() -> tuple[object, ...]:
    return os.geteuid(), os.getegid(), os.getgroups()
