"""Send large blocks by zero-copy send, and reuse their memory.

python -m trio_uring zerocopy.py HOST PORT [MIB]
python -m trio_uring zerocopy.py --demo
"""

import sys

import trio

import trio_uring

MIB = 1 << 20


async def send(host: str, port: int, mib: int) -> None:
    """Send *mib* blocks of 1 MiB from the same memory."""
    block = bytearray(MIB)
    progress = trio_uring.ZeroCopyProgress()
    async with await trio.open_tcp_stream(host, port) as stream:
        for number in range(mib):
            block[:] = bytes([number % 256]) * MIB  # free: the last block is acknowledged
            header = number.to_bytes(4, "big")
            await trio_uring.send_zerocopy(stream, header, block, progress=progress)
    print(f"{progress.bytes_sent} bytes sent, {progress.bytes_copied} of them copied.")


async def demo() -> None:
    """Send over loopback, where the kernel copies everything anyway."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, trio.open_nursery() as nursery:
        host, port = listener.socket.getsockname()
        nursery.start_soon(send, host, port, 8)
        async with await listener.accept() as stream:
            print(sum([len(part) async for part in stream]), "bytes received.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--demo"]:
        trio_uring.run(demo)
    elif len(sys.argv) >= 3:
        trio_uring.run(send, sys.argv[1], int(sys.argv[2]), int((*sys.argv, "64")[3]))
    else:
        print(__doc__)
