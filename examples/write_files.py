"""Split a file into parts; each part is created, written and closed in one submission.

python -m trio_uring write_files.py FILE DIRECTORY [BYTES]
python -m trio_uring write_files.py --demo
"""

import os
import sys
import tempfile
from pathlib import Path

import trio

import trio_uring

TASKS = 32


async def split(source: str, directory: str, size: int) -> int:
    """Write the parts by several tasks; return the number of parts."""
    async with await trio_uring.open_positional(source) as file:
        starts = iter(range(0, os.fstat(file.fileno()).st_size, size))
        written = 0

        async def write_parts() -> None:
            nonlocal written
            for start in starts:
                part = await file.read_at(size, start)
                await trio_uring.write_file(Path(directory, f"{start:012}"), part)
                written += 1

        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(write_parts)
    return written


async def demo() -> None:
    with tempfile.TemporaryDirectory() as directory, tempfile.NamedTemporaryFile() as whole:
        whole.write(data := os.urandom(1_000_000))
        whole.flush()
        count = await split(whole.name, directory, 4096)
        parts = sorted(await trio.Path(directory).iterdir())
        assert b"".join([await part.read_bytes() for part in parts]) == data
    print(f"{count} parts written.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--demo"]:
        trio_uring.run(demo)
    elif len(sys.argv) >= 3:
        count = trio_uring.run(split, sys.argv[1], sys.argv[2], int((*sys.argv, "1048576")[3]))
        print(f"{count} parts written.")
    else:
        print(__doc__)
