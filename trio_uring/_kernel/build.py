"""The cffi builder, which compiles the C core from the files in this directory.

cffi generates the wrapper code when the package is built. No generated C is in the repository, so
none can be out of date.
"""

from pathlib import Path

import cffi

_HERE = Path(__file__).parent

_SOURCES = (  # compiled as one translation unit, in this order
    "ring.c",
    "batch.c",
    "buffer_ring.c",
    "cached.c",
    "files.c",
    "accept.c",
    "engine_api.c",
)

ffibuilder = cffi.FFI()
ffibuilder.cdef((_HERE / "ring.cdef.txt").read_text())
ffibuilder.set_source(
    "trio_uring._kernel._ring",
    "".join((_HERE / name).read_text() for name in _SOURCES),
    include_dirs=[str(_HERE)],
    depends=[
        *(str(_HERE / name) for name in ("ring.cdef.txt", *_SOURCES)),
        *map(str, _HERE.glob("*.h")),
    ],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
