"""Shows a program's runs to ``trio-uring top`` and ``dump``, if TRIO_URING_INSPECT is 1.

A thread of the program listens on a UNIX socket. Whoever connects sends how many tasks of each run
it wants to see, gets the runs as JSON, and can do nothing else.

Who may connect
---------------

Facts. The socket's name is in the abstract namespace: no directory and no permissions guard it, and
any process of the same network namespace may connect, or take the name first. For a connection, the
kernel tells each side the pid and the user of the other (SO_PEERCRED).

What does this mean for us? The thread answers only its own user and root, who can read the memory
of the process anyway. The client checks that it was the process that it asked for who listened.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
import traceback
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from ._engine._io_manager import UringIOManager
from ._snapshot import take_snapshot
from ._trio_private import ObservedRun

if TYPE_CHECKING:
    from ._snapshot import RunInfo

_VARIABLE: Final = "TRIO_URING_INSPECT"
_WORDS: Final = {"": False, "0": False, "off": False, "1": True, "on": True}

# A peer that sends or reads nothing is left after this time, and so is a loop that does not answer.
_PEER_SECONDS: Final = 5.0
_LOOP_SECONDS: Final = 1.0
_REQUEST_BYTES_MAX: Final = 16
_BACKLOG: Final = 8

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


def address_of(pid: int) -> str:
    """Return the address of the socket of process *pid*, in the abstract namespace."""
    return f"\0trio_uring/inspect/{pid}"


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Return the pid and the user of the process at the other end of a UNIX socket."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(found)
    return pid, user


def inspection_is_on() -> bool:
    """Return whether TRIO_URING_INSPECT is 1.

    Raises:
      ValueError: it has a word that says neither yes nor no.
    """
    word = os.environ.get(_VARIABLE, "").strip().lower()
    if word not in _WORDS:
        raise ValueError(f"{_VARIABLE} is {word!r}: it takes 1, on, 0 or off")
    return _WORDS[word]


class _Run:
    """A run that can be seen. It is made in the run's thread, with its *io_manager*."""

    def __init__(self, io_manager: object) -> None:
        self.run = ObservedRun(io_manager)
        self._thread = threading.current_thread()

    def look(self, tasks_max: int) -> RunInfo | None:
        """Return what the run is doing, or None if it has not begun or has ended."""
        found: list[RunInfo] = []
        taken = threading.Event()

        def take() -> None:
            # In the run's loop, where an exception would end the run.
            with suppress(Exception):
                self._add(found, tasks_max)
            taken.set()

        if not self.run.run_soon(take):
            return None
        if taken.wait(_LOOP_SECONDS):
            return found[0] if found else None
        busy: list[RunInfo] = []
        with suppress(RuntimeError):  # the loop runs again, and has changed a dict
            self._add(busy, tasks_max)
        for info in busy:
            frame = sys._current_frames().get(self._thread.ident or 0)  # noqa: SLF001 (documented)
            info["busy_in"] = traceback.format_stack(frame)
            return info
        return None

    def _add(self, infos: list[RunInfo], tasks_max: int) -> None:
        manager, root = self.run.io_manager(), self.run.root_task()
        if manager is not None and root is not None:
            infos.append(take_snapshot(self._thread.name, manager, root, tasks_max))


class _Inspection:
    """The runs of this process, and the thread that shows them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: list[_Run] = []
        self.listener: socket.socket | None = None

    def add(self, io_manager: object) -> None:
        """Show the run of *io_manager*, until it ends. Called in its thread."""
        with self._lock:
            self._runs = [each for each in self._runs if each.run.io_manager() is not None]
            self._runs.append(_Run(io_manager))
            if self.listener is None:
                self._start()

    def _start(self) -> None:
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address_of(os.getpid()))
            listener.listen(_BACKLOG)
            threading.Thread(
                target=self._serve, args=(listener,), name="trio_uring inspection", daemon=True
            ).start()
            stack.pop_all()
        self.listener = listener

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # too many open files
                time.sleep(_LOOP_SECONDS)
                continue
            with connection, suppress(OSError, ValueError):
                if peer_credentials(connection)[1] in {os.geteuid(), 0}:
                    connection.settimeout(_PEER_SECONDS)
                    tasks_max = int(connection.recv(_REQUEST_BYTES_MAX))
                    connection.sendall(json.dumps(self._look(tasks_max)).encode())

    def _look(self, tasks_max: int) -> list[RunInfo]:
        return [info for each in tuple(self._runs) if (info := each.look(tasks_max)) is not None]


_inspection: _Inspection = _Inspection()


def _start_anew() -> None:
    """Forget the runs and the thread, which are the parent's, in a forked child."""
    global _inspection
    if _inspection.listener is not None:
        _inspection.listener.close()
    _inspection = _Inspection()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_start_anew)


def show_run(io_manager: object) -> None:
    """Show the run of *io_manager*, which begins, to `trio-uring top` and `dump`, if asked to.

    Raises:
      ValueError: the environment asks in an unknown word.
      OSError: there is no room for a socket, or another process has taken its name.
      RuntimeError: there is no room for a thread.
    """
    if inspection_is_on():
        if isinstance(io_manager, UringIOManager):
            io_manager.time_operations()
        _inspection.add(io_manager)
