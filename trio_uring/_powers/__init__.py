"""What io_uring can do and no readiness loop can."""

from ._accept_many import MultishotListener as MultishotListener, accept_many as accept_many
from ._batch import perform_many as perform_many
from ._direct import DirectFile as DirectFile, open_direct as open_direct
from ._receive_file import ReceiveProgress as ReceiveProgress, receive_file as receive_file
from ._receive_many import (
    ReceivedLease as ReceivedLease,
    ReceivedLeases as ReceivedLeases,
    receive_many as receive_many,
)
from ._registered import BufferLease as BufferLease, RegisteredBuffers as RegisteredBuffers
from ._relay import RelayProgress as RelayProgress, relay as relay
from ._ring_channel import (
    RingReceiveChannel as RingReceiveChannel,
    RingSendChannel as RingSendChannel,
    open_ring_channel as open_ring_channel,
)
from ._send_file import SendProgress as SendProgress, send_file as send_file
from ._send_zerocopy import (
    ZeroCopyProgress as ZeroCopyProgress,
    send_zerocopy as send_zerocopy,
)
from ._write_file import write_file as write_file
