"""Which runs get a ring: by AnyIO's names of backends, in threads, and in one process."""

from __future__ import annotations

import asyncio
import inspect
import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
from anyio._backends import _trio as anyio_trio
from anyio._core import _eventloop
from anyio.from_thread import BlockingPortalProvider, start_blocking_portal
from children import in_thread
from trio.testing import MockClock

import trio_uring
from trio_uring import RingConfig, anyio_backend
from trio_uring.lowlevel import RingStatistics, on_ring

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIRED = {"ring": RingConfig(require=True)}


async def entries() -> int:
    """Return the number of entries of this run's ring; 0 without a ring."""
    statistics = trio.lowlevel.current_statistics().io_statistics
    return statistics.entries if isinstance(statistics, RingStatistics) else 0


@contextmanager
def installed() -> Iterator[None]:
    trio_uring.install()
    try:
        yield
    finally:
        trio_uring.uninstall()


# --- Names and options ----------------------------------------------------------------------


def test_by_name() -> None:
    assert anyio.run(entries, backend="trio_uring") > 0


def test_options() -> None:
    options = {"ring": RingConfig(require=True, entries=8), "clock": MockClock()}

    async def main() -> tuple[int, float]:
        trio.lowlevel.current_clock().jump(10)  # type: ignore[attr-defined]
        return await entries(), anyio.current_time()

    assert anyio.run(main, backend="trio_uring", backend_options=options) == (8, 10.0)
    assert set(options) == {"ring", "clock"}


@pytest.mark.parametrize("options", [{"ring": 8}, {"rings": RingConfig()}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        anyio.run(entries, backend="trio_uring", backend_options=options)
    assert anyio.run(entries, backend="trio") == 0


def test_arguments_and_results() -> None:
    async def add(first: int, second: int) -> int:
        await anyio.lowlevel.checkpoint()
        return first + second

    assert anyio.run(add, 1, 2, backend="trio_uring") == 3


def test_exceptions() -> None:
    async def fail() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        anyio.run(fail, backend="trio_uring")


def test_not_inside_another_run() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="Already running trio"):
            anyio.run(entries, backend="trio_uring")

    anyio.run(main, backend="trio_uring", backend_options=REQUIRED)


def test_unknown_names_stay_unknown() -> None:
    with pytest.raises(LookupError, match="No such backend: trio_urings"):
        anyio.run(entries, backend="trio_urings")


# --- Others in this process -----------------------------------------------------------------


def test_plain_trio_stays_plain(tmp_path: Any) -> None:
    async def main() -> bool:
        # Files, too: in threads, which Trio starts.
        await anyio.Path(tmp_path, "file").write_text("text")
        async with anyio.TemporaryFile() as file:
            await file.write(b"bytes")
            assert type(file.wrapped.raw) is io.FileIO  # type: ignore[attr-defined]
        return on_ring()

    for _ in range(2):
        assert anyio.run(main, backend="trio") is False
        assert trio.run(main) is False
        assert anyio.run(entries, backend="trio_uring") > 0


def test_asyncio_stays_asyncio(tmp_path: Any) -> None:
    async def main() -> str:
        await anyio.Path(tmp_path, "file").write_text("text")
        return type(asyncio.get_running_loop()).__module__

    assert anyio.run(main, backend="asyncio").startswith("asyncio")
    assert anyio.run(entries, backend="trio_uring") > 0
    assert anyio.run(main, backend="asyncio").startswith("asyncio")


def test_installed() -> None:
    with installed():
        assert anyio.run(entries, backend="trio") > 0
    assert anyio.run(entries, backend="trio") == 0


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_URING", "off")
    assert anyio.run(entries, backend="trio_uring") == 0


# --- Portals --------------------------------------------------------------------------------


def test_portal() -> None:
    async def path_exists(path: str) -> tuple[bool, int]:
        return await anyio.Path(path).exists(), await entries()

    with start_blocking_portal("trio_uring", REQUIRED) as portal:
        exists, size = portal.call(path_exists, "/")
        assert exists
        assert size > 0
        future = portal.start_task_soon(anyio.sleep_forever)
        future.cancel()
        # A plain run in this thread, while the other has a ring.
        assert anyio.run(entries, backend="trio") == 0


def test_portals_of_different_backends() -> None:
    with (
        start_blocking_portal("trio_uring", REQUIRED) as ours,
        start_blocking_portal("trio") as plain,
        start_blocking_portal("asyncio") as foreign,
    ):
        assert ours.call(on_ring)
        assert not plain.call(on_ring)
        assert foreign.call(asyncio.get_running_loop)


def test_portal_provider() -> None:
    provider = BlockingPortalProvider("trio_uring", {"ring": RingConfig(entries=16, require=True)})
    with provider as portal:
        assert portal.call(entries) == 16
    assert in_thread(lambda: anyio.run(entries, backend="trio")) == 0


# --- Registration ---------------------------------------------------------------------------


def test_registering_again_changes_nothing() -> None:
    before = dict(_eventloop.loaded_backends)
    anyio_backend.register()
    assert _eventloop.loaded_backends == before
    assert _eventloop.get_async_backend("trio") is anyio_backend.RingAwareBackend
    assert anyio_trio.backend_class is anyio_backend.RingAwareBackend


def test_somebody_elses_backend_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(anyio_trio.TrioBackend):
        pass

    monkeypatch.setitem(_eventloop.loaded_backends, "trio", Theirs)
    anyio_backend.register()
    assert anyio.run(entries, backend="trio_uring") > 0
    assert _eventloop.loaded_backends["trio"] is Theirs


def test_signatures_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    anyio_backend.check_anyio()

    async def run_sync_in_worker_thread(cls: object, func: object, context: object) -> None:
        """Stand for that of a later release."""

    theirs = classmethod(run_sync_in_worker_thread)
    monkeypatch.setattr(anyio_trio.TrioBackend, "run_sync_in_worker_thread", theirs)
    with pytest.raises(RuntimeError, match=r"run_sync_in_worker_thread takes \(func context\)"):
        anyio_backend.check_anyio()


def test_what_we_override_has_the_same_parameters() -> None:
    for ours in (anyio_backend.RingAwareBackend, anyio_backend.TrioUringBackend):
        for name in vars(ours):
            if not name.startswith("_"):
                theirs = inspect.signature(getattr(anyio_trio.TrioBackend, name)).parameters
                assert list(inspect.signature(getattr(ours, name)).parameters) == list(theirs)
