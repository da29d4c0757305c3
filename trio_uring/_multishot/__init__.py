"""Multishot accept and receive: one operation accepts or receives many times."""

from ._accept_many import MultishotListener as MultishotListener, accept_many as accept_many
from ._receive_many import (
    ReceivedLease as ReceivedLease,
    ReceivedLeases as ReceivedLeases,
    receive_many as receive_many,
)
