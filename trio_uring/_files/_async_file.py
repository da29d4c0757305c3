"""Methods of AnyIO's ``AsyncFile`` that try a hit before AnyIO's own way to a thread or the ring.

They replace AnyIO's on the class, so that they also serve files that were created before. The
`FileMethod` objects are kept in the instance, which they do not refer to.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final

from trio.lowlevel import enable_ki_protection

from trio_uring._trio_private import schedule_point

from ._hits import OTHERWISE, FileMethod, file_method
from ._methods import raw_of, way_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# How many arguments each method has at most; the methods of the files below accept more.
ARGUMENTS: Final = {
    "read": 1,
    "read1": 1,
    "readline": 0,
    "readinto": 1,
    "readinto1": 1,
    "seek": 2,
    "tell": 0,
    "flush": 0,
}


def async_file_method(
    name: str, original: Callable[..., Awaitable[object]]
) -> Callable[..., Awaitable[object]]:
    """Return the method *name* of ``AsyncFile``. Its calls that are no hits are *original*'s."""
    key = f"_trio_uring_{name}"
    count_max = ARGUMENTS[name]

    @wraps(original)
    @enable_ki_protection
    async def call(
        self: Any,  # noqa: ANN401 (AnyIO's class)
        *args: Any,  # noqa: ANN401 (the method's own)
        **keywords: Any,  # noqa: ANN401
    ) -> object:
        method = self.__dict__.get(key, OTHERWISE)
        if method is OTHERWISE:
            method = self.__dict__[key] = _prepare(self, name)
        if method is not None and not keywords and len(args) <= count_max:
            hit = method.hit
            value = hit(*args)
            if value is not OTHERWISE:
                return value
            if hit.due:
                try:
                    return hit.take()
                finally:
                    await schedule_point()
            if hit.missed:
                return await method.otherwise(args, {})
        return await original(self, *args, **keywords)

    return call


def _prepare(file: Any, name: str) -> FileMethod | None:  # noqa: ANN401
    """Return what a hit needs; None if there are no hits for this file."""
    below = file.wrapped
    raw = raw_of(below)
    # Calls with a limiter are a thread's, and so are those of the program's own methods.
    if raw is None or getattr(file, "limiter", None) is not None or name in vars(below):
        return None
    kind = type(below)
    method = getattr(below, name, None)
    if method is None:
        return None
    return file_method(kind, name, raw, method, partial(way_of, kind, name, raw))
