"""Trio on Linux's io_uring.

The public names: `run`, `start_guest_run`, `install` and `uninstall` decide which Trio runs
get a ring, `RingConfig` and `SQPoll` how it is set up. `open_positional` opens a file for many
tasks at once, `open_direct` one past the page cache, and `write_file` writes a whole one in one
step; all other files are `trio.open_file`'s. `perform_many` performs operations together.
`send_file` sends a file into a socket, `receive_file` receives into one, `relay` moves bytes from
socket to socket, and `send_zerocopy` sends out of the program's own memory. `accept_many` and
`receive_many` accept and receive ahead, with one operation for many. `open_ring_channel` connects
the runs of several threads, and `serve_threads` serves connections in them. `trio_uring.lowlevel`
has the operations themselves.
"""

from . import _anyio_finder
from ._config import RingConfig as RingConfig, SQPoll as SQPoll
from ._errors import (
    ForkedRingError as ForkedRingError,
    IncompatibleTrioError as IncompatibleTrioError,
    OperationCancelledError as OperationCancelledError,
    RingUnavailableError as RingUnavailableError,
    UnsupportedOpcodeError as UnsupportedOpcodeError,
)
from ._files import (
    PositionalFile as PositionalFile,
    open_positional as open_positional,
)
from ._operations import Linked as Linked, linked as linked
from ._powers import (
    BufferLease as BufferLease,
    DirectFile as DirectFile,
    MultishotListener as MultishotListener,
    ReceivedLease as ReceivedLease,
    ReceivedLeases as ReceivedLeases,
    ReceiveProgress as ReceiveProgress,
    RegisteredBuffers as RegisteredBuffers,
    RelayProgress as RelayProgress,
    RingReceiveChannel as RingReceiveChannel,
    RingSendChannel as RingSendChannel,
    SendProgress as SendProgress,
    ZeroCopyProgress as ZeroCopyProgress,
    accept_many as accept_many,
    open_direct as open_direct,
    open_ring_channel as open_ring_channel,
    perform_many as perform_many,
    receive_file as receive_file,
    receive_many as receive_many,
    relay as relay,
    send_file as send_file,
    send_zerocopy as send_zerocopy,
    write_file as write_file,
)
from ._run import (
    install as install,
    run as run,
    start_guest_run as start_guest_run,
    uninstall as uninstall,
)
from ._serve_threads import serve_threads as serve_threads

_anyio_finder.install()
