"""Copy a directory tree in one thread, inside the kernel; Ctrl-C or a timeout ends it midway.

python -m trio_uring copy_tree.py FROM TO
python -m trio_uring copy_tree.py --demo
"""

import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

import trio_uring

BLOCK = 64 << 20  # after which it looks whether it was cancelled


def copy_file(source: str, target: str) -> str:
    """Copy without memory of this program; the file system may only share the data."""
    with Path(source).open("rb") as reader, Path(target).open("wb") as writer:
        while os.copy_file_range(reader.fileno(), writer.fileno(), BLOCK):
            trio.from_thread.check_cancelled()
    shutil.copystat(source, target)
    return target


async def copy_tree(source: str, target: str) -> None:
    """Copy as `shutil.copytree` does: a thread for all of it costs less than one for each file."""
    copy = partial(shutil.copytree, source, target, copy_function=copy_file)
    await trio.to_thread.run_sync(copy)


async def demo() -> None:
    source = Path(trio.__file__).parent
    with tempfile.TemporaryDirectory() as name:
        await copy_tree(str(source), f"{name}/trio")
        copied = await trio.Path(name, "trio").rglob("*.py")
        assert len(list(copied)) == len(list(source.rglob("*.py")))
    print("Copied.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--demo"]:
        trio_uring.run(demo)
    elif len(sys.argv) == 3:
        trio_uring.run(copy_tree, sys.argv[1], sys.argv[2])
    else:
        print(__doc__)
