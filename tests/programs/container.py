"""Applies a seccomp profile to this process, as a container's runtime does, by libseccomp."""

from __future__ import annotations

import ctypes
import errno
import json
from pathlib import Path
from typing import Any, Final

# From the header of libseccomp.
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_MASKED_EQ: Final = 7
_UNKNOWN: Final = -1

LIBRARY: Final = "libseccomp.so.2"


class _Comparison(ctypes.Structure):
    """``struct scmp_arg_cmp``."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def profile_of(path: str) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return profile


def enter(profile: dict[str, Any]) -> None:
    """Allow from now on only what *profile* does, in this process and its children.

    System calls that libseccomp does not know are left out, as the runtimes do.
    """
    library = ctypes.CDLL(LIBRARY)
    library.seccomp_init.restype = ctypes.c_void_p
    filter_ = ctypes.c_void_p(
        library.seccomp_init(
            ctypes.c_uint32(_action(profile["defaultAction"], profile["defaultErrnoRet"]))
        )
    )
    assert filter_
    for rule in profile["syscalls"]:
        action = _action(rule["action"], rule.get("errnoRet", errno.EPERM))
        comparisons = [_comparison(argument) for argument in rule.get("args", ())]
        array = (_Comparison * len(comparisons))(*comparisons)
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number == _UNKNOWN:
                continue
            result = library.seccomp_rule_add_array(
                filter_, ctypes.c_uint32(action), number, len(comparisons), array
            )
            # Negative numbers stand for calls that other architectures have.
            if result != 0 and number > 0:
                raise OSError(-result, f"seccomp_rule_add_array({name})")
    result = library.seccomp_load(filter_)
    library.seccomp_release(filter_)
    if result != 0:
        raise OSError(-result, "seccomp_load")


def _action(name: str, error: int) -> int:
    return {"SCMP_ACT_ALLOW": _ALLOW, "SCMP_ACT_ERRNO": _ERRNO | error}[name]


def _comparison(argument: dict[str, Any]) -> _Comparison:
    assert argument["op"] == "SCMP_CMP_MASKED_EQ"
    return _Comparison(argument["index"], _MASKED_EQ, argument["value"], argument["valueTwo"])
