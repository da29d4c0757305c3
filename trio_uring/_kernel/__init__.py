"""The compiled C core (``ffi`` and ``lib``) and the native engine (``native``).

``lib`` is used only by `_ring`, `_file_calls` and `_buffer_pool`, ``ffi`` also by `_operations`.
Systems without io_uring have no compiled modules, and other Pythons than CPython load none. The
package can be imported there, and every run falls back to Trio's own I/O before one of these names
is used.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _native as native
    from ._ring import CData, ffi, lib

    NULL = ffi.NULL
    why_no_core: str = ""
    why_no_native: str = ""
elif sys.platform == "linux" and sys.implementation.name == "cpython":
    # In the root of a checkout, ``python -m trio_uring`` imports the source tree, which has no
    # compiled module, in the place of the installed package, which has: take it from there.
    __path__ += [str(Path(entry, "trio_uring", "_kernel")) for entry in sys.path]
    try:
        core = import_module("._ring", __name__)
    except ModuleNotFoundError:
        CData = NULL = ffi = lib = native = None
        why_no_core = why_no_native = (
            "trio_uring was installed without its C core: install a C compiler (on Debian, "
            "`apt-get install gcc libc6-dev python3-dev`), then reinstall trio_uring, with pip's "
            "--force-reinstall and --no-cache-dir"  # it keeps what it built
        )
    else:
        ffi, lib, CData, NULL = core.ffi, core.lib, core.ffi.CData, core.ffi.NULL
        why_no_core = ""
        try:
            native = import_module("._native", __name__)
        except ImportError as exc:
            native = None
            why_no_native = (
                "the native engine was not built for this Python, which needs a C compiler, "
                f"Python's headers, and CPython with its global lock: {exc}"
            )
        else:
            why_no_native = ""
else:
    CData = NULL = ffi = lib = native = None
    if sys.platform == "linux":
        # PyPy's garbage collector moves objects, also a bytes object that the kernel is sending.
        why_no_core = (
            "trio_uring needs CPython, whose objects stay in place while the kernel uses their "
            f"memory, and this is {sys.implementation.name}"
        )
    else:
        why_no_core = f"io_uring is a Linux interface, and this is {sys.platform}"
    why_no_native = "there is no ring either"

__all__ = ["NULL", "CData", "ffi", "lib", "native", "why_no_core", "why_no_native"]
