"""Copy a file by a batch of reads and a batch of writes, then flush it to the disk.

python -m trio_uring checked_backup.py FROM TO
python -m trio_uring checked_backup.py --demo
"""

import os
import sys
import tempfile
from pathlib import Path

import trio_uring
from trio_uring import linked, perform_many
from trio_uring.lowlevel import operations

BLOCK = 65536


async def copy(source: Path, target: Path) -> int:
    """Return the number of blocks copied."""
    reader, writer = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY | os.O_CREAT)
    try:
        size = os.fstat(reader).st_size
        offsets = range(0, size, BLOCK)
        data = bytearray(BLOCK * len(offsets))
        # One submission for all blocks, whatever their number.
        reads = operations.read_many(reader, data, offsets, BLOCK)
        assert sum(outcome.unwrap() for outcome in await perform_many(reads)) == size

        content = memoryview(data)[:size]
        writes = [
            operations.write(writer, content[offset : offset + BLOCK], offset) for offset in offsets
        ]
        # The writes run concurrently. Then a linked chain sets the size and flushes the file.
        for written in await perform_many(writes):
            written.unwrap()
        finish = [operations.ftruncate(writer, size), operations.fsync(writer)]
        for outcome in await perform_many(linked(finish)):
            outcome.unwrap()
    finally:
        os.close(reader)
        os.close(writer)
    return len(offsets)


async def demo() -> None:
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "source"), Path(name, "target")
        source.write_bytes(os.urandom(1_000_000))  # noqa: ASYNC240 (a demonstration)
        blocks = await copy(source, target)
        assert source.read_bytes() == target.read_bytes()  # noqa: ASYNC240
        print(f"{blocks} blocks copied.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--demo"]:
        trio_uring.run(demo)
    elif len(sys.argv) == 3:
        trio_uring.run(copy, Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        print(__doc__)
