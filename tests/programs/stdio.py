"""Echo standard input line by line. Then write down how many calls needed a thread.

Arguments: what wraps the files (``trio``, ``anyio`` or ``mcp``), and where to write the counts.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import trio

import trio_uring


class _Unowned(io.TextIOWrapper):
    """Leaves what is below open."""

    def close(self) -> None:
        self.detach()


def _files(wrapper: str) -> tuple[Any, Any]:
    if wrapper == "trio":
        return trio.wrap_file(sys.stdin), trio.wrap_file(sys.stdout)
    if wrapper == "anyio":
        return anyio.wrap_file(sys.stdin), anyio.wrap_file(sys.stdout)
    # As the stdio_server of the MCP SDK does.
    source, sink = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    return (
        anyio.wrap_file(_Unowned(os.fdopen(source, "rb", closefd=False), encoding="utf-8")),
        anyio.wrap_file(_Unowned(os.fdopen(sink, "wb", closefd=False), encoding="utf-8")),
    )


async def main(wrapper: str, report: str) -> None:
    source, sink = _files(wrapper)
    async for line in source:
        await sink.write(f"got {line}")
        await sink.flush()
    statistics = trio.lowlevel.current_statistics().io_statistics
    routes = dict(getattr(statistics, "routes", {}))
    Path(report).write_text(f"{routes.get('thread')} {threading.active_count()}", encoding="ascii")


if __name__ == "__main__":
    trio_uring.run(main, *sys.argv[1:])
