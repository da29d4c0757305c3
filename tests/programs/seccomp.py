"""A seccomp filter for this process, like that of a container's default profile."""

from __future__ import annotations

import ctypes
import platform
import struct

SETUP, ENTER, REGISTER = 425, 426, 427  # the same on every architecture

# From linux/prctl.h, linux/seccomp.h, linux/bpf_common.h.
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW = 0x7FFF0000
_RET_ERRNO = 0x00050000
_LD_W_ABS, _JEQ_K, _RET_K = 0x20, 0x15, 0x06


def _instruction(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, k)


def forbid(*calls: int, error: int) -> None:
    """Make system *calls* fail with *error* from now on, in this process and its children."""
    program = _instruction(_LD_W_ABS, 0)  # the number, at offset 0 of struct seccomp_data
    for call in calls:
        program += _instruction(_JEQ_K, call, jump_false=1) + _instruction(
            _RET_K, _RET_ERRNO | error
        )
    program += _instruction(_RET_K, _RET_ALLOW)
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog
    fprog = ctypes.create_string_buffer(
        struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog)):
        if libc.prctl(*arguments, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl{arguments} on {platform.release()}")
