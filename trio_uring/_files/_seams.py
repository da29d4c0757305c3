"""What stands in for Trio's thread hop, in its file objects and its paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from ._routes import count_thread, route

if TYPE_CHECKING:
    from collections.abc import Callable

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
