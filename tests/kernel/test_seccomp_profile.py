"""The seccomp profiles in examples/ permit a ring, and forbid what they are there to forbid."""

from __future__ import annotations

import ctypes.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from textwrap import dedent
from typing import Final

import pytest
from children import output_of, run_python

FOLDER: Final = Path(__file__).parent.parent.parent / "examples" / "seccomp"
PROFILE: Final = FOLDER / "profile.json"
UNIT: Final = FOLDER / "trio-uring.conf"

IO_URING: Final = ["io_uring_setup", "io_uring_enter", "io_uring_register"]

pytestmark = pytest.mark.skipif(
    ctypes.util.find_library("seccomp") is None, reason="it needs libseccomp"
)

# In a process with a filter: what programs do, on a ring, and what no program may do.
PROGRAM: Final = """
    import ctypes, errno, json, os, sys
    import container, scenarios, trio, trio_uring

    container.enter(json.loads(sys.argv[1]))

    async def main():
        await scenarios.echo()
        await scenarios.cancel()
        await trio.Path(sys.argv[2]).write_bytes(b"data")
        assert (await trio.run_process(["cat", sys.argv[2]], capture_stdout=True)).stdout == b"data"
        await trio.to_thread.run_sync(os.getpid)
        return trio.lowlevel.current_statistics().io_statistics.backend

    print(trio_uring.run(main, ring=trio_uring.RingConfig(require=True)))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        lambda: libc.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None),
        lambda: libc.ptrace(0, 0, 0, 0),
        lambda: libc.reboot(0),
        lambda: libc.swapoff(b"/nowhere"),
    ):
        assert call() == -1
        assert ctypes.get_errno() == errno.EPERM
"""


def run_with(profile: object, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return run_python(PROGRAM, json.dumps(profile), tmp_path / "file")


def test_the_profile_permits_a_ring(tmp_path: Path) -> None:
    profile = json.loads(PROFILE.read_text(encoding="utf-8"))
    assert output_of(run_with(profile, tmp_path)) == ["io_uring"]


def test_without_the_calls_of_io_uring_there_is_none(tmp_path: Path) -> None:
    """So the other test would notice if they were missing."""
    profile = json.loads(PROFILE.read_text(encoding="utf-8"))
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in IO_URING]
    result = run_with(profile, tmp_path)
    assert "RingUnavailableError" in result.stderr
    assert "seccomp" in result.stderr


def test_no_new_namespaces() -> None:
    code = """
        import ctypes, errno, sys
        import container
        container.enter(container.profile_of(sys.argv[1]))
        libc = ctypes.CDLL(None, use_errno=True)
        NEWUSER = 0x10000000
        for call in (lambda: libc.unshare(NEWUSER), lambda: libc.setns(0, NEWUSER)):
            assert call() == -1
            assert ctypes.get_errno() == errno.EPERM
        assert libc.syscall(56 if sys.argv[2] == "x86_64" else 220, NEWUSER | 17, 0, 0, 0, 0) == -1
        assert ctypes.get_errno() == errno.EPERM
        assert libc.syscall(435, None, 0) == -1
        assert ctypes.get_errno() == errno.ENOSYS
    """
    machine = subprocess.check_output(["uname", "-m"], text=True).strip()
    assert output_of(run_python(dedent(code), PROFILE, machine)) == []


# --- systemd --------------------------------------------------------------------------------


def calls_of(group: str) -> set[str]:
    """Return the system calls of one of systemd's groups."""
    lines = subprocess.check_output(["systemd-analyze", "syscall-filter", group], text=True)
    calls = set[str]()
    for word in lines.split("\n", 1)[1].splitlines():
        name = word.strip()
        if name.startswith("@"):
            calls |= calls_of(name)
        elif name and not name.startswith("#"):
            calls.add(name)
    return calls


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="it needs systemd-analyze")
def test_the_unit_permits_a_ring(tmp_path: Path) -> None:
    names = set[str]()
    unit = UNIT.read_text(encoding="utf-8")
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit, re.MULTILINE):
        for word in line.split():
            names |= calls_of(word) if word.startswith("@") else {word}
    assert {*IO_URING} <= names
    rule = {"names": sorted(names), "action": "SCMP_ACT_ALLOW"}
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": [rule]}
    result = run_with(profile, tmp_path)
    assert output_of(result) == ["io_uring"]
