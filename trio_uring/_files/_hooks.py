"""The functions that replace Trio's own where its files and paths would call a worker thread.

`run_sync` replaces `trio.to_thread.run_sync` there. The methods of file objects are called so often
that they do not go through it: without the `partial` and the lookup in the route table, reading a
line takes a third less time (benchmarks/bench_files.py).
"""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import trio
from trio.lowlevel import checkpoint_if_cancelled, current_task, enable_ki_protection

from trio_uring._trio_private import (
    AsyncIOWrapper,
    TrioIOManager,
    current_io_manager,
    is_cancelled,
    schedule_point,
    trio_file_aclose,
    trio_file_getattr,
)

from ._bridge import BRIDGE_REFUSED, current_files
from ._hits import OTHERWISE, hit_first
from ._methods import ASYNC_METHODS, close, raw_of, way_of
from ._quick import call_path, close_file, quick_call, result_of
from ._routes import route
from ._stream_file import READS, WRITES, raw_below, stream_call, stream_file
from ._sync import fdatasync, fsync

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import TypeVarTuple, Unpack

    from ._raw import RingFileIO

    Ts = TypeVarTuple("Ts")

T = TypeVar("T")

# Methods that the files of Trio do not have by themselves.
_ADDED: Final = {"fsync": fsync, "fdatasync": fdatasync}


@enable_ki_protection
async def run_sync(function: Callable[[Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
    """Call ``function(*args)`` on the ring if the route table has it, otherwise in a thread.

    In a run without a ring this is `trio.to_thread.run_sync`.
    """
    value = call_path(function, args)
    if value is not OTHERWISE:
        if type(value) is not tuple:
            return cast("T", value)
        await schedule_point()
        return cast("T", result_of(value))
    files = current_files()
    if files is not None:
        value = await quick_call(files, function, args)
        if value is not OTHERWISE:
            return cast("T", value)
        call = route(files, function, args)
        if call is not None:
            return await call()
        files.in_thread += 1
    return await trio.to_thread.run_sync(function, *args)


# --- File objects ---------------------------------------------------------------------------


def file_getattr(self: AsyncIOWrapper[object], name: str) -> object:
    """Replace ``AsyncIOWrapper.__getattr__``, which makes a method when it is first used."""
    if name in ASYNC_METHODS and not BRIDGE_REFUSED:
        wrapped = self.wrapped  # a property
        raw = raw_of(wrapped)
        if raw is not None:
            if name in vars(wrapped):  # the program's own
                return trio_file_getattr(self, name)
            method = _async_method(wrapped, name, raw)
            setattr(self, name, method)
            return method
        if raw_below(wrapped) is not None and (name in READS or name in WRITES):
            method = _stream_method(wrapped, name)
            setattr(self, name, method)
            return method
    if name in _ADDED and not _is_in_plain_run():
        return partial(_ADDED[name], self)  # type: ignore[arg-type]  # the file has what it needs
    return trio_file_getattr(self, name)


def _is_in_plain_run() -> bool:
    """Whether the current run did not ask for a ring, so that its files are as in Trio."""
    return trio.lowlevel.in_trio_run() and type(current_io_manager()) is TrioIOManager


def _async_method(file: object, name: str, raw: RingFileIO) -> Callable[..., Awaitable[object]]:
    kind = type(file)
    method = getattr(file, name)
    find_way = partial(way_of, kind, name, raw)
    tried_first = hit_first(kind, name, raw, method, find_way)
    if tried_first is not None:
        return tried_first
    call_on_ring = find_way()

    # Not a coroutine function: it would only await another coroutine, which costs time.
    def call(*args: Any, **keywords: Any) -> Awaitable[object]:  # noqa: ANN401 (the method's own)
        files = current_files()
        if files is None:
            return trio.to_thread.run_sync(partial(method, *args, **keywords))
        if keywords:
            return call_on_ring(files, partial(method, *args, **keywords), ())
        return call_on_ring(files, method, args)

    call.__name__ = name
    call.__qualname__ = f"AsyncIOWrapper.{name}"
    call.__doc__ = f"Like :meth:`~{kind.__module__}.{kind.__qualname__}.{name}`, but async."
    return call


def _stream_method(file: object, name: str) -> Callable[..., Awaitable[object]]:
    """Return the method of a file that the program has opened: a pipe or terminal, maybe."""
    kind = type(file)
    method = getattr(file, name)

    async def call(*args: Any, **keywords: Any) -> object:  # noqa: ANN401 (the method's own)
        files = current_files()
        on_ring = files and stream_call(files, file, name, args, keywords)
        if on_ring:
            return await on_ring()
        return await run_sync(partial(method, *args, **keywords))

    call.__name__ = name
    call.__qualname__ = f"AsyncIOWrapper.{name}"
    call.__doc__ = f"Like :meth:`~{kind.__module__}.{kind.__qualname__}.{name}`, but async."
    return call


@wraps(trio_file_aclose)
@enable_ki_protection
async def file_aclose(self: AsyncIOWrapper[Any]) -> None:
    """Replace ``AsyncIOWrapper.aclose``."""
    value = close_file(self.wrapped)
    if value is not OTHERWISE:
        if type(value) is tuple:
            await schedule_point()
            result_of(value)
            if is_cancelled(current_task()):
                await checkpoint_if_cancelled()
        return
    files = current_files()
    raw = raw_of(self.wrapped)
    stream = stream_file(self.wrapped) if raw is None else None
    if files is None or (raw is None and stream is None) or BRIDGE_REFUSED:
        await trio_file_aclose(self)
        return
    if raw is not None:
        await close(files, self.wrapped.close, raw, shielded=True)
    elif stream is not None:
        await stream.close(files, self.wrapped, shielded=True)
    await checkpoint_if_cancelled()
