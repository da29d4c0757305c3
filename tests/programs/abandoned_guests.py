"""Guest runs whose host stops early, each in a new process. Trio leaves them to the collector."""

from __future__ import annotations

import gc
import queue
import socket
import threading
from typing import TYPE_CHECKING, Any

import trio
from children import in_thread
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig
from trio_uring._engine._io_manager import UringIOManager, _leaked
from trio_uring._trio_private import current_io_manager
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import outcome

REQUIRED = RingConfig(require=True)


class Host:
    """The smallest loop that can host a guest run."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.outcomes: list[outcome.Outcome[Any]] = []

    def start(
        self, main: Callable[..., Awaitable[Any]], *args: Any, ring: RingConfig = REQUIRED
    ) -> None:
        trio_uring.start_guest_run(
            main,
            *args,
            run_sync_soon_threadsafe=self.calls.put,
            done_callback=self.outcomes.append,
            ring=ring,
        )

    def turn(self) -> None:
        """Make one call of the guest or of others."""
        self.calls.get()()

    def turn_until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.turn()

    def run(self, main: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        self.start(main, *args, **kwargs)
        self.turn_until(lambda: self.outcomes)
        return self.outcomes[0].unwrap()


class Abandoned:
    """A guest run whose host stops while operations are in flight."""

    def __init__(self) -> None:
        self.buffer = bytearray(100)
        self.sock, self.peer = socket.socketpair()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.managers: list[UringIOManager] = []

    async def main(self) -> None:
        manager = current_io_manager()
        assert isinstance(manager, UringIOManager)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operations.recv(self.sock.fileno(), self.buffer))
            nursery.start_soon(perform, operations.accept(self.listener.fileno()))
            nursery.start_soon(perform, operations.timeout(60 * 10**9))
            await wait_all_tasks_blocked()
            self.managers.append(manager)
            # A worker thread that is asleep would keep the run from being collected.
            while True:
                await trio.lowlevel.checkpoint()

    def start(self) -> None:
        host = Host()
        host.start(self.main)
        host.turn_until(lambda: self.managers)
        for _ in range(5):
            host.turn()

    @property
    def manager(self) -> UringIOManager:
        [manager] = self.managers
        return manager

    def is_pinned(self) -> bool:
        try:
            self.buffer.append(0)
        except BufferError:
            return True
        return False


def collected_in_its_own_thread() -> None:
    abandoned = Abandoned()
    abandoned.start()
    gc.collect()
    assert abandoned.manager.ring.closed
    assert abandoned.manager.statistics().in_flight == 0
    assert not abandoned.is_pinned()
    abandoned.sock.close()
    assert abandoned.peer.recv(1) == b""


def collected_in_another_thread() -> None:
    abandoned = Abandoned()
    in_thread(abandoned.start)
    gc.collect()
    assert abandoned.manager.ring.closed
    # The kernel may still write there, so it is never freed.
    assert len(_leaked) == 1
    assert abandoned.is_pinned()


def collected_in_a_thread_with_the_identity_of_its_own() -> None:
    abandoned = Abandoned()
    identities = []

    def start() -> None:
        identities.append(threading.get_ident())
        abandoned.start()

    def collect() -> bool:
        if threading.get_ident() != identities[0]:
            return False
        gc.collect()
        return True

    gc.disable()
    in_thread(start)
    assert any(in_thread(collect) for _ in range(100))
    assert abandoned.manager.ring.closed
    assert len(_leaked) == 1
    assert abandoned.is_pinned()


def collected_with_a_connection_that_nobody_took() -> None:
    abandoned = Abandoned()
    client = socket.socket()

    def start() -> None:
        host = Host()
        host.start(abandoned.main)
        host.turn_until(lambda: abandoned.managers)
        client.connect(abandoned.listener.getsockname())
        client.setblocking(False)
        host.turn_until(fetched)

    def fetched() -> bool:
        # A list: get_events() has returned it, and process_events() has not begun.
        unprocessed = abandoned.manager._undispatched
        return isinstance(unprocessed, list) and any(res > 0 for _, res, _ in unprocessed)

    start()
    gc.collect()
    assert abandoned.manager.statistics().in_flight == 0
    assert client.recv(1) == b""  # it was closed


def called_after_its_end() -> None:
    abandoned = Abandoned()
    abandoned.start()
    table = abandoned.manager._entries
    entries = [entry for entry in table.values() if entry.task is not None]
    assert len(entries) == 3
    gc.collect()
    assert abandoned.manager.ring.closed
    for entry in entries:
        entry.cancel_asked = False
        entry.abort(lambda: None)  # type: ignore[arg-type, return-value]
    abandoned.manager.notify_closing(abandoned.sock.fileno())
    assert abandoned.manager.statistics().backend == "io_uring"


ABANDONED_GUESTS = (
    collected_in_its_own_thread,
    collected_in_another_thread,
    collected_in_a_thread_with_the_identity_of_its_own,
    collected_with_a_connection_that_nobody_took,
    called_after_its_end,
)
