"""Converts socket addresses between Python's tuples and the kernel's ``struct sockaddr``."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

from trio_uring._kernel.sockets import AF_INET, AF_INET6, AF_UNIX

SOCKADDR_SIZE = 128  # sizeof(struct sockaddr_storage): the kernel never writes more

_FAMILY = struct.Struct("=H")
_INET = struct.Struct("=H2s4s8x")
_INET6 = struct.Struct("=H2s4s16sI")
_FLOW_MAX = 0xFFFFF  # a flow label has 20 bits
_UNIX_PATH_MAX = 108

Address = tuple[object, ...] | str | bytes | None


def encode_sockaddr(family: int, address: object) -> bytes | None:
    """Return *address*, which must be numeric, as a ``struct sockaddr`` of *family*.

    Return None for all other addresses: of another family, with a host name, or with a port out of
    range. The caller then calls the standard library, which supports every family and raises its
    own exceptions.
    """
    try:
        if family == AF_INET and isinstance(address, tuple):
            parts: tuple[Any, ...] = address
            host, port = parts
            return _INET.pack(family, port.to_bytes(2, "big"), socket.inet_pton(family, host))
        if family == AF_INET6 and isinstance(address, tuple):
            parts = (*address, 0, 0)
            host, port, flow, scope = parts[:4]
            if flow > _FLOW_MAX:
                return None
            return _INET6.pack(
                family,
                port.to_bytes(2, "big"),
                flow.to_bytes(4, "big"),
                socket.inet_pton(family, host),
                scope,
            )
        if family == AF_UNIX and isinstance(address, str | bytes):
            return _encode_unix(address)
    except (AttributeError, OSError, OverflowError, TypeError, ValueError, struct.error):
        return None
    return None


def _encode_unix(address: str | bytes) -> bytes | None:
    path = os.fsencode(address)
    abstract = path[:1] == b"\0"
    if not path or len(path) + (not abstract) > _UNIX_PATH_MAX:
        return None
    return _FAMILY.pack(AF_UNIX) + path + (b"" if abstract else b"\0")


def decode_sockaddr(raw: bytes) -> Address:
    """Return the kernel's ``struct sockaddr`` as `socket.socket` returns it; None if empty."""
    if not raw:
        return None
    (family,) = _FAMILY.unpack_from(raw)
    if family == AF_INET:
        _, port, host = _INET.unpack_from(raw)
        return socket.inet_ntop(family, host), int.from_bytes(port, "big")
    if family == AF_INET6:
        _, port, flow, host, scope = _INET6.unpack_from(raw)
        flow = int.from_bytes(flow, "big")
        return socket.inet_ntop(family, host), int.from_bytes(port, "big"), flow, scope
    if family == AF_UNIX:
        path = raw[_FAMILY.size :]
        return path if path[:1] == b"\0" else os.fsdecode(path.partition(b"\0")[0])
    return family, raw[_FAMILY.size :]
