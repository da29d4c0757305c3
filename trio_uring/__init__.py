"""Trio on Linux's io_uring.

The public names:

* `run`, `start_guest_run`, `install` and `uninstall` decide which Trio runs get a ring.
  `RingConfig` and `SQPoll` say how a ring is set up. `statistics` says what a run does with it.
* Sockets, streams, files and processes need no new names: use Trio's.
* `open_positional` opens a file for many tasks at once, and `open_direct` opens one for direct I/O.
  `write_file` writes a whole file in one step. `fsync` and `fdatasync` flush a file to the disk.
* `perform_many` performs many operations together, and `linked` in order.
* `send_file` and `receive_file` move bytes between a file and a socket, and `relay` between two
  sockets. `send_zerocopy` sends the program's memory without copying it.
* `accept_many` and `receive_many` accept and receive with one multishot operation.
* `open_ring_channel` connects the runs of several threads. `serve_threads` serves connections in
  several threads.
* `trio_uring.lowlevel` has the operations themselves.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

import trio

from . import _anyio_finder
from ._config import RingConfig as RingConfig, SQPoll as SQPoll
from ._errors import (
    ForkedRingError as ForkedRingError,
    IncompatibleTrioError as IncompatibleTrioError,
    OperationCancelledError as OperationCancelledError,
    RingUnavailableError as RingUnavailableError,
    UnsupportedOpcodeError as UnsupportedOpcodeError,
)
from ._fallback import statistics as statistics
from ._files import fdatasync as fdatasync, fsync as fsync
from ._operations import Linked as Linked, linked as linked
from ._run import (
    install as install,
    run as run,
    start_guest_run as start_guest_run,
    uninstall as uninstall,
)

if TYPE_CHECKING:
    from . import lowlevel as lowlevel
    from ._batch import perform_many as perform_many
    from ._channels import (
        RingReceiveChannel as RingReceiveChannel,
        RingSendChannel as RingSendChannel,
        open_ring_channel as open_ring_channel,
        serve_threads as serve_threads,
    )
    from ._files._direct import DirectFile as DirectFile, open_direct as open_direct
    from ._files._open_fd import FallocateMode as FallocateMode
    from ._files._open_positional import open_positional as open_positional
    from ._files._positional import PositionalFile as PositionalFile
    from ._files._registered_buffers import (
        BufferLease as BufferLease,
        RegisteredBuffers as RegisteredBuffers,
    )
    from ._files._write_file import write_file as write_file
    from ._multishot import (
        MultishotListener as MultishotListener,
        ReceivedLease as ReceivedLease,
        ReceivedLeases as ReceivedLeases,
        accept_many as accept_many,
        receive_many as receive_many,
    )
    from ._transfers import (
        ReceiveProgress as ReceiveProgress,
        RelayProgress as RelayProgress,
        SendProgress as SendProgress,
        ZeroCopyProgress as ZeroCopyProgress,
        receive_file as receive_file,
        relay as relay,
        send_file as send_file,
        send_zerocopy as send_zerocopy,
    )

__version__: Final = "0.1.0"

__all__ = [
    "BufferLease",
    "DirectFile",
    "FallocateMode",
    "ForkedRingError",
    "IncompatibleTrioError",
    "Linked",
    "MultishotListener",
    "OperationCancelledError",
    "PositionalFile",
    "ReceiveProgress",
    "ReceivedLease",
    "ReceivedLeases",
    "RegisteredBuffers",
    "RelayProgress",
    "RingConfig",
    "RingReceiveChannel",
    "RingSendChannel",
    "RingUnavailableError",
    "SQPoll",
    "SendProgress",
    "UnsupportedOpcodeError",
    "ZeroCopyProgress",
    "accept_many",
    "fdatasync",
    "fsync",
    "install",
    "linked",
    "lowlevel",
    "open_direct",
    "open_positional",
    "open_ring_channel",
    "perform_many",
    "receive_file",
    "receive_many",
    "relay",
    "run",
    "send_file",
    "send_zerocopy",
    "serve_threads",
    "start_guest_run",
    "statistics",
    "uninstall",
    "write_file",
]

# These are imported on first use: they take a third of the time, and most programs use none.
_ON_FIRST_USE: Final = {
    "RingReceiveChannel": "._channels",
    "RingSendChannel": "._channels",
    "open_ring_channel": "._channels",
    "serve_threads": "._channels",
    "DirectFile": "._files._direct",
    "open_direct": "._files._direct",
    "PositionalFile": "._files._positional",
    "open_positional": "._files._open_positional",
    "FallocateMode": "._files._open_fd",
    "BufferLease": "._files._registered_buffers",
    "RegisteredBuffers": "._files._registered_buffers",
    "write_file": "._files._write_file",
    "perform_many": "._batch",
    "MultishotListener": "._multishot",
    "ReceivedLease": "._multishot",
    "ReceivedLeases": "._multishot",
    "accept_many": "._multishot",
    "receive_many": "._multishot",
    "ReceiveProgress": "._transfers",
    "RelayProgress": "._transfers",
    "SendProgress": "._transfers",
    "ZeroCopyProgress": "._transfers",
    "receive_file": "._transfers",
    "relay": "._transfers",
    "send_file": "._transfers",
    "send_zerocopy": "._transfers",
}

_LOWLEVEL: Final = frozenset({"Operation", "on_ring", "operations", "perform"})

if not TYPE_CHECKING:  # a type checker would believe that there is every name

    def __getattr__(name: str) -> object:
        if name == "lowlevel":  # a module, of which the import makes an attribute
            return import_module(".lowlevel", __name__)
        module = _ON_FIRST_USE.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}")
        value = globals()[name] = getattr(import_module(module, __name__), name)
        return value

    def _hint(name: str) -> str:
        if name in _LOWLEVEL:
            return f": it is in trio_uring.lowlevel: trio_uring.lowlevel.{name}"
        if not name.startswith("_") and hasattr(trio, name):
            return f": use trio.{name}, which uses the ring in a run that has one"
        return ""

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


_anyio_finder.install()
