"""The socket constants that operations use, as ints.

They are plain ints because an ``IntFlag`` in an expression costs a microsecond. A constant that the
system lacks is 0, so that the package can be imported there. No operation is created there.
"""

import socket
from typing import Final


def _number(name: str) -> int:
    return int(getattr(socket, name, 0))


AF_INET: Final = _number("AF_INET")
AF_INET6: Final = _number("AF_INET6")
AF_UNIX: Final = _number("AF_UNIX")

SOCK_CLOEXEC: Final = _number("SOCK_CLOEXEC")
SOCK_NONBLOCK: Final = _number("SOCK_NONBLOCK")
SOCK_STREAM: Final = _number("SOCK_STREAM")

MSG_CMSG_CLOEXEC: Final = _number("MSG_CMSG_CLOEXEC")
MSG_DONTROUTE: Final = _number("MSG_DONTROUTE")
MSG_DONTWAIT: Final = _number("MSG_DONTWAIT")
MSG_MORE: Final = _number("MSG_MORE")
MSG_NOSIGNAL: Final = _number("MSG_NOSIGNAL")
MSG_PEEK: Final = _number("MSG_PEEK")

SOL_SOCKET: Final = _number("SOL_SOCKET")
SCM_RIGHTS: Final = _number("SCM_RIGHTS")
