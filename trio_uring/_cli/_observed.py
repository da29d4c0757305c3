"""Asks a running program what its runs are doing: the client of `trio_uring._inspection`."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from trio_uring._inspection import address_of, peer_credentials

if TYPE_CHECKING:
    from trio_uring._snapshot import RunInfo

_SECONDS: Final = 15.0
_CHUNK: Final = 1 << 16


class NotObservedError(Exception):
    """A process does not say what it is doing. The message says what to do."""


def look_at(pid: int, tasks_max: int) -> list[RunInfo]:
    """Return what the runs of process *pid* are doing, with at most *tasks_max* tasks of each.

    Raises:
      NotObservedError: it does not tell.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.connect(address_of(pid))
            answer = _ask(connection, pid, tasks_max)
        except ConnectionRefusedError:
            raise NotObservedError(_why_nobody_listens(pid)) from None
        except TimeoutError:
            raise NotObservedError(f"process {pid} does not answer: it may be stopped") from None
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    if not answer:
        raise NotObservedError(
            f"process {pid} answers only the user that it runs as, and root: become one of them"
        )
    return cast("list[RunInfo]", json.loads(answer))


def _ask(connection: socket.socket, pid: int, tasks_max: int) -> bytes:
    listener, _ = peer_credentials(connection)
    if listener != pid:
        raise NotObservedError(f"process {listener} has taken the place of process {pid}")
    connection.sendall(str(tasks_max).encode())
    parts: list[bytes] = []
    while part := connection.recv(_CHUNK):
        parts.append(part)
    return b"".join(parts)


def _why_nobody_listens(pid: int) -> str:
    if not Path(f"/proc/{pid}").exists():
        return f"there is no process {pid}"
    return (
        f"process {pid} shows no run: start it with TRIO_URING_INSPECT=1 in its environment, on a "
        "ring (TRIO_URING=1); of a server with workers, name a worker; ask inside of its container"
    )


def duration(seconds: float) -> str:
    """Return *seconds* in a unit that people read."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def command_of(pid: int) -> str:
    """Return the command line of process *pid*; empty if that cannot be read."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return " ".join(words.decode(errors="replace").split("\0")).strip()
