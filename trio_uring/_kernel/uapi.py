"""All constants of the kernel's ``io_uring.h``.

A member has the kernel's name without its class's prefix: ``IORING_SETUP_CLAMP`` is
``SetupFlag.CLAMP``. Constants that belong to no class are at the end of this file. The list is
complete, so that a new operation needs no change here. It does not say what the running kernel
supports: the kernel itself is asked.
"""

from collections.abc import Mapping
from enum import IntEnum, IntFlag
from typing import Final


class Opcode(IntEnum):
    """``IORING_OP_*``: the kind of an operation; see io_uring_enter(2)."""

    NOP = 0
    READV = 1
    WRITEV = 2
    FSYNC = 3
    READ_FIXED = 4
    WRITE_FIXED = 5
    POLL_ADD = 6
    POLL_REMOVE = 7
    SYNC_FILE_RANGE = 8
    SENDMSG = 9
    RECVMSG = 10
    TIMEOUT = 11
    TIMEOUT_REMOVE = 12
    ACCEPT = 13
    ASYNC_CANCEL = 14
    LINK_TIMEOUT = 15
    CONNECT = 16
    FALLOCATE = 17
    OPENAT = 18
    CLOSE = 19
    FILES_UPDATE = 20
    STATX = 21
    READ = 22
    WRITE = 23
    FADVISE = 24
    MADVISE = 25
    SEND = 26
    RECV = 27
    OPENAT2 = 28
    EPOLL_CTL = 29
    SPLICE = 30
    PROVIDE_BUFFERS = 31
    REMOVE_BUFFERS = 32
    TEE = 33
    SHUTDOWN = 34
    RENAMEAT = 35
    UNLINKAT = 36
    MKDIRAT = 37
    SYMLINKAT = 38
    LINKAT = 39
    MSG_RING = 40
    FSETXATTR = 41
    SETXATTR = 42
    FGETXATTR = 43
    GETXATTR = 44
    SOCKET = 45
    URING_CMD = 46
    SEND_ZC = 47
    SENDMSG_ZC = 48
    READ_MULTISHOT = 49
    WAITID = 50
    FUTEX_WAIT = 51
    FUTEX_WAKE = 52
    FUTEX_WAITV = 53
    FIXED_FD_INSTALL = 54
    FTRUNCATE = 55
    BIND = 56
    LISTEN = 57
    RECV_ZC = 58
    EPOLL_WAIT = 59
    READV_FIXED = 60
    WRITEV_FIXED = 61
    PIPE = 62
    NOP128 = 63
    URING_CMD128 = 64


# The first new opcode of each release that added any. New opcodes are always added at the end.
# Source: io_uring_enter(2) and the kernel's history. The manual says 6.5 for WAITID, but it was
# merged for 6.7: its number is between two others of 6.7.
_FIRST_OPCODE_OF: Final = {
    "5.1": Opcode.NOP,
    "5.2": Opcode.SYNC_FILE_RANGE,
    "5.3": Opcode.SENDMSG,
    "5.4": Opcode.TIMEOUT,
    "5.5": Opcode.TIMEOUT_REMOVE,
    "5.6": Opcode.FALLOCATE,
    "5.7": Opcode.SPLICE,
    "5.8": Opcode.TEE,
    "5.11": Opcode.SHUTDOWN,
    "5.15": Opcode.MKDIRAT,
    "5.18": Opcode.MSG_RING,
    "5.19": Opcode.FSETXATTR,
    "6.0": Opcode.SEND_ZC,
    "6.1": Opcode.SENDMSG_ZC,
    "6.7": Opcode.READ_MULTISHOT,
    "6.8": Opcode.FIXED_FD_INSTALL,
    "6.9": Opcode.FTRUNCATE,
    "6.11": Opcode.BIND,
    "6.15": Opcode.RECV_ZC,
    "6.16": Opcode.PIPE,
    "6.19": Opcode.NOP128,
}

# Only for error messages. Distributions backport opcodes, so the running kernel is asked what it
# supports (IORING_REGISTER_PROBE).
OPCODE_SINCE: Final[Mapping[Opcode, str]] = {
    opcode: [release for release, first in _FIRST_OPCODE_OF.items() if first <= opcode][-1]
    for opcode in Opcode
}


# The ring: io_uring_setup(2), io_uring_enter(2) and the flags in shared memory.


class SetupFlag(IntFlag):
    """``IORING_SETUP_*``: how a ring is set up; see io_uring_setup(2)."""

    IOPOLL = 1 << 0
    SQPOLL = 1 << 1
    SQ_AFF = 1 << 2
    CQSIZE = 1 << 3
    CLAMP = 1 << 4
    ATTACH_WQ = 1 << 5
    R_DISABLED = 1 << 6
    SUBMIT_ALL = 1 << 7
    COOP_TASKRUN = 1 << 8
    TASKRUN_FLAG = 1 << 9
    SQE128 = 1 << 10
    CQE32 = 1 << 11
    SINGLE_ISSUER = 1 << 12
    DEFER_TASKRUN = 1 << 13
    NO_MMAP = 1 << 14
    REGISTERED_FD_ONLY = 1 << 15
    NO_SQARRAY = 1 << 16
    HYBRID_IOPOLL = 1 << 17
    CQE_MIXED = 1 << 18
    SQE_MIXED = 1 << 19
    SQ_REWIND = 1 << 20


class FeatureFlag(IntFlag):
    """``IORING_FEAT_*``: features of the running kernel; see io_uring_setup(2)."""

    SINGLE_MMAP = 1 << 0
    NODROP = 1 << 1
    SUBMIT_STABLE = 1 << 2
    RW_CUR_POS = 1 << 3
    CUR_PERSONALITY = 1 << 4
    FAST_POLL = 1 << 5
    POLL_32BITS = 1 << 6
    SQPOLL_NONFIXED = 1 << 7
    EXT_ARG = 1 << 8
    NATIVE_WORKERS = 1 << 9
    RSRC_TAGS = 1 << 10
    CQE_SKIP = 1 << 11
    LINKED_FILE = 1 << 12
    REG_REG_RING = 1 << 13
    RECVSEND_BUNDLE = 1 << 14
    MIN_TIMEOUT = 1 << 15
    RW_ATTR = 1 << 16
    NO_IOWAIT = 1 << 17


class EnterFlag(IntFlag):
    """``IORING_ENTER_*``: what the system call does; see io_uring_enter(2)."""

    GETEVENTS = 1 << 0
    SQ_WAKEUP = 1 << 1
    SQ_WAIT = 1 << 2
    EXT_ARG = 1 << 3
    REGISTERED_RING = 1 << 4
    ABS_TIMER = 1 << 5
    EXT_ARG_REG = 1 << 6
    NO_IOWAIT = 1 << 7


class SqeFlag(IntFlag):
    """``IOSQE_*``: flags for any operation; see io_uring_enter(2)."""

    FIXED_FILE = 1 << 0
    IO_DRAIN = 1 << 1
    IO_LINK = 1 << 2
    IO_HARDLINK = 1 << 3
    ASYNC = 1 << 4
    BUFFER_SELECT = 1 << 5
    CQE_SKIP_SUCCESS = 1 << 6


class CqeFlag(IntFlag):
    """``IORING_CQE_F_*``: flags of a completion; see io_uring_enter(2)."""

    BUFFER = 1 << 0
    MORE = 1 << 1
    SOCK_NONEMPTY = 1 << 2
    NOTIF = 1 << 3
    BUF_MORE = 1 << 4
    SKIP = 1 << 5
    F_32 = 1 << 15
    # The same bit is part of the buffer ID. Only completions of SocketUringOp.TX_TIMESTAMP have it.
    TSTAMP_HW = 1 << 16


class SqFlag(IntFlag):
    """``IORING_SQ_*``: the flags of the SQ, written by the kernel; see io_uring(7)."""

    NEED_WAKEUP = 1 << 0
    CQ_OVERFLOW = 1 << 1
    TASKRUN = 1 << 2


class CqFlag(IntFlag):
    """``IORING_CQ_*``: the flags of the CQ, written by us; see io_uring_register(2)."""

    EVENTFD_DISABLED = 1 << 0


# Registration: io_uring_register(2).


class RegisterOpcode(IntEnum):
    """``IORING_REGISTER_*``, ``IORING_UNREGISTER_*``: see io_uring_register(2)."""

    BUFFERS = 0
    UNREGISTER_BUFFERS = 1
    FILES = 2
    UNREGISTER_FILES = 3
    EVENTFD = 4
    UNREGISTER_EVENTFD = 5
    FILES_UPDATE = 6
    EVENTFD_ASYNC = 7
    PROBE = 8
    PERSONALITY = 9
    UNREGISTER_PERSONALITY = 10
    RESTRICTIONS = 11
    ENABLE_RINGS = 12
    FILES2 = 13
    FILES_UPDATE2 = 14
    BUFFERS2 = 15
    BUFFERS_UPDATE = 16
    IOWQ_AFF = 17
    UNREGISTER_IOWQ_AFF = 18
    IOWQ_MAX_WORKERS = 19
    RING_FDS = 20
    UNREGISTER_RING_FDS = 21
    PBUF_RING = 22
    UNREGISTER_PBUF_RING = 23
    SYNC_CANCEL = 24
    FILE_ALLOC_RANGE = 25
    PBUF_STATUS = 26
    NAPI = 27
    UNREGISTER_NAPI = 28
    CLOCK = 29
    CLONE_BUFFERS = 30
    SEND_MSG_RING = 31
    ZCRX_IFQ = 32
    RESIZE_RINGS = 33
    MEM_REGION = 34
    QUERY = 35
    ZCRX_CTRL = 36
    BPF_FILTER = 37


class RestrictionOpcode(IntEnum):
    """``IORING_RESTRICTION_*``: see io_uring_register_restrictions(3)."""

    REGISTER_OP = 0
    SQE_OP = 1
    SQE_FLAGS_ALLOWED = 2
    SQE_FLAGS_REQUIRED = 3


# Operations: constants for op_flags, ioprio, len or addr of their SQEs.


class FsyncFlag(IntFlag):
    """``IORING_FSYNC_*``, in ``op_flags``; see io_uring_prep_fsync(3)."""

    DATASYNC = 1 << 0


class TimeoutFlag(IntFlag):
    """``IORING_TIMEOUT_*``, in ``op_flags``; see io_uring_prep_timeout(3)."""

    ABS = 1 << 0
    UPDATE = 1 << 1
    BOOTTIME = 1 << 2
    REALTIME = 1 << 3
    LINK_TIMEOUT_UPDATE = 1 << 4
    ETIME_SUCCESS = 1 << 5
    MULTISHOT = 1 << 6
    IMMEDIATE_ARG = 1 << 7
    CLOCK_MASK = BOOTTIME | REALTIME
    UPDATE_MASK = UPDATE | LINK_TIMEOUT_UPDATE


class CancelFlag(IntFlag):
    """``IORING_ASYNC_CANCEL_*``, in ``op_flags``; see io_uring_prep_cancel(3)."""

    ALL = 1 << 0
    FD = 1 << 1
    ANY = 1 << 2
    FD_FIXED = 1 << 3
    USERDATA = 1 << 4
    OP = 1 << 5


class RecvSendFlag(IntFlag):
    """``IORING_{RECVSEND,RECV,SEND}_*``, in ``ioprio``; see io_uring_prep_{recv,send}(3)."""

    POLL_FIRST = 1 << 0
    MULTISHOT = 1 << 1
    FIXED_BUF = 1 << 2
    ZC_REPORT_USAGE = 1 << 3
    BUNDLE = 1 << 4
    VECTORIZED = 1 << 5


class AcceptFlag(IntFlag):
    """``IORING_ACCEPT_*``, in ``ioprio``; see io_uring_prep_accept(3)."""

    MULTISHOT = 1 << 0
    DONTWAIT = 1 << 1
    POLL_FIRST = 1 << 2


class MsgRingCommand(IntEnum):
    """``IORING_MSG_*``, in ``addr``; see io_uring_prep_msg_ring(3)."""

    DATA = 0
    SEND_FD = 1


class Futex2Flag(IntFlag):
    """``FUTEX2_*``, in ``fd``; see futex(2) and io_uring_prep_futex_wait(3)."""

    SIZE_U8 = 0
    SIZE_U16 = 1
    SIZE_U32 = 2
    SIZE_U64 = 3
    NUMA = 1 << 2
    MPOL = 1 << 3
    PRIVATE = 1 << 7


# Single constants, without the prefix IORING_ unless the comment says otherwise.

FILE_INDEX_ALLOC: Final = 0xFFFFFFFF  # in file_index: pick a free slot
RSRC_REGISTER_SPARSE: Final = 1 << 0
NOTIF_USAGE_ZC_COPIED: Final = 1 << 31  # in res, after RecvSendFlag.ZC_REPORT_USAGE
CQE_BUFFER_SHIFT: Final = 16  # the position of the buffer ID in a CQE's flags
FUTEX_BITSET_MATCH_ANY: Final = 0xFFFFFFFF  # has no prefix
