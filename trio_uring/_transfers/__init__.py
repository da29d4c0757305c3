"""Transfers between files and sockets inside the kernel, and zero-copy send."""

from ._receive_file import ReceiveProgress as ReceiveProgress, receive_file as receive_file
from ._relay import RelayProgress as RelayProgress, relay as relay
from ._send_file import SendProgress as SendProgress, send_file as send_file
from ._send_zerocopy import (
    ZeroCopyProgress as ZeroCopyProgress,
    send_zerocopy as send_zerocopy,
)
