"""Hash files in the event loop of a second thread, while the first loop does its own work.

python examples/two_loops.py FILE..., or --demo
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

import trio_uring

Paths = trio_uring.RingReceiveChannel[str]
Results = trio_uring.RingSendChannel[tuple[str, str]]


async def worker(paths: Paths, results: Results) -> None:
    """Run in a thread with its own event loop; hashing releases the interpreter lock."""
    async with paths, results:
        async for path in paths:
            data = await trio.Path(path).read_bytes()
            await results.send((path, hashlib.sha256(data).hexdigest()))


async def send_all(names: list[str], paths: trio_uring.RingSendChannel[str]) -> None:
    async with paths:
        for name in names:
            await paths.send(name)  # waits while the buffer holds four


async def main(names: list[str]) -> None:
    send_paths, paths = trio_uring.open_ring_channel[str](4)
    send_results, results = trio_uring.open_ring_channel[tuple[str, str]](4)
    async with trio.open_nursery() as nursery:
        run_worker = partial(trio_uring.run, worker, paths, send_results)
        nursery.start_soon(trio.to_thread.run_sync, run_worker)
        nursery.start_soon(send_all, names, send_paths)
        async with results:
            async for name, digest in results:
                print(digest, name)


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        print(__doc__)
    elif sys.argv[1:] == ["--demo"]:
        with tempfile.TemporaryDirectory() as directory:
            for number in range(8):
                Path(directory, str(number)).write_bytes(bytes([number]) * 1_000_000)
            trio_uring.run(main, sorted(map(str, Path(directory).iterdir())))
    else:
        trio_uring.run(main, sys.argv[1:])
