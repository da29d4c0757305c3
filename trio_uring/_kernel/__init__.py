"""The compiled C core (``ffi`` and ``lib``) and the native engine (``native``).

``lib`` is used only by `_ring` and `_buffer_pool`, ``ffi`` by those and `_operations`. Systems
without io_uring have no compiled modules. The package can be imported there, and every run falls
back to Trio's own I/O before one of these names is used.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from . import _native as native
    from ._ring import CData, ffi, lib

    NULL = ffi.NULL
    COMPILED: Final = True
    why_no_native: str = ""
elif sys.platform == "linux":
    # In the root of a checkout, ``python -m trio_uring`` imports the source tree, which has no
    # compiled modules. So they are also looked for in the installed package.
    __path__ += [str(Path(entry, "trio_uring", "_kernel")) for entry in sys.path]
    from ._ring import ffi, lib

    CData = ffi.CData
    NULL = ffi.NULL
    COMPILED: Final = True
    try:
        native = import_module("._native", __name__)
    except ImportError as exc:
        native, why_no_native = None, f"the native engine was not built for this Python: {exc}"
    else:
        why_no_native = ""
else:
    CData = NULL = ffi = lib = native = None
    COMPILED: Final = False
    why_no_native = "there is no ring either"

__all__ = ["COMPILED", "NULL", "CData", "ffi", "lib", "native", "why_no_native"]
