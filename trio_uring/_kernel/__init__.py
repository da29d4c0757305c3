"""The border to the kernel: the compiled C core, and who may use it.

``lib`` is for `_ring` and `_buffer_pool`, ``ffi`` for those and `_operations`. On systems
without io_uring nothing is compiled; the package still imports there, and every run falls
back to Trio's own I/O before one of these would be touched.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ._ring import CData, ffi, lib

    NULL = ffi.NULL
    COMPILED: Final = True
elif sys.platform == "linux":
    # In the root of a checkout, ``python -m trio_uring`` imports the source tree, which has no
    # compiled module, in the place of the installed package, which has: take it from there.
    __path__ += [str(Path(entry, "trio_uring", "_kernel")) for entry in sys.path]
    from ._ring import ffi, lib

    CData = ffi.CData
    NULL = ffi.NULL
    COMPILED: Final = True
else:
    CData = NULL = ffi = lib = None
    COMPILED: Final = False

__all__ = ["COMPILED", "NULL", "CData", "ffi", "lib"]
