"""A FUSE file system whose server needs the event loop of the test for each answer.

Like a program that both serves a file system and uses it. If the loop blocks until an answer, the
server notes this, and answers nevertheless. It uses ``/dev/fuse`` directly, and needs the right to
mount.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Request(IntEnum):
    """The FUSE requests that the server answers."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    UNLINK = 10
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42


_IN: Final = struct.Struct("=IIQQ 16x")  # len, opcode, unique, nodeid
_OUT: Final = struct.Struct("=IiQ")  # len, error, unique
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI 28x")
_ATTR: Final = struct.Struct("=QQQ 36x IIIIII 4x")  # ino, size, blocks; mode, nlink, ..., blksize
_ENTRY: Final = struct.Struct("=QQQQII")
_ATTR_OUT: Final = struct.Struct("=QII")
_OPEN_OUT: Final = struct.Struct("=QII")

_ROOT: Final = 1
_FATTR_SIZE: Final = 8
_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_NO_ANSWER: Final = (Request.FORGET, Request.BATCH_FORGET, Request.INTERRUPT)
_FOREVER: Final = 10_000  # seconds: what the kernel remembers of names

# How long a loop may take for a callback before it counts as standing still. Only a fault is slow.
_PATIENCE: Final = 2.0


class FuseServer:
    """One directory of files, in memory, mounted at *directory* until it is closed.

    Raises:
      OSError: this process may not mount.
    """

    def __init__(self, directory: Path) -> None:
        self.files: dict[int, bytearray] = {}
        self.names: dict[bytes, int] = {}
        self.errors: dict[Request, int] = {}  # what to answer instead
        self.asked: set[Request] = set()
        self.stood_still: list[Request] = []  # during which requests the loop did nothing else
        self._directory = os.fsencode(directory)
        self._token: trio.lowlevel.TrioToken | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        if self._libc.mount(b"test", self._directory, b"fuse.test", 0, options.encode()):
            os.close(self._device)
            raise OSError(ctypes.get_errno(), "mount")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def add(self, name: str, data: bytes) -> None:
        """Add a file."""
        node = len(self.files) + _ROOT + 1
        self.files[node] = bytearray(data)
        self.names[name.encode()] = node

    def need_this_loop(self) -> trio.Path:
        """From now on, answer only after the event loop that calls this has run a callback.

        Returns:
          The directory.
        """
        self._token = trio.lowlevel.current_trio_token()
        return trio.Path(os.fsdecode(self._directory))

    def close(self) -> None:
        """Unmount. To be called when nothing uses the file system."""
        self._token = None
        self._libc.umount2(self._directory, _MNT_FORCE)  # what still waits for an answer fails
        self._libc.umount2(self._directory, _MNT_DETACH)
        self._thread.join()
        os.close(self._device)

    # ---- Requests --------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            try:
                data = os.read(self._device, 1 << 21)
            except OSError as exc:
                if exc.errno == errno.ENODEV:  # unmounted
                    return
                continue
            _, opcode, unique, node = _IN.unpack_from(data)
            if opcode in _NO_ANSWER:
                continue
            error, answer = self._answer(opcode, node, data[_IN.size :])
            with_header = _OUT.pack(_OUT.size + len(answer), -error, unique) + answer
            try:
                os.write(self._device, with_header)
            except FileNotFoundError:  # who asked was interrupted
                continue

    def _answer(self, opcode: int, node: int, data: bytes) -> tuple[int, bytes]:
        try:
            request = Request(opcode)
        except ValueError:
            return errno.ENOSYS, b""
        self._wait_for_loop(request)
        self.asked.add(request)
        if request in self.errors:
            return self.errors[request], b""
        answers: dict[Request, Callable[[int, bytes], bytes]] = {
            Request.INIT: _init,
            Request.LOOKUP: self._lookup,
            Request.GETATTR: lambda node, _data: self._attr_out(node),
            Request.SETATTR: self._setattr,
            Request.UNLINK: self._unlink,
            Request.OPEN: lambda _node, _data: _OPEN_OUT.pack(0, 0, 0),
            Request.READ: self._read,
            Request.WRITE: self._write,
            Request.CREATE: self._create,
        }
        try:
            return 0, answers.get(request, _nothing)(node, data)
        except OSError as exc:
            return exc.errno or errno.EIO, b""

    def _wait_for_loop(self, request: Request) -> None:
        token = self._token
        if token is None:
            return
        moved = threading.Event()
        try:
            token.run_sync_soon(moved.set)
        except trio.RunFinishedError:
            return
        if not moved.wait(_PATIENCE):
            self.stood_still.append(request)

    def _attr(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o644
        size = len(self.files.get(node, b""))
        return _ATTR.pack(node, size, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096)

    def _attr_out(self, node: int) -> bytes:
        return _ATTR_OUT.pack(0, 0, 0) + self._attr(node)  # asked for each time

    def _entry(self, node: int) -> bytes:
        return _ENTRY.pack(node, 0, _FOREVER, 0, 0, 0) + self._attr(node)

    def _lookup(self, _node: int, data: bytes) -> bytes:
        node = self.names.get(data.rstrip(b"\0"))
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return self._entry(node)

    def _setattr(self, node: int, data: bytes) -> bytes:
        valid, size = struct.unpack_from("=I 12x Q", data)
        if valid & _FATTR_SIZE:
            file = self.files[node]
            file[size:] = bytes(max(size - len(file), 0))
        return self._attr_out(node)

    def _unlink(self, _node: int, data: bytes) -> bytes:
        del self.names[data.rstrip(b"\0")]
        return b""

    def _read(self, node: int, data: bytes) -> bytes:
        offset, size = struct.unpack_from("=8x QI", data)
        return bytes(self.files[node][offset : offset + size])

    def _write(self, node: int, data: bytes) -> bytes:
        offset, size = struct.unpack_from("=8x QI", data)
        file = self.files[node]
        file.extend(bytes(max(offset - len(file), 0)))
        file[offset : offset + size] = data[40 : 40 + size]
        return struct.pack("=I 4x", size)

    def _create(self, _node: int, data: bytes) -> bytes:
        name = data[16:].rstrip(b"\0")
        self.add(name.decode(), b"")
        return self._entry(self.names[name]) + _OPEN_OUT.pack(0, 0, 0)


def _init(_node: int, _data: bytes) -> bytes:
    return _INIT_OUT.pack(7, 31, 0, 0, 16, 12, 1 << 17, 1, 32, 0, 0)


def _nothing(_node: int, _data: bytes) -> bytes:
    return b""
