"""Setting up a ring when something is missing: fewer flags, limits, filters.

System calls are made to fail, in child processes: by a library that replaces libc's `syscall`, by
seccomp filters, and by limits. Nothing of the package is patched.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import dedent
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from children import output_of, run_python
from programs import seccomp

from trio_uring import RingConfig
from trio_uring._kernel.uapi import FeatureFlag, RegisterOpcode, SetupFlag
from trio_uring._run import probe

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from pathlib import Path

Refuse: TypeAlias = Callable[..., dict[str, str]]  # see the fixture of that name

BASE = {"CLAMP", "CQSIZE"}
DEFER = BASE | {"SUBMIT_ALL", "SINGLE_ISSUER", "DEFER_TASKRUN"}
FLAGGED = DEFER | {"TASKRUN_FLAG"}
SINGLE = BASE | {"SUBMIT_ALL", "SINGLE_ISSUER", "COOP_TASKRUN"}
COOP = BASE | {"SUBMIT_ALL", "COOP_TASKRUN"}
SUBMIT_ALL = BASE | {"SUBMIT_ALL"}

# What a kernel does not know (its release): the flags that it then gets.
LADDER = {
    "6.1": (SetupFlag(0), FLAGGED),
    "6.1, without TASKRUN_FLAG": (SetupFlag.TASKRUN_FLAG, DEFER),
    "6.0": (SetupFlag.DEFER_TASKRUN, SINGLE),
    "5.19": (SetupFlag.DEFER_TASKRUN | SetupFlag.SINGLE_ISSUER, COOP),
    "5.18": (
        SetupFlag.DEFER_TASKRUN | SetupFlag.SINGLE_ISSUER | SetupFlag.COOP_TASKRUN,
        SUBMIT_ALL,
    ),
    "5.11": (
        SetupFlag.DEFER_TASKRUN
        | SetupFlag.SINGLE_ISSUER
        | SetupFlag.COOP_TASKRUN
        | SetupFlag.SUBMIT_ALL,
        BASE,
    ),
}
SQPOLL_LADDER = {
    "6.0": (SetupFlag(0), BASE | {"SQPOLL", "SUBMIT_ALL", "SINGLE_ISSUER"}),
    "5.18": (SetupFlag.SINGLE_ISSUER, BASE | {"SQPOLL", "SUBMIT_ALL"}),
    "5.11": (SetupFlag.SINGLE_ISSUER | SetupFlag.SUBMIT_ALL, BASE | {"SQPOLL"}),
}

SCENARIOS = "import scenarios, sys; scenarios.report(*sys.argv[1:])"


@dataclass
class Statistics:
    """The statistics of its runs that a child printed."""

    runs: list[dict[str, Any]]

    @classmethod
    def of(cls, result: subprocess.CompletedProcess[str]) -> Statistics:
        return cls([json.loads(line) for line in output_of(result)])

    def __getitem__(self, name: str) -> Any:
        """Return the value, which must be the same in all runs."""
        values = [run[name] for run in self.runs]
        assert all(value == values[0] for value in values), values
        return values[0]

    @property
    def refused_at_setup(self) -> list[str]:
        """What was refused before the ring was there. An older kernel refuses more, later."""
        return [step for step in self["refused"] if " entries, " in step]


def all_scenarios(environment: dict[str, str], *arguments: object) -> Statistics:
    statistics = Statistics.of(run_python(SCENARIOS, *arguments, environment=environment))
    assert len(statistics.runs) == 2  # on its own, and as a guest
    return statistics


# --- Set-up, step by step -------------------------------------------------------------------


@pytest.mark.parametrize("release", LADDER)
def test_the_flag_ladder(release: str, refuse: Refuse) -> None:
    unknown, flags = LADDER[release]
    statistics = all_scenarios(refuse(flags=int(unknown)))
    assert statistics["backend"] == "io_uring"
    assert set(statistics["setup_flags"]) == flags
    steps = list(LADDER).index(release)
    assert len(statistics.refused_at_setup) == steps
    assert all(step.startswith("256 entries, ") for step in statistics.refused_at_setup)
    assert all(step.endswith(": EINVAL") for step in statistics.refused_at_setup)


CLOSE_IN_ANOTHER_THREAD = """
from children import in_thread
from trio_uring import RingConfig
from trio_uring._engine._ring import Ring
from trio_uring.lowlevel import operations

def close() -> None:
    own = Ring(RingConfig())
    ring.close()
    own.push(operations.nop(), 1)
    print(own.submit_and_wait(60))
    own.close()

ring = Ring(RingConfig())
in_thread(close)
"""


def test_closing_in_another_thread_with_a_ring_of_its_own(refuse: Refuse) -> None:
    """Before Linux 6.0: a thread's registered rings are its own, under the same indexes."""
    unknown, _ = LADDER["5.19"]
    result = run_python(CLOSE_IN_ANOTHER_THREAD, environment=refuse(flags=int(unknown)))
    assert output_of(result) == ["[(1, 0, 0)]"]


@pytest.mark.parametrize("release", SQPOLL_LADDER)
def test_the_flag_ladder_of_sqpoll(release: str, refuse: Refuse) -> None:
    unknown, flags = SQPOLL_LADDER[release]
    statistics = all_scenarios(refuse(flags=int(unknown)), "sqpoll")
    assert statistics["backend"] == "io_uring"
    assert set(statistics["setup_flags"]) == flags


def test_without_submit_all_a_bad_operation_stops_nothing(
    refuse: Refuse,
) -> None:
    code = """
        from trio_uring import RingConfig
        from trio_uring._engine._ring import Ring
        from trio_uring.lowlevel import Operation, operations

        ring = Ring(RingConfig())
        assert "SUBMIT_ALL" not in str(ring.setup_flags), ring.setup_flags
        bad = Operation(operations.nop().opcode, lambda *_: None, sqe_flags=0x80)
        for number in range(20):
            ring.push(bad if number % 2 else operations.nop(), number)
        ring.flush()
        assert ring.unsubmitted == 0
        completions = sorted(ring.submit_and_wait(1.0))  # older kernels refuse first
        assert [number for number, _, _ in completions] == list(range(20))
        assert [res < 0 for _, res, _ in completions] == [False, True] * 10
        for number in range(20):
            ring.push(bad if number % 2 else operations.nop(), number)
        completions = []
        while len(completions) < 20:
            reaped = ring.submit_and_wait(1.0)
            assert reaped != []
            completions += reaped or ()
        ring.close()
    """
    unknown, _ = LADDER["5.11"]
    assert output_of(run_python(code, environment=refuse(flags=int(unknown)))) == []


@pytest.mark.parametrize("entries", [128, 64, 8])
def test_fewer_entries_where_memory_is_short(entries: int, refuse: Refuse) -> None:
    statistics = all_scenarios(refuse(above=entries))
    assert statistics["entries"] == entries
    assert set(statistics["setup_flags"]) == FLAGGED
    halved = [size for size in (256, 128, 64, 32, 16) if size > entries]
    assert [step.split()[0] for step in statistics.refused_at_setup] == list(map(str, halved))


def test_fewer_entries_on_a_lower_step(refuse: Refuse) -> None:
    unknown, flags = LADDER["5.18"]
    statistics = all_scenarios(refuse(above=64, flags=int(unknown)))
    assert statistics["entries"] == 64
    assert set(statistics["setup_flags"]) == flags


# --- Registrations that fail ----------------------------------------------------------------


def registrations(*opcodes: RegisterOpcode, code: int = errno.EINVAL) -> str:
    return ",".join(f"{int(opcode)}:{code}" for opcode in opcodes)


def test_without_provided_buffers_runs_work(refuse: Refuse) -> None:
    refused = registrations(RegisterOpcode.PBUF_RING)
    statistics = all_scenarios(refuse(register=refused))
    assert statistics["backend"] == "io_uring"
    assert statistics["refused"] == ["PBUF_RING: [Errno 22] Invalid argument"]
    # What would take one waits until the socket is readable, as Trio does.
    assert ["RECV" in run["completed"] for run in statistics.runs] == [False, False]


def test_without_limit_of_workers_and_registered_fd_runs_work(refuse: Refuse) -> None:
    refused = registrations(RegisterOpcode.IOWQ_MAX_WORKERS, RegisterOpcode.RING_FDS)
    alone, guest = all_scenarios(refuse(register=refused)).runs
    later = {"RECV with a limit: EINVAL"}  # before Linux 6.17
    assert {*alone["refused"]} - later == {"IOWQ_MAX_WORKERS: EINVAL", "REGISTER_RING_FDS: EINVAL"}
    assert {*guest["refused"]} - later == {"IOWQ_MAX_WORKERS: EINVAL"}  # a guest registers no fd


def test_without_a_probe_there_is_no_ring(refuse: Refuse) -> None:
    reason = no_ring(refuse(register=registrations(RegisterOpcode.PROBE)))
    assert "IORING_REGISTER_PROBE" in reason


# --- A kernel that is short of something, now and then --------------------------------------


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EBUSY, errno.EINTR])
@pytest.mark.parametrize("every", [2, 3])
def test_enters_that_fail_are_repeated(every: int, code: int, refuse: Refuse) -> None:
    statistics = all_scenarios(refuse(enters=f"{every}:{code}"))
    assert (statistics["backend"], statistics["in_flight"]) == ("io_uring", 0)


# --- No ring --------------------------------------------------------------------------------

NO_RING = """
    import os
    import trio, trio_uring

    async def main():
        return trio.lowlevel.current_statistics().io_statistics

    def must_fail(**config):
        try:
            trio_uring.run(main, ring=trio_uring.RingConfig(**config))
        except trio_uring.RingUnavailableError as exc:
            assert exc.reason == str(exc)
            return exc
        raise AssertionError("it must not run")

    errors = [must_fail(require=True)]
    os.environ["TRIO_URING"] = "require"
    errors.append(must_fail())
    del os.environ["TRIO_URING"]

    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        statistics = [trio_uring.run(main) for _ in range(3)]
    [warning] = caught  # one
    assert warning.category is RuntimeWarning
    [reason] = {s.fallback_reason for s in statistics} | {error.reason for error in errors}
    assert str(warning.message) == f"trio_uring falls back to Trio's epoll: {reason}"
    assert [s.backend for s in statistics] == ["epoll"] * 3
    print(reason)
"""


def no_ring(environment: dict[str, str], prepare: str = "") -> str:
    """Check a child that gets no ring: it falls back, or fails if a ring is required."""
    [reason] = output_of(run_python(dedent(prepare) + dedent(NO_RING), environment=environment))
    return reason


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSYS, ["older than 5.11", "seccomp", "upgrade the kernel"]),
        (errno.EPERM, ["kernel.io_uring_disabled", "seccomp", "must allow"]),
        (errno.EACCES, ["SELinux", "allow it there"]),
        (errno.ENOMEM, ["RLIMIT_MEMLOCK", "ulimit -l"]),
        (errno.EMFILE, ["RLIMIT_NOFILE", "ulimit -n"]),
        (errno.ENFILE, ["fs.file-max"]),
        (errno.EINVAL, ["parameters"]),
        (errno.EFAULT, ["see io_uring_setup(2)"]),
    ],
)
def test_where_there_is_no_ring_the_reason_is_told(
    code: int, says: Sequence[str], refuse: Refuse
) -> None:
    reason = no_ring(refuse(setup=code))
    assert reason.startswith(f"io_uring_setup failed with {errno.errorcode[code]} (")
    assert [text for text in says if text not in reason] == []


@pytest.mark.parametrize(
    "feature", [FeatureFlag.SINGLE_MMAP, FeatureFlag.NODROP, FeatureFlag.EXT_ARG]
)
def test_a_ring_without_a_feature_that_is_needed_is_none(
    feature: FeatureFlag, refuse: Refuse
) -> None:
    """Before Linux 5.11."""
    assert no_ring(refuse(features=int(feature))).startswith("io_uring_setup failed with ENOSYS")


def test_a_ring_that_cannot_be_entered_is_none(refuse: Refuse) -> None:
    reason = no_ring(refuse(enter=errno.EPERM))
    assert reason.startswith("io_uring_enter failed with EPERM")
    assert "seccomp" in reason


def test_all_scenarios_without_a_ring(refuse: Refuse) -> None:
    warnings = ("-X", "dev", "-W", "error", "-W", "ignore:trio_uring falls back:RuntimeWarning")
    result = run_python(SCENARIOS, options=warnings, environment=refuse(setup=errno.ENOSYS))
    assert Statistics.of(result)["backend"] == "epoll"


FORBID = "import seccomp; seccomp.forbid({}, error={})\n"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize(
    ("calls", "first"),
    [
        ("seccomp.SETUP", "io_uring_setup"),
        ("seccomp.ENTER", "io_uring_enter"),
        ("seccomp.REGISTER", "asking the kernel for its opcodes (IORING_REGISTER_PROBE)"),
        ("seccomp.ENTER, seccomp.REGISTER", "asking the kernel for its opcodes"),
    ],
)
def test_a_seccomp_filter_is_named_as_the_reason(calls: str, first: str, code: int) -> None:
    reason = no_ring({}, FORBID.format(calls, code))
    assert reason.startswith(first)
    assert f"failed with {errno.errorcode[code]}" in reason
    assert "seccomp" in reason


# --- Limits ---------------------------------------------------------------------------------

# Memory limits are for those without privileges, and per user: nobody else's count here.
NOBODY = """
    import encodings.idna, os, resource, sys
    import scenarios, trio, trio_uring

    def limit(kib):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (kib * 1024, kib * 1024))
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
"""


@pytest.mark.parametrize("kib", [64, 16])
def test_with_little_memory_the_ring_is_smaller(kib: int) -> None:
    code = """
        async def main():
            await scenarios.echo()
            await scenarios.cancel()
            return trio.lowlevel.current_statistics().io_statistics

        limit(int(sys.argv[1]))
        for _ in range(5):  # no run takes from the next, although the kernel is slow to give back
            statistics = trio_uring.run(main, ring=trio_uring.RingConfig(require=True))
            assert all("ENOMEM" in step or "PBUF_RING" in step for step in statistics.refused)
            print(statistics.entries)
    """
    entries = set(output_of(run_python(dedent(NOBODY) + dedent(code), kib)))
    assert len(entries) == 1
    assert int(entries.pop()) in (8, 16, 32, 64, 128)


def test_without_memory_there_is_no_ring() -> None:
    assert "ENOMEM" in no_ring({}, dedent(NOBODY) + "limit(0)\n")


def test_without_memory_for_buffers_runs_work() -> None:
    # The ring has its memory, and the pool, which comes later, has not.
    code = """
        limit(4096)
        async def main():
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
            await scenarios.echo()
            await scenarios.cancel()
            return trio.lowlevel.current_statistics().io_statistics

        print(trio_uring.run(main).refused)
    """
    [refused] = output_of(run_python(dedent(NOBODY) + dedent(code)))
    assert refused == "('PBUF_RING: [Errno 12] Cannot allocate memory',)"


def test_with_few_fds_a_run_does_as_trio_does_or_says_why_not() -> None:
    """With so few fds it does what Trio does, or reports the reason. It fails in no other way."""
    code = """
        import errno, gc, os, resource, warnings
        import trio, trio_uring

        async def main():
            return trio.lowlevel.current_statistics().io_statistics.backend

        def attempt(run):
            gc.collect()
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "trio_uring falls back", RuntimeWarning)
                    return run(main)
            except OSError as exc:
                assert exc.errno == errno.EMFILE
                return "EMFILE"

        trio_uring.run(main)  # all modules are imported
        first = os.dup(0)
        os.close(first)
        results = []
        for free in range(12):
            resource.setrlimit(resource.RLIMIT_NOFILE, (first + free, 1024))
            results.append((free, attempt(trio.run), attempt(trio_uring.run)))
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
            gc.collect()
            last = os.dup(0)
            assert last == first, f"{last - first} fds were lost"
            os.close(last)
        for line in results:
            print(*line)
    """
    # Trio leaves some sockets to the garbage collector.
    result = run_python(code, options=("-W", "error", "-W", "ignore::ResourceWarning"))
    results = [line.split()[1:] for line in output_of(result)]
    assert results[0] == ["EMFILE", "EMFILE"]
    assert results[-1] == ["epoll", "io_uring"]
    ours = [ring for _, ring in results]
    assert ours == sorted(ours)  # once it works, it goes on working: "EMFILE" < "io_uring"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_dropping_privileges_in_a_run(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    code = """
        limit_only = sys.argv[1]

        async def main():
            await scenarios.echo()
            async with await trio.open_file(sys.argv[1]) as file:
                await file.read()
            limit(64)
            await scenarios.echo()
            await scenarios.cancel()
            await scenarios.datagrams()
            for operation in (
                trio_uring.lowlevel.operations.openat(sys.argv[1], os.O_RDONLY),
                trio_uring.lowlevel.operations.unlinkat(sys.argv[1]),
            ):
                try:
                    await trio_uring.lowlevel.perform(operation)
                except PermissionError:
                    continue
                raise AssertionError("it was allowed")
            return trio.lowlevel.current_statistics().io_statistics

        import trio_uring.lowlevel
        statistics = trio_uring.run(main, ring=trio_uring.RingConfig(require=True))
        print(statistics.backend, statistics.refused)
    """
    [line] = output_of(run_python(dedent(NOBODY) + dedent(code), secret))
    assert line == "io_uring ()"


# --- Systems without io_uring ---------------------------------------------------------------

LINUX_ONLY = """
    import os, select, socket, sys, types
    import trio
    import trio._core._io_epoll  # Trio itself goes on with what it has here
    trio._core._io_epoll.select = types.SimpleNamespace(**vars(select))
    for module, names in (
        (os, "eventfd eventfd_read eventfd_write EFD_CLOEXEC EFD_NONBLOCK splice"),
        (os, "memfd_create O_TMPFILE O_PATH RWF_NOWAIT P_PIDFD"),
        (select, "epoll EPOLLIN EPOLLOUT EPOLLONESHOT EPOLLERR EPOLLHUP EPOLL_CLOEXEC"),
        (socket, "SOCK_CLOEXEC SOCK_NONBLOCK MSG_CMSG_CLOEXEC MSG_NOSIGNAL MSG_MORE MSG_ERRQUEUE"),
        (socket, "MSG_CONFIRM MSG_FASTOPEN AF_NETLINK AF_PACKET AF_VSOCK"),
    ):
        for name in names.split():
            vars(module).pop(name, None)
    sys.modules["trio_uring._kernel._ring"] = None
"""

WINDOWS_HAS_NOT = """
    pair, family = socket.socketpair, socket.AF_UNIX
    socket.socketpair = lambda: pair(family)
    for module, names in (
        (os, "uname register_at_fork fork waitid geteuid O_CLOEXEC O_NONBLOCK preadv pwritev"),
        (select, "poll POLLIN POLLOUT"),
        (socket, "AF_UNIX MSG_DONTWAIT SCM_RIGHTS CMSG_SPACE CMSG_LEN"),
    ):
        for name in names.split():
            vars(module).pop(name, None)
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None
    sys.modules["trio._unix_pipes"] = None
"""

ELSEWHERE = """
    sys.platform = sys.argv[1]
    import warnings
    import trio_uring, trio_uring.lowlevel, trio_uring.pytest_plugin

    async def main():
        assert not trio_uring.lowlevel.on_ring()
        try:
            await trio_uring.lowlevel.perform(None)
        except RuntimeError as exc:
            assert "not on io_uring" in str(exc)
        a, b = [socket.socket() for _ in range(2)]
        a.close(), b.close()
        return 7

    for start in (trio_uring.run, lambda main, **kw: trio_uring.install(**kw)):
        try:
            start(main, ring=trio_uring.RingConfig(require=True))
        except trio_uring.RingUnavailableError as exc:
            print(exc)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert trio_uring.run(main) == 7
        trio_uring.install()
        assert trio.run(main) == 7
        trio_uring.uninstall()
    for warning in caught:
        print(warning.message)
"""


@pytest.mark.parametrize(
    ("platform", "missing"),
    [("darwin", LINUX_ONLY), ("win32", LINUX_ONLY + WINDOWS_HAS_NOT)],
    ids=["darwin", "win32"],
)
def test_on_another_operating_system_there_is_no_ring(platform: str, missing: str) -> None:
    code = dedent(missing) + dedent(ELSEWHERE)
    lines = output_of(run_python(code, platform))
    reason = f"io_uring is a Linux interface, and this is {platform}"
    assert lines == [reason, reason, f"trio_uring falls back to Trio's epoll: {reason}"]


def test_the_kernel_is_asked_for_its_opcodes_once() -> None:
    first, second = probe(RingConfig()), probe(RingConfig())
    assert first.supported
    assert second.supported is first.supported


# --- Denied in the middle of a run ----------------------------------------------------------

WORK = (
    *("sockets", "sockets guest", "first_receive", "files", "batch", "multishot", "cancelled"),
    *("goes_on", "goes_on guest", "channel", "channel guest", "channel_later"),
)
GOES_ON = ("batch", *WORK[-5:])


def denied(call: str, work: str) -> list[str]:
    """Return how the run ends, how the next one ends, and the fds that are left."""
    code = "import denied; denied.main()"
    lines = output_of(run_python(code, getattr(seccomp, call), *work.split()))
    assert lines[:2] == ["io_uring", "io_uring"]  # the two runs before
    return lines[2:]


@pytest.mark.parametrize("work", WORK[:-5])
@pytest.mark.parametrize("call", ["SETUP", "REGISTER"])
def test_a_call_that_a_run_can_do_without_is_denied(call: str, work: str) -> None:
    """The run goes on, and leaves nothing behind."""
    next_run = "epoll" if call == "SETUP" else "io_uring"
    assert denied(call, work) == ["io_uring", next_run, "{}"]


@pytest.mark.parametrize("work", ["waiting", *WORK])
def test_entering_the_ring_is_denied(work: str) -> None:
    """What was in flight fails with the cause. The run goes on without the ring."""
    *ends, next_run, left = denied("ENTER", work)
    if work in GOES_ON:
        assert ends == ["io_uring"]
    else:
        for end in ends:
            assert "the run lost its ring: io_uring_enter failed with EPERM" in end
            assert "seccomp" in end
    assert (next_run, left) == ("epoll", "{}")
