"""Types of the native engine (engine/), in the order of module.c."""

import io
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TypeVar

from trio_uring._engine._file_systems import FileSystem
from trio_uring._engine._in_flight import InFlightTable
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._limiter import Limiter
from trio_uring._engine._ring import Ring
from trio_uring._operations import Operation

_T = TypeVar("_T")

class Op:
    """One operation that a task awaits. It is the engine's `InFlight`."""

    res: int
    flags: int
    user_data: int
    since: int
    cancel_asked: bool
    closing: bool
    raise_cancel: Callable[[], None] | None
    fd: int | None  # None if closing it does not end the operation
    owner: object
    operation: Operation[object]
    def fd_closing(self) -> None: ...
    def finish_cancelled(self) -> None: ...

class Loop:
    """The engine's state of one run."""

    in_flight: int
    send_operation: Operation[object]
    receive_operation: Operation[object] | None
    sent_now: int
    has_files: bool
    times_operations: bool
    file_hits: int
    def __init__(
        self,
        ring: int,
        python_ring: Ring,
        manager: object,
        waiters: Mapping[int, Sequence[object]],
        registered: Mapping[int, object],
        limiter: Limiter,
        send_operation: Operation[object],
    ) -> None: ...
    def begin(self, runner: object, turn_budget: float, may_send_now: bool, /) -> None: ...
    def receive_into(
        self,
        pool: int,
        memory: object,
        address: int,
        size: int,
        incremental_count: int,
        group: int,
        operation: Operation[object],
        /,
    ) -> None: ...
    def submit_and_wait(self, timeout: float, /) -> list[tuple[int, int, int]] | int: ...
    def dispatch(self) -> None: ...
    def discard(self) -> None: ...
    def has_fetched(self, user_data: int, /) -> bool: ...
    def within_budget(self) -> bool: ...
    def completed(self) -> list[int]: ...
    def in_flight_by_opcode(self) -> list[int]: ...
    def cancel_all(self) -> None: ...
    def fail_all(self, res: int, /) -> None: ...
    def close(self) -> None: ...

class FileHit:
    """One method of one file, for calls that need neither the ring nor a greenlet."""

    due: bool
    missed: bool
    flags: int
    budget: int
    def __init__(
        self, what: int, raw: io.FileIO, method: Callable[..., object], flags: int
    ) -> None: ...
    def __call__(self, *args: object) -> object: ...
    def take(self) -> object: ...

def setup(api: int, names: dict[str, object], /) -> None: ...
def set_twin(
    name: str,
    twin: Callable[..., Coroutine[object, object, object]],
    rest: Callable[..., Coroutine[object, object, object]],
    failed: Callable[[UringIOManager, Op], object],
    /,
) -> None: ...
def set_stream(
    name: str,
    function: Callable[..., object],
    socket: str,
    guard: str,
    held: str,
    guard_type: type,
    /,
) -> None: ...
def set_files(
    raw_type: type,
    fileno: Callable[[io.FileIO], int],
    readinto: Callable[..., int | None],
    readall: Callable[..., bytes | None],
    otherwise: object,
    inline_max: int,
    /,
) -> None: ...
def set_era(era: object, /) -> None: ...
def set_paths(
    rows: tuple[
        tuple[
            object,
            int,
            int,
            int,
            tuple[type, ...],
            tuple[object, ...],
            tuple[str, ...],
            tuple[object, ...],
        ],
        ...,
    ],
    partial: type,
    string_slot: object,
    parts_slot: object,
    fstat: Callable[[int], object],
    wrap_file: Callable[..., object],
    size_max: int,
    is_utf8: bool,
    /,
) -> None: ...
def set_opened(
    raw_type: type,
    buffered_type: type,
    text_type: type,
    known: dict[int, FileSystem],
    file_system_of: Callable[[int], FileSystem],
    server: FileSystem,
    memory: FileSystem,
    /,
) -> None: ...
def step(runner: object, batch: list[object], /) -> None: ...
def perform(table: InFlightTable, operation: Operation[_T], /) -> Awaitable[_T]: ...
def perform_shielded(table: InFlightTable, operation: Operation[_T], /) -> Awaitable[_T]: ...
def recv(sock: object, buflen: object, /) -> Awaitable[bytes]: ...
def recv_into(sock: object, arguments: tuple[object, object], /) -> Awaitable[int]: ...
def send(sock: object, data: object, /) -> Awaitable[int]: ...
def attempt(sock: object, call: tuple[object, ...], /) -> Awaitable[object]: ...
def receive_some(stream: object, max_bytes: object, /) -> Awaitable[bytes]: ...
def send_all(stream: object, data: object, /) -> Awaitable[None]: ...
def anyio_receive(stream: object, max_bytes: object, /) -> Awaitable[bytes]: ...
def anyio_send(stream: object, item: object, /) -> Awaitable[None]: ...
def read_cached(fd: int, size: int, offset: int, /) -> bytes | None: ...
def read_many_cached(
    fd: int, parts: list[tuple[int, int]], found: list[bytes | None], /
) -> int: ...
def call_path(function: Callable[..., object], args: tuple[object, ...], /) -> object: ...
def close_file(file: object, /) -> object: ...
