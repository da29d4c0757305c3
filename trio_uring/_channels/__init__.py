"""Connecting the runs of several threads, each with its own ring."""

from ._ring_channel import (
    RingReceiveChannel as RingReceiveChannel,
    RingSendChannel as RingSendChannel,
    open_ring_channel as open_ring_channel,
)
from ._serve_threads import serve_threads as serve_threads
