"""The load for `bench_sockets.py`: nonblocking sockets and epoll, so that the server is the slower.

Every function returns the seconds that it took. A connection is ended by a reset, which leaves
nothing in TIME_WAIT: thousands of them would use up the ports.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections import deque
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RECEIVE_MAX = 65536
RESET_AT_CLOSE = struct.pack("ii", 1, 0)
PATIENCE = 20.0  # seconds without any event: the server hangs


@contextmanager
def connected(
    port: int, count: int, tls: ssl.SSLContext | None = None
) -> Iterator[list[socket.socket]]:
    """Yield *count* connections, with TLS if there is a context for it."""
    connections: list[socket.socket] = []
    try:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            connections.append(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
            if tls is not None:
                connections[-1] = tls.wrap_socket(connection, server_hostname="localhost")
            connections[-1].setblocking(False)
        yield connections
    finally:
        for connection in connections:
            connection.close()


def exchange(
    connections: Sequence[socket.socket],
    message: bytes,
    answer_size: int,
    count: int,
    in_flight: int | None = None,
) -> float:
    """Send *count* messages and receive their answers, at most one at a time on a connection.

    With fewer *in_flight* than connections, the connections take turns.
    """
    idle = deque(connections)
    by_fd = {connection.fileno(): connection for connection in connections}
    missing: dict[int, int] = {}
    sent = received = 0
    begin = time.perf_counter()
    with select.epoll() as poll:
        for connection in connections:
            poll.register(connection, select.EPOLLIN)

        def send() -> None:
            nonlocal sent
            connection = idle.popleft()
            missing[connection.fileno()] = answer_size
            if connection.send(message) != len(message):
                raise BlockingIOError("a message does not fit into the buffer of its socket")
            sent += 1

        for _ in range(min(count, in_flight or count, len(connections))):
            send()
        while received < count:
            for fd in wait(poll):
                missing[fd] -= receive(by_fd[fd])
                if not missing[fd]:
                    idle.append(by_fd[fd])
                    received += 1
                    if sent < count:
                        send()
    return time.perf_counter() - begin


def wait(poll: select.epoll) -> list[int]:
    """Return the fds for which there is something to do."""
    events = poll.poll(PATIENCE)
    if not events:
        raise TimeoutError("nothing came for long")
    return [fd for fd, _ in events]


def receive(connection: socket.socket) -> int:
    """Return how many bytes came."""
    try:
        data = connection.recv(RECEIVE_MAX)
    except ssl.SSLWantReadError:  # what came was no data, or not yet a whole record
        return 0
    if not data:
        raise ConnectionError("the server closed a connection")
    return len(data)


def storm(port: int, count: int, in_flight: int) -> float:
    """Connect, send a byte, get it back, close: *count* times, so many at a time."""
    begun = done = 0
    sockets: dict[int, socket.socket] = {}
    begin = time.perf_counter()
    with select.epoll() as poll:

        def connect() -> None:
            nonlocal begun
            connection = socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
            connection.connect_ex(("127.0.0.1", port))
            sockets[connection.fileno()] = connection
            poll.register(connection, select.EPOLLOUT)
            begun += 1

        for _ in range(min(count, in_flight)):
            connect()
        sending = set(sockets)
        while done < count:
            for fd in wait(poll):
                if fd in sending:
                    sockets[fd].send(b"x")
                    sending.remove(fd)
                    poll.modify(fd, select.EPOLLIN)
                    continue
                assert receive(sockets[fd]) == 1
                poll.unregister(fd)
                sockets.pop(fd).close()
                done += 1
                if begun < count:
                    connect()
                    sending.add(next(reversed(sockets)))
    return time.perf_counter() - begin


def datagrams(port: int, size: int, count: int, in_flight: int) -> float:
    """Send datagrams and wait for each one's answer, from so many sockets."""
    sockets: dict[int, socket.socket] = {}
    for _ in range(min(count, in_flight)):
        client = socket.socket(type=socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        client.connect(("127.0.0.1", port))
        sockets[client.fileno()] = client
    try:
        return exchange(list(sockets.values()), b"x" * size, size, count)
    finally:
        for client in sockets.values():
            client.close()


def flood(connections: Sequence[socket.socket], chunk: bytes, seconds: float) -> float:
    """Send on all connections as much as they take."""
    by_fd = {connection.fileno(): connection for connection in connections}
    begin = time.perf_counter()
    with select.epoll() as poll:
        for connection in connections:
            poll.register(connection, select.EPOLLOUT)
        # The clock is read once for many sends.
        for _ in cycle((None,)):
            for fd in wait(poll):
                by_fd[fd].send(chunk)
            if time.perf_counter() - begin >= seconds:
                break
    return time.perf_counter() - begin


def http_answer_size(port: int, request: bytes) -> int:
    """Return how many bytes the answer to *request* has, headers included."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request)
        answer = connection.recv(65536)
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(65536)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        [length] = (
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        while len(body) < length:
            body += connection.recv(65536)
    return len(head) + 4 + length
