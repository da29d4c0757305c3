"""``python -m trio_uring doctor``: reports what the kernel supports and what a run would use."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from ._config import RingConfig
from ._engine._buffer_pool import BufferPool
from ._engine._ring import Ring
from ._errors import IncompatibleTrioError, RingUnavailableError
from ._kernel.uapi import OPCODE_SINCE, Opcode
from ._run import probe, run
from ._statistics import RingStatistics, flag_names
from ._trio_private import OVERRIDE

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

# What a run on a ring does if the kernel doesn't have the opcode.
_WANTED_OPCODES: Final = {
    Opcode.RECV: "receives go through epoll",
    Opcode.SEND: "sends go through epoll",
    Opcode.ACCEPT: "accepting fails",
    Opcode.CONNECT: "connecting fails",
    Opcode.OPENAT: "files are opened in threads",
    Opcode.STATX: "os.stat runs in threads",
    Opcode.READ: "files are read in threads",
    Opcode.WRITE: "files are written in threads",
    Opcode.SPLICE: "no transfers inside the kernel",
}
_SETTINGS: Final = (
    *("TRIO_URING", "TRIO_URING_DISABLE", "TRIO_URING_ENGINE", "TRIO_URING_INSPECT"),
    OVERRIDE,
)
_REFUSED: Final = "refused: "
_WORKS: Final = "works here"
_NONE: Final = "not available, runs fall back to Trio's epoll"
_SYSCTL: Final = Path("/proc/sys/kernel/io_uring_disabled")

# A wheel puts it beside the package, and an editable installation does not. In the root of a
# checkout, this file is not the installed one, so it need not be beside this one.
_PTH: Final = "trio_uring.pth"

_Rows = dict[str, "str | int | list[str]"]


@attrs.frozen
class Report:
    """What the doctor found.

    Args:
      ok: Whether a run would get a ring.
      verdict: The same, in a sentence.
      versions: The versions of the kernel, Python, this package, Trio and AnyIO.
      limits: The limits of the system that apply to a ring.
      settings: The environment variables that this package reads.
      in_use: The flags and sizes of the ring that a run would get.
      missing: What the kernel doesn't have or has refused, and the consequence.
      advice: How to get a ring, or what is missing.
    """

    ok: bool
    verdict: str
    versions: dict[str, str]
    limits: _Rows
    settings: dict[str, str]
    in_use: _Rows
    missing: list[str]
    advice: list[str]

    def as_dict(self) -> dict[str, object]:
        """Return the report as a dict, for JSON."""
        return attrs.asdict(self)

    def as_text(self) -> str:
        """Return the report as text, to be printed."""
        lines = [f"io_uring: {self.verdict}"]
        for title, rows in (
            ("versions", self.versions),
            ("limits", self.limits),
            ("settings", self.settings),
            ("in use", self.in_use),
        ):
            shown = ((name, _as_words(value)) for name, value in rows.items())
            lines += ["", f"{title}:", *(f"  {name:22} {words}" for name, words in shown)]
        for title, items in (("missing", self.missing), ("what to do", self.advice)):
            lines += ["", f"{title}:", *(f"  - {item}" for item in items or ["nothing"])]
        return "\n".join(lines)


def _as_words(value: str | int | list[str]) -> str:
    return " ".join(value) if isinstance(value, list) else f"{value}"


def main(options: argparse.Namespace) -> int:
    """Print the report. Return 0 if a run would get a ring."""
    report = examine()
    print(json.dumps(report.as_dict(), indent=2) if options.json else report.as_text())
    return 0 if report.ok else 1


def examine() -> Report:
    """Set up a ring, examine it, close it, and return the report."""
    verdict = _NONE
    in_use: _Rows = {}
    missing = ["a ring"]
    advice: list[str] = []
    try:
        ring = probe(RingConfig())
    except RingUnavailableError as exc:
        advice.append(exc.reason)
    else:
        in_use, missing = _look_at(ring)
        advice += _remedies(missing)
        verdict, problem, in_use["engine"] = _try_a_run()
        if problem:
            advice.append(problem)
        elif not any(Path(entry, _PTH).exists() for entry in sys.path):
            advice.append(_NO_PTH)
    return Report(
        ok=verdict == _WORKS,
        verdict=verdict,
        versions=_versions(),
        limits=_limits(),
        settings={name: os.environ.get(name, "not set") for name in _SETTINGS},
        in_use=in_use,
        missing=missing,
        advice=advice,
    )


_NO_PTH: Final = (
    "this installation, such as an editable one, has no trio_uring.pth, so TRIO_URING=1 has no "
    "effect without the launcher: install a wheel (pip install .), or start programs with "
    "`python -m trio_uring`"
)
_NO_MEMORY: Final = (
    "RLIMIT_MEMLOCK is too low for a ring of the default size: raise it (ulimit -l 8192, or "
    "LimitMEMLOCK=8M in a systemd unit, or docker run --ulimit memlock=8388608)"
)


def _remedies(missing: Sequence[str]) -> list[str]:
    """Return what to do about the steps of the setup that the kernel has refused."""
    remedies: list[str] = []
    refused = [step for step in missing if step.startswith(_REFUSED)]
    no_memory = [step for step in refused if step.endswith(errno.errorcode[errno.ENOMEM])]
    if no_memory or any(os.strerror(errno.ENOMEM) in step for step in missing):
        remedies.append(_NO_MEMORY)
    if len(no_memory) < len(refused):
        remedies.append("a newer kernel would give the rest of what was refused above")
    return remedies


def _try_a_run() -> tuple[str, str, str]:
    """Return the verdict, why a run gets no ring although one works, and the run's engine."""
    try:
        statistics = run(_statistics, ring=RingConfig(require=True))
    except IncompatibleTrioError as exc:
        return f"{_WORKS}, but not with this Trio", exc.reason, "none"
    except ValueError as exc:
        return f"{_WORKS}, but a setting is wrong", str(exc), "none"
    if isinstance(statistics, RingStatistics):
        why = f", because {statistics.engine_reason}" if statistics.engine_reason else ""
        return _WORKS, "", f"{statistics.engine}{why}"
    advice = "TRIO_URING switches io_uring off: unset it"
    return f"{_WORKS}, but is switched off", advice, "none"


async def _statistics() -> object:
    await trio.lowlevel.checkpoint()
    return trio.lowlevel.current_statistics().io_statistics


def _versions() -> dict[str, str]:
    return {
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "trio_uring": _version("trio-uring"),
        "trio": trio.__version__,
        "anyio": _version("anyio"),
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _limits() -> _Rows:
    disabled = _SYSCTL.read_text().strip() if _SYSCTL.exists() else "no such sysctl"
    return {
        "RLIMIT_MEMLOCK": _limit("RLIMIT_MEMLOCK"),
        "RLIMIT_NOFILE": _limit("RLIMIT_NOFILE"),
        "io_uring_disabled": int(disabled) if disabled.isdigit() else disabled,
    }


def _limit(name: str) -> str | int:
    if sys.platform == "win32":
        return "not on this system"
    soft, _ = resource.getrlimit(getattr(resource, name))
    return "unlimited" if soft == resource.RLIM_INFINITY else soft


def _look_at(ring: Ring) -> tuple[_Rows, list[str]]:
    """Return what is in use and what is missing, on a ring like *ring*, which is closed."""
    no_buffers = _why_no_buffer_rings()
    in_use: _Rows = {
        "submission entries": ring.entries,
        "completion entries": ring.completion_entries,
        "set-up flags": [*flag_names(ring.setup_flags)],
        "features": [*flag_names(ring.features)],
        "opcodes": len(ring.supported),
        "known opcodes": len(Opcode),
        **_worker_limits(ring),
        "receive buffers": "no" if no_buffers else "provided by a buffer ring",
    }
    missing = [f"{_REFUSED}{step}" for step in ring.refused]
    if no_buffers:
        missing.append(f"buffer rings (Linux 5.19, {no_buffers}): receives go through epoll")
    for opcode in Opcode:
        if opcode not in ring.supported:
            loss = _WANTED_OPCODES.get(opcode, "only where a program asks for it")
            missing.append(f"{opcode.name} (Linux {OPCODE_SINCE[opcode]}): {loss}")
    return in_use, missing


def _worker_limits(ring: Ring) -> _Rows:
    limits = ring.worker_limits
    if not limits:  # before Linux 5.15
        return {"kernel workers": "as many as the kernel likes"}
    return {name.replace("_", " "): limit for name, limit in limits.items()}


def _why_no_buffer_rings() -> str:
    ring = Ring(RingConfig())
    try:
        BufferPool(ring, group=0, count=1, size=4096).close()
    except OSError as exc:
        return f"{exc.strerror}"
    finally:
        ring.close()
    return ""
