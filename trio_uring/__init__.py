"""Trio on Linux's io_uring.

The public names:

* `run`, `start_guest_run`, `install` and `uninstall` decide which Trio runs get a ring.
  `RingConfig` and `SQPoll` say how a ring is set up.
* Sockets, streams, files and processes need no new names: use Trio's.
* `open_positional` opens a file for many tasks at once, and `open_direct` opens one for direct I/O.
  `write_file` writes a whole file in one step.
* `perform_many` performs many operations together, and `linked` in order.
* `send_file` and `receive_file` move bytes between a file and a socket, and `relay` between two
  sockets. `send_zerocopy` sends the program's memory without copying it.
* `accept_many` and `receive_many` accept and receive with one multishot operation.
* `open_ring_channel` connects the runs of several threads. `serve_threads` serves connections in
  several threads.
* `trio_uring.lowlevel` has the operations themselves.
"""

from . import _anyio_finder
from ._batch import perform_many as perform_many
from ._channels import (
    RingReceiveChannel as RingReceiveChannel,
    RingSendChannel as RingSendChannel,
    open_ring_channel as open_ring_channel,
    serve_threads as serve_threads,
)
from ._config import RingConfig as RingConfig, SQPoll as SQPoll
from ._errors import (
    ForkedRingError as ForkedRingError,
    IncompatibleTrioError as IncompatibleTrioError,
    OperationCancelledError as OperationCancelledError,
    RingUnavailableError as RingUnavailableError,
    UnsupportedOpcodeError as UnsupportedOpcodeError,
)
from ._files import (
    BufferLease as BufferLease,
    DirectFile as DirectFile,
    PositionalFile as PositionalFile,
    RegisteredBuffers as RegisteredBuffers,
    open_direct as open_direct,
    open_positional as open_positional,
    write_file as write_file,
)
from ._multishot import (
    MultishotListener as MultishotListener,
    ReceivedLease as ReceivedLease,
    ReceivedLeases as ReceivedLeases,
    accept_many as accept_many,
    receive_many as receive_many,
)
from ._operations import Linked as Linked, linked as linked
from ._run import (
    install as install,
    run as run,
    start_guest_run as start_guest_run,
    uninstall as uninstall,
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

_anyio_finder.install()
