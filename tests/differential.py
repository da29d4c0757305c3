"""Runs a scenario on plain Trio and on a ring, and compares the outcomes of all calls.

There are three ways to run it: plain Trio, without this package's patches; with the patches, in a
run without a ring; and on a ring.
"""

from __future__ import annotations

import socket as stdlib_socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import trio
from trio.lowlevel import current_task
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig
from trio_uring._streams import _fd_stream, _listener, _socket_stream
from trio_uring._streams._socket import UringSocket
from trio_uring._trio_private import (
    FdStream,
    TrioSocket,
    patch_listener,
    patch_socket_type,
    set_stream_methods,
    trio_run_handler,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

WAYS: Final = ("plain", "unused", "ring")

# (what was done, what came of it)
Entry = tuple[str, object]


class Log:
    """The calls of a scenario and their outcomes, in terms that do not depend on the run."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._names: dict[str, str] = {}

    def name(self, value: object, name: str) -> None:
        """Log *value* as *name* from now on, such as a port that the kernel chose."""
        self._names[repr(value)] = name

    def note(self, what: str, value: object) -> None:
        """Log something that is not a call."""
        self.entries.append((what, self._described(value)))

    async def call(self, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """Make a call, log its outcome, and return its value, or None.

        A call that waits is cancelled, and its outcome is that it waits.
        """
        found: list[object] = []
        values: list[Any] = []

        async def make() -> None:
            task = current_task()
            before = task._cancel_points, task._schedule_points
            try:
                value = await call()
            except Exception as exc:  # noqa: BLE001 (whatever it is, it is the outcome)
                found.append(self._described(exc))
            else:
                # Whether it was a checkpoint, in both senses.
                cancel = task._cancel_points > before[0]
                schedule = task._schedule_points > before[1]
                values.append(value)
                found.append((self._described(value), cancel, schedule))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make)
            await wait_all_tasks_blocked()
            if not found:
                nursery.cancel_scope.cancel()
        # Cancelled, and yet it came to something: then it was done in that moment.
        self.entries.append((what, found[0] if found else "waits"))
        return values[0] if values else None

    def _described(self, value: object) -> object:
        match value:
            case BaseException():
                kind = type(value)
                number = getattr(value, "errno", None)
                causes = [self._described(each) for each in (_shown_with(value),) if each]
                return kind.__name__, number, self._renamed(repr(value.args)), causes
            case trio.socket.SocketType() | stdlib_socket.socket():
                return self._described_socket(value)
            case tuple() | list():
                if repr(value) in self._names:
                    return self._names[repr(value)]
                return type(value)(self._described(item) for item in value)
            case _:
                return self._names.get(repr(value), (type(value).__name__, value))

    def _described_socket(self, sock: Any) -> object:
        return (
            sock.family,
            sock.type,
            sock.proto,
            self._described(sock.getsockname()),
            stdlib_socket.socket.get_inheritable(getattr(sock, "_sock", sock)),
        )

    def _renamed(self, text: str) -> str:
        for value, name in self._names.items():
            text = text.replace(value, name)
        return text


def _shown_with(exc: BaseException) -> BaseException | None:
    """Return the exception that a traceback shows before *exc*."""
    return exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)


def run_in(way: str, scenario: Callable[[Log], Awaitable[None]]) -> list[Entry]:
    """Run *scenario* in one of the `WAYS`, and return its log."""
    log = Log()
    if way == "ring":
        trio_uring.run(scenario, log, ring=RingConfig(require=True))
    elif way == "unused":
        trio.run(scenario, log)
    else:
        with _without_us():
            trio.run(scenario, log)
    return log.entries


@contextmanager
def _without_us() -> Iterator[None]:
    # Whichever engine's they are.
    streams = (FdStream, trio.SocketStream)
    ours = [(stream, stream.receive_some, stream.send_all) for stream in streams]
    patch_socket_type(TrioSocket)
    patch_listener(_listener._trio_accept, trio_run_handler)
    set_stream_methods(FdStream, _fd_stream._trio_receive_some, _fd_stream._trio_send_all)
    set_stream_methods(
        trio.SocketStream, _socket_stream._trio_receive_some, _socket_stream._trio_send_all
    )
    try:
        yield
    finally:
        patch_socket_type(UringSocket)
        patch_listener(_listener.accept, _listener.run_handler)
        for stream, receive_some, send_all in ours:
            set_stream_methods(stream, receive_some, send_all)


def check_same(scenario: Callable[[Log], Awaitable[None]]) -> None:
    """Fail if *scenario* has other outcomes on a ring than on plain Trio."""
    logs = {way: run_in(way, scenario) for way in ("ring", "unused", "plain")}
    for way in ("unused", "ring"):
        differences = [
            f"{plain[0]}\n    plain: {plain[1]}\n    {way:5}: {other[1]}"
            for plain, other in zip(logs["plain"], logs[way], strict=True)
            if plain != other
        ]
        assert not differences, "\n".join([f"{len(differences)} differ:", *differences])
