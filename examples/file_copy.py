"""Copy a file twice: sequentially by `trio.open_file`, and concurrently by `open_positional`.

python -m trio_uring file_copy.py FROM TO
python -m trio_uring file_copy.py --demo
"""

import os
import sys
import tempfile

import trio

import trio_uring

BLOCK, TASKS = 1 << 20, 8


async def copy_in_order(source: str, target: str) -> None:
    """Copy as any Trio program does; on a ring, no call uses a thread."""
    async with (
        await trio.open_file(source, "rb") as reader,
        await trio.open_file(target, "wb") as writer,
    ):
        while block := await reader.read(BLOCK):
            await writer.write(block)


async def copy_side_by_side(source: str, target: str) -> None:
    """Copy by many tasks that share two open files; each call takes an offset."""
    async with (
        await trio_uring.open_positional(source) as reader,
        await trio_uring.open_positional(target, "w") as writer,
    ):
        size = os.fstat(reader.fileno()).st_size

        async def copy_blocks(first: int) -> None:
            for offset in range(first * BLOCK, size, TASKS * BLOCK):
                block = await reader.read_at(BLOCK, offset)
                assert await writer.write_at(block, offset) == len(block)

        async with trio.open_nursery() as nursery:
            for first in range(TASKS):
                nursery.start_soon(copy_blocks, first)


async def main(source: str, target: str) -> None:
    for copy in (copy_in_order, copy_side_by_side):
        await copy(source, target)
        print(copy.__name__, (await trio.Path(target).stat()).st_size, "bytes")


if sys.argv[1:] == ["--demo"]:
    with tempfile.TemporaryDirectory() as directory:
        demo = trio.Path(directory, "source")
        trio_uring.run(demo.write_bytes, os.urandom(32 << 20))
        trio_uring.run(main, str(demo), f"{directory}/target")
elif len(sys.argv) == 3:
    trio_uring.run(main, sys.argv[1], sys.argv[2])
else:
    print(__doc__)
