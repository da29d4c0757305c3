"""What stands in Trio's file objects and paths, where they would go to a thread.

Most of it is `run_sync`, in place of the thread hop. The methods of file objects are asked for
so often that they have a way of their own: without the `partial` and the look-up in the route
table, a line is read in two thirds of the time (benchmarks/bench_files.py).
"""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import trio
from trio.lowlevel import checkpoint_if_cancelled, enable_ki_protection

from trio_uring._engine._io_manager import current_ring
from trio_uring._trio_private import AsyncIOWrapper, trio_file_aclose, trio_file_getattr

from ._bridge import BRIDGE_REFUSED, files_of
from ._methods import ASYNC_METHODS, close, is_long, may_be_long, never_waits, raw_of
from ._raw import RingFileIO
from ._routes import count_thread, route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

T = TypeVar("T")


@enable_ki_protection
async def run_sync(function: Callable[[Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
    """Call ``function(*args)`` on the ring if the route table has it, else in a thread.

    In a run without a ring: `trio.to_thread.run_sync`, as before.
    """
    call = route(function, args)
    if call is not None:
        return await call()
    count_thread()
    return await trio.to_thread.run_sync(function, *args)


# --- File objects ---------------------------------------------------------------------------


def file_getattr(self: AsyncIOWrapper[object], name: str) -> object:
    """Stand for ``AsyncIOWrapper.__getattr__``: make a method when it is first asked for."""
    if name in ASYNC_METHODS and not BRIDGE_REFUSED:
        raw = raw_of(self.wrapped)
        if raw is not None:
            method = _async_method(self.wrapped, name, raw)
            setattr(self, name, method)
            return method
    return trio_file_getattr(self, name)


def _async_method(file: object, name: str, raw: RingFileIO) -> Callable[..., Awaitable[object]]:
    kind = type(file)
    method = getattr(file, name)
    inline = never_waits(kind, name, raw)
    long_sometimes = may_be_long(kind, name)
    cancellable = kind is RingFileIO

    # Not a coroutine function: one of the two that run for a line would be for its name only.
    def call(*args: Any, **keywords: Any) -> Awaitable[object]:  # noqa: ANN401 (the method's own)
        manager = current_ring("files")
        if keywords or manager is None:
            return run_sync(partial(method, *args, **keywords))
        files = files_of(manager)
        if inline:
            return files.call_inline(method, args, raw)
        if long_sometimes and is_long(name, raw, args):
            return files.call_in_thread(method, args, raw)
        return files.call(method, args, raw, cancellable)

    call.__name__ = name
    call.__qualname__ = f"AsyncIOWrapper.{name}"
    call.__doc__ = f"Like :meth:`~{kind.__module__}.{kind.__qualname__}.{name}`, but async."
    return call


@wraps(trio_file_aclose)
@enable_ki_protection
async def file_aclose(self: AsyncIOWrapper[Any]) -> None:
    """Stand for ``AsyncIOWrapper.aclose``."""
    manager = current_ring("files")
    raw = raw_of(self.wrapped)
    if manager is None or raw is None or BRIDGE_REFUSED:
        await trio_file_aclose(self)
        return
    await close(files_of(manager), self.wrapped.close, raw, shielded=True)
    await checkpoint_if_cancelled()
