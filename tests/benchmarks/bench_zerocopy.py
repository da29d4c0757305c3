"""Blocks of memory over loopback: `send_zerocopy` against `send_all`.

Over loopback the kernel copies in any case: what is seen here is what the notification costs, and
how long one waits for it. The receiver is another process. A rate of 1 is 1 MiB a second; CPU is
per MiB, the sender's.

    python bench_zerocopy.py [--mib 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING

import _measure
import _peers
import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Send = Callable[[trio.SocketStream, bytes], Awaitable[object]]

BLOCK = bytes(_peers.MIB)


async def send_all(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(block)


async def send_zerocopy(stream: trio.SocketStream, block: bytes) -> None:
    await trio_uring.send_zerocopy(stream, block)


def measure(send: Send, port: int, mib: int) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        begin, cpu = time.perf_counter(), _peers.cpu_seconds()
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for _ in range(mib):
                await send(stream, BLOCK)
            await stream.send_eof()
            await stream.receive_some(1)
        return time.perf_counter() - begin, _peers.cpu_seconds() - cpu

    elapsed, cpu = trio_uring.run(main, ring=trio_uring.RingConfig(require=True))
    return _measure.Sample(rate=mib / elapsed, cpu_us=cpu / mib * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with _peers.receiver() as port:
        variants = {
            send.__name__: partial(measure, send, port, options.mib)
            for send in (send_all, send_zerocopy)
        }
        samples = _measure.interleave(variants, options.rounds)
    title = f"{options.mib} blocks of 1 MiB over loopback: MiB, and CPU µs per MiB"
    _measure.report(title, samples, "send_all")


if __name__ == "__main__":
    main()
