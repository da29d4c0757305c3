"""The peers of a benchmark's connections: separate processes that only send or receive."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20

_RECEIVER = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
buffer = bytearray(1 << 20)
while True:
    connection = listener.accept()[0]
    while connection.recv_into(buffer):
        pass
    connection.sendall(b"x")
"""

_HTTP_SERVER = """
import selectors, socket
body = b"x" * 64
answer = b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
selector = selectors.DefaultSelector()
selector.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in selector.select():
        if key.fileobj is listener:
            selector.register(listener.accept()[0], selectors.EVENT_READ)
        elif key.fileobj.recv(65536).endswith(b"\\r\\n\\r\\n"):
            key.fileobj.send(answer)
        else:
            selector.unregister(key.fileobj)
            key.fileobj.close()
"""

_SENDER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
block = bytes(1 << 20)
while True:
    with listener.accept()[0] as connection:
        for _ in range(int(sys.argv[1])):
            connection.sendall(block)
"""


@contextmanager
def receiver() -> Iterator[int]:
    """Yield the port of a peer that receives until the end, then sends one byte."""
    with _started(_RECEIVER) as port:
        yield port


@contextmanager
def sender(mib: int) -> Iterator[int]:
    """Yield the port of a peer that sends a number of MiB to each client."""
    with _started(_SENDER, str(mib)) as port:
        yield port


@contextmanager
def http_server() -> Iterator[int]:
    """Yield the port of one that answers each request with the same 64 bytes."""
    with _started(_HTTP_SERVER) as port:
        yield port


@contextmanager
def _started(*program: str) -> Iterator[int]:
    command = [sys.executable, "-c", *program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def cpu_seconds() -> float:
    """Return the CPU time of this process so far, including kernel workers."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def cpu_clock(pid: int) -> int:
    """Return the clock that counts the CPU time of all threads of a process."""
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return clock.value
