"""``python -m trio_uring``: programs run as without it, but on io_uring. And the doctor.

Each test starts new Python processes, with the installed package.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from importlib.metadata import metadata
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from children import CHILD_SECONDS

import trio_uring
from trio_uring import RingConfig, RingUnavailableError
from trio_uring._run import probe

if TYPE_CHECKING:
    from collections.abc import Iterator

LAUNCHER = (sys.executable, "-m", "trio_uring")
SCRIPT = (Path(sys.executable).with_name("trio-uring"),)

# What a program can see of how it was started.
LOOK_AROUND = """
import sys, json
main = sys.modules["__main__"]
spec = main.__spec__
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "names": [__name__, __file__, __package__, main.__doc__],
    "spec": spec and [spec.name, spec.origin],
    "loader": type(__loader__).__name__,
    "builtins": type(__builtins__).__name__,
    "same": vars(main) is globals(),
    "code": sys._getframe().f_code.co_filename,
    "future": compile("1", "", "exec").co_flags,
    "launcher": sorted({"main", "install", "_launch"} & set(globals())),
}))
"""

# The same for ``-c``, where there is no file.
LOOK_AROUND_CODE = LOOK_AROUND.replace("__file__, ", "'__file__' in globals(), ").replace(
    "type(__loader__)", "__loader__"
)

# What kind of I/O a run has.
BACKEND = """
import trio

async def main():
    print(trio.lowlevel.current_statistics().io_statistics.backend, flush=True)

if __name__ == "__main__":
    trio.run(main)
"""


@pytest.fixture(scope="module")
def ring() -> None:
    """Skip if there is no ring. In CI, fail instead."""
    try:
        probe(RingConfig())
    except RingUnavailableError as exc:
        if os.environ.get("CI"):
            pytest.fail(exc.reason, pytrace=False)
        pytest.skip(exc.reason)


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without our settings, and with *variables*."""
    inherited = {name: value for name, value in os.environ.items() if name[:10] != "TRIO_URING"}
    return {**inherited, **variables}


def run(
    *command: str | Path, cwd: Path, status: int | None = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run *command* until it ends, with the exit *status* expected of it."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    if status is not None:
        assert result.returncode == status, result.stderr + result.stdout
    return result


def launch(
    *arguments: str | Path, cwd: Path, status: int | None = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    return run(*LAUNCHER, *arguments, cwd=cwd, status=status, **variables)


def write(path: Path, code: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(code), encoding="utf-8")
    return path


# --- Programs see what they see without it --------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Make the same program in each form that Python accepts, and return their directory."""
    write(tmp_path / "sub" / "program.py", f'"""Its docstring."""\n{LOOK_AROUND}')
    (tmp_path / "link.py").symlink_to("sub/program.py")
    write(tmp_path / "package" / "__init__.py", "")
    write(tmp_path / "package" / "sibling.py", "value = 1")
    relative = "from .sibling import value\nfrom . import sibling"
    write(tmp_path / "package" / "__main__.py", f"{relative}\n{LOOK_AROUND}")
    write(tmp_path / "package" / "tool.py", f"{relative}\n{LOOK_AROUND}")
    write(tmp_path / "directory" / "__main__.py", f"import beside\n{LOOK_AROUND}")
    write(tmp_path / "directory" / "beside.py", "")
    with zipfile.ZipFile(tmp_path / "program.zip", "w") as archive:
        archive.write(tmp_path / "directory" / "__main__.py", "__main__.py")
        archive.writestr("beside.py", "")
    return tmp_path


PROGRAMS = [
    ["sub/program.py"],
    ["sub/program.py", "-m", "--help", "doctor", "a b", ""],
    ["sub/../sub/program.py", "1"],
    ["link.py", "1"],
    ["directory", "1"],
    ["program.zip", "1"],
]
MODULES = [
    ["-m", "package"],
    ["-m", "package", "-m", "--help", "a b", ""],
    ["-m", "package.tool", "1"],
]


@pytest.mark.parametrize(
    ("options", "arguments"),
    [([], arguments) for arguments in [*PROGRAMS, *MODULES]]
    # An isolated Python does not look for modules in the current directory.
    + [(["-I"], arguments) for arguments in PROGRAMS],
    ids=lambda words: " ".join(words),
)
def test_what_the_program_sees(programs: Path, arguments: list[str], options: list[str]) -> None:
    plain = run(sys.executable, *options, *arguments, cwd=programs)
    launched = run(sys.executable, *options, "-m", "trio_uring", *arguments, cwd=programs)
    assert json.loads(launched.stdout) == json.loads(plain.stdout)
    assert launched.stderr == plain.stderr == ""


@pytest.mark.parametrize(
    "code",
    [
        "",
        "raise SystemExit",
        "raise SystemExit(3)",
        "raise SystemExit('a last word')",
        "import os; os._exit(4)",
        "raise ValueError('wrong')",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit; atexit.register(print, 'at exit')",
        "a syntax error",
        # Threads and atexit functions live longer than the last line of the program.
        """
        import atexit, pickle, threading
        def f(): pass
        def check():
            assert pickle.loads(pickle.dumps(f)) is f
            print("found")
        atexit.register(check)
        def late():
            threading.main_thread().join()
            check()
        threading.Thread(target=late).start()
        """,
    ],
)
def test_how_a_program_ends(tmp_path: Path, code: str) -> None:
    write(tmp_path / "program.py", code)
    for arguments in (["program.py"], ["-m", "program"]):
        plain = run(sys.executable, *arguments, cwd=tmp_path, status=None)
        launched = launch(*arguments, cwd=tmp_path, status=None)
        assert launched.returncode == plain.returncode
        assert launched.stdout == plain.stdout
        # Tracebacks begin in the launcher.
        assert launched.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    "arguments",
    [["missing.py"], ["missing/program.py"], ["-m", "missing"], ["-m", "package"], ["empty"]],
    ids=" ".join,
)
def test_programs_that_cannot_be_run(tmp_path: Path, arguments: list[str]) -> None:
    write(tmp_path / "package" / "__init__.py", "")
    (tmp_path / "empty").mkdir()
    plain = run(sys.executable, *arguments, cwd=tmp_path, status=None)
    launched = launch(*arguments, cwd=tmp_path, status=None)
    assert launched.returncode == plain.returncode != 0
    assert launched.stderr == plain.stderr


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        ([], "name a program, -m package, -c code, or a command"),
        ([""], "name a program, "),
        (["-m"], "argument -m: what to run must follow"),
        (["-c"], "argument -c: what to run must follow"),
        (["--unknown"], "unknown option --unknown: options of a program or a command follow its"),
        (["-W", "error", "program.py"], "unknown option -W: "),
        (["--json", "doctor"], "unknown option --json: "),
        (["-"], "unknown option -: "),
        (["", "1"], "argument COMMAND: "),
        (["doctor", "--unknown"], "unrecognized arguments: --unknown"),
        (["doctor", "1"], "unrecognized arguments: 1"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], mistake: str) -> None:
    result = launch(*arguments, cwd=tmp_path, status=2)
    assert result.stderr.startswith("usage: python -m trio_uring program.py")
    assert f"python -m trio_uring: error: {mistake}" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_shown(tmp_path: Path, option: str) -> None:
    result = launch(option, cwd=tmp_path)
    assert result.stdout.startswith("usage: python -m trio_uring program.py")
    assert result.stderr == ""


def test_code_is_run(tmp_path: Path) -> None:
    for options in (["a", "-c", "--help"], []):
        plain = run(sys.executable, "-c", LOOK_AROUND_CODE, *options, cwd=tmp_path)
        launched = launch("-c", LOOK_AROUND_CODE, *options, cwd=tmp_path)
        assert json.loads(launched.stdout) == json.loads(plain.stdout)
        assert launched.stderr == ""


def test_links_of_the_description_work_outside_of_the_repository() -> None:
    description = metadata("trio-uring").get_payload()
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


@pytest.mark.parametrize("command", [LAUNCHER, SCRIPT], ids=["module", "script"])
def test_the_version_is_shown(tmp_path: Path, command: tuple[str | Path, ...]) -> None:
    result = run(*command, "--version", cwd=tmp_path)
    assert result.stdout == f"trio-uring {trio_uring.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["sub/program.py", "1"], ["-m", "package.tool", "1"], ["directory"], ["-c", LOOK_AROUND_CODE]],
    ids=lambda words: words[0],
)
def test_the_script_does_what_the_module_does(programs: Path, arguments: list[str]) -> None:
    plain = run(sys.executable, *arguments, cwd=programs)
    launched = run(*SCRIPT, *arguments, cwd=programs)
    assert json.loads(launched.stdout) == json.loads(plain.stdout)
    assert launched.stderr == ""


# --- Programs run on the ring ---------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["program.py"], ["-m", "program"]], ids=" ".join)
@pytest.mark.parametrize(
    ("setting", "backend"),
    [
        (None, "io_uring"),
        ("", "io_uring"),
        ("1", "io_uring"),
        ("require", "io_uring"),
        ("off", "epoll"),
        ("0", "epoll"),
        (" Off ", "epoll"),
    ],
)
@pytest.mark.usefixtures("ring")
def test_the_backend_can_be_chosen(
    tmp_path: Path, arguments: list[str], setting: str | None, backend: str
) -> None:
    write(tmp_path / "program.py", BACKEND)
    variables = {} if setting is None else {"TRIO_URING": setting}
    result = launch(*arguments, cwd=tmp_path, **variables)
    assert (result.stdout, result.stderr) == (f"{backend}\n", "")


def test_an_unknown_word_in_the_environment_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "program.py", BACKEND)
    result = launch("program.py", cwd=tmp_path, status=1, TRIO_URING="false")
    assert "TRIO_URING is 'false': it takes 1, on, require, 0 or off" in result.stderr
    assert result.stdout == ""


# Without io_uring, as in a container whose seccomp profile blocks it: calls number 425 to 427
# (io_uring_setup, _enter, _register: the same everywhere) fail with EPERM.
WITHOUT_IO_URING = """
import ctypes, errno, os, struct, sys

NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2
instructions = b"".join(struct.pack("=HBBI", *instruction) for instruction in [
    (0x20, 0, 0, 0),  # load the number of the system call
    (0x35, 0, 2, 425),  # if less, skip two
    (0x25, 1, 0, 427),  # if greater, skip one
    (0x06, 0, 0, 0x00050000 | errno.EPERM),
    (0x06, 0, 0, 0x7FFF0000),  # allow
])
buffer = ctypes.create_string_buffer(instructions)
program = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(SET_SECCOMP, FILTER, ctypes.c_char_p(program), 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def without_io_uring(
    *arguments: str, cwd: Path, status: int | None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Start the launcher on a kernel that refuses io_uring."""
    seccomp = write(cwd / "seccomp.py", WITHOUT_IO_URING)
    return run(
        *LAUNCHER[:1], seccomp, *LAUNCHER[1:], *arguments, cwd=cwd, status=status, **variables
    )


def test_fallback_warns_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "program.py", BACKEND + "    trio.run(main)\n")
    result = without_io_uring("program.py", cwd=tmp_path, status=0)
    assert result.stdout == "epoll\nepoll\n"
    assert result.stderr.count("trio_uring falls back to Trio's epoll: io_uring_setup failed") == 1


def test_require_makes_a_missing_ring_an_error(tmp_path: Path) -> None:
    write(tmp_path / "program.py", BACKEND)
    result = without_io_uring("program.py", cwd=tmp_path, status=1, TRIO_URING="require")
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("trio_uring: io_uring_setup failed")
    assert "seccomp" in line
    assert "TRIO_URING" in line


# A Trio release that nobody has tried yet.
UNKNOWN_TRIO = """
import os, runpy, sys
import trio
trio.__version__ = "9.9"
os.environ["TRIO_URING"] = sys.argv.pop(1)
runpy.run_module("trio_uring", run_name="__main__", alter_sys=True)
"""


@pytest.mark.usefixtures("ring")
def test_an_unknown_trio_is_told(tmp_path: Path) -> None:
    write(tmp_path / "program.py", BACKEND)
    unknown = write(tmp_path / "unknown.py", UNKNOWN_TRIO)
    result = run(sys.executable, unknown, "1", "program.py", cwd=tmp_path)
    assert result.stdout == "epoll\n"
    assert "Trio 9.9 is installed" in result.stderr
    result = run(sys.executable, unknown, "require", "program.py", cwd=tmp_path, status=1)
    assert result.stdout == ""
    assert result.stderr.startswith("trio_uring: Trio 9.9 is installed")


@pytest.mark.usefixtures("ring")
def test_programs_that_a_program_starts(tmp_path: Path) -> None:
    write(tmp_path / "child.py", BACKEND)
    code = "import subprocess, sys\nsubprocess.run([sys.executable, 'child.py'], check=True)"
    write(tmp_path / "program.py", code)
    assert launch("program.py", cwd=tmp_path).stdout == "io_uring\n"
    assert launch("program.py", cwd=tmp_path, TRIO_URING="off").stdout == "epoll\n"
    assert run(sys.executable, "program.py", cwd=tmp_path).stdout == "epoll\n"


@pytest.mark.parametrize("arguments", [["program.py"], ["-m", "program"]], ids=" ".join)
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.usefixtures("ring")
def test_multiprocessing(tmp_path: Path, arguments: list[str], method: str) -> None:
    code = f"""
        import multiprocessing, trio
        import concurrent.futures

        async def ask():
            return trio.lowlevel.current_statistics().io_statistics.backend

        def work(number):
            return number, trio.run(ask)

        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            with concurrent.futures.ProcessPoolExecutor(2, context) as executor:
                print(*executor.map(work, range(2)))
    """
    write(tmp_path / "program.py", code)
    result = launch(*arguments, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("(0, 'io_uring') (1, 'io_uring')\n", "")


# --- Hypercorn, which spawns its workers ----------------------------------------------------

APP = """
import json, os, trio

async def app(scope, receive, send):
    statistics = trio.lowlevel.current_statistics().io_statistics
    report = {"pid": os.getpid(), "backend": statistics.backend}
    if scope["type"] == "lifespan":
        await receive()
        # In one piece, newline and all: the workers share the pipe.
        print(f"worker {json.dumps(report)}\\n", end="", flush=True)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    else:
        report["completed"] = dict(getattr(statistics, "completed", {}))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(report).encode()})
"""


@contextmanager
def hypercorn(directory: Path, workers: int, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Serve `APP` on a free port of loopback. Its output comes through one pipe."""
    write(directory / "app.py", APP)
    with subprocess.Popen(
        [
            *(*LAUNCHER, "-m", "hypercorn", "--worker-class", "trio", "--bind", "127.0.0.1:0"),
            *("--workers", str(workers), "app:app"),
        ],
        cwd=directory,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # nothing if it has ended


def served(process: subprocess.Popen[str], workers: int) -> tuple[int, list[dict[str, Any]]]:
    """Read Hypercorn's output until all workers serve. Return the port and the workers."""
    assert process.stdout is not None
    reports, ports, lines = [], [], []
    while len(reports) < workers or len(ports) < workers:
        line = process.stdout.readline()
        lines.append(line)
        assert line, "".join(lines)  # else it has ended
        if match := re.search(r"worker (\{.*\})", line):
            reports.append(json.loads(match[1]))
        if match := re.search(r"Running on http://127\.0\.0\.1:(\d+)", line):
            ports.append(int(match[1]))
    assert len(set(ports)) == 1
    return ports[0], reports


def ask(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CHILD_SECONDS)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        return json.loads(response.read())
    finally:
        connection.close()


def assert_ended(pidfd: int) -> None:
    """Wait until a process that is not our child has ended."""
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    assert ended.poll(CHILD_SECONDS * 1000)
    os.close(pidfd)


# Not SIGINT without workers: where it interrupts the task of a connection, Hypercorn serves on. It
# does so on plain Trio, too.
@pytest.mark.parametrize(
    ("workers", "stop"),
    [
        pytest.param(workers, stop, id=f"{workers}-{stop.name}")
        for workers in (0, 1, 2)
        for stop in (signal.SIGTERM, signal.SIGINT)
        if workers or stop != signal.SIGINT
    ],
)
@pytest.mark.usefixtures("ring")
def test_hypercorn(tmp_path: Path, workers: int, stop: signal.Signals) -> None:
    with hypercorn(tmp_path, workers) as process:
        port, reports = served(process, max(workers, 1))
        pids = {report["pid"] for report in reports}
        assert len(pids) == max(workers, 1)
        assert (process.pid in pids) == (workers == 0)
        assert {report["backend"] for report in reports} == {"io_uring"}

        answers = [ask(port) for _ in range(8)]
        assert {answer["pid"] for answer in answers} <= pids
        for answer in answers:
            assert answer["backend"] == "io_uring"
            # The completions that brought this very request.
            assert answer["completed"]["RECV"] > 0

        workers_running = [os.pidfd_open(pid) for pid in pids - {process.pid}]
        process.send_signal(stop)
        output, _ = process.communicate(timeout=CHILD_SECONDS)
        if workers:
            assert process.returncode == 0, output
            assert "Traceback" not in output
        elif stop == signal.SIGTERM:
            # Without workers Hypercorn does nothing about SIGTERM, on epoll either.
            assert process.returncode == -stop, output
        else:
            # Nor can it catch a KeyboardInterrupt that meets the code of a request.
            assert process.returncode == 0 or "KeyboardInterrupt" in output
        for pidfd in workers_running:
            assert_ended(pidfd)


@pytest.mark.parametrize("workers", [0, 1])
def test_hypercorn_switched_off(tmp_path: Path, workers: int) -> None:
    with hypercorn(tmp_path, workers, TRIO_URING="off") as process:
        port, _ = served(process, 1)
        assert ask(port)["backend"] == "epoll"
        process.terminate()
        process.communicate(timeout=CHILD_SECONDS)


# --- The doctor -----------------------------------------------------------------------------


def check_schema(report: dict[str, Any]) -> None:
    """Check the shape of the doctor's JSON, on which monitoring may rely."""
    assert list(report) == [
        *("ok", "verdict", "versions", "limits", "settings", "in_use", "missing", "advice")
    ]
    assert isinstance(report["ok"], bool)
    assert isinstance(report["verdict"], str)
    assert list(report["versions"]) == ["kernel", "python", "trio_uring", "trio", "anyio"]
    assert list(report["limits"]) == ["RLIMIT_MEMLOCK", "RLIMIT_NOFILE", "io_uring_disabled"]
    assert list(report["settings"]) == [
        *("TRIO_URING", "TRIO_URING_DISABLE", "TRIO_URING_ENGINE", "TRIO_URING_INSPECT"),
        "TRIO_URING_ANY_TRIO",
    ]
    for part in "versions", "settings":
        assert all(type(value) is str for value in report[part].values())
    for name, value in report["limits"].items():
        assert type(value) is int or (value == "unlimited" and name != "io_uring_disabled")
    for part in "missing", "advice":
        assert all(type(item) is str for item in report[part])


@pytest.mark.parametrize("setting", ["", "1", "require"])
@pytest.mark.usefixtures("ring")
def test_doctor_as_json(tmp_path: Path, setting: str) -> None:
    result = launch("doctor", "--json", cwd=tmp_path, TRIO_URING=setting)
    report = json.loads(result.stdout)
    check_schema(report)
    assert report["ok"]
    assert report["versions"]["trio_uring"] != "not installed"
    kinds = {name: type(value) for name, value in report["in_use"].items()}
    numbers = ("submission entries", "completion entries", "opcodes", "known opcodes")
    numbers += ("bounded workers", "unbounded workers")
    assert {kinds.pop(name) for name in numbers} == {int}
    assert {kinds.pop(name) for name in ("set-up flags", "features")} == {list}
    assert kinds == {"receive buffers": str, "engine": str}
    assert list(report["settings"].values()) == [setting, *["not set"] * 4]
    assert "a ring" not in report["missing"]


@pytest.mark.usefixtures("ring")
def test_doctor_as_text(tmp_path: Path) -> None:
    result = launch("doctor", cwd=tmp_path)
    assert result.stdout.startswith("io_uring: works here\n")
    for title in "versions:", "limits:", "settings:", "in use:", "missing:", "what to do:":
        assert f"\n{title}\n" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_doctor_into_a_pipe_that_nobody_reads(tmp_path: Path, options: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*map(str, LAUNCHER), "doctor", *options],
        cwd=tmp_path,
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    os.close(writer)
    assert result.stderr == ""


# As an unprivileged user with little memory to lock. (The one that runs tests may have all rights.)
LITTLE_MEMORY = """
import ctypes, os, resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (16384, 16384))
CAP_IPC_LOCK, PR_CAPBSET_DROP = 14, 24
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.usefixtures("ring")
def test_doctor_with_little_memory_to_lock(tmp_path: Path) -> None:
    program = write(tmp_path / "little.py", LITTLE_MEMORY)
    result = run(sys.executable, program, *LAUNCHER[1:], "doctor", "--json", cwd=tmp_path)
    report = json.loads(result.stdout)
    assert report["limits"]["RLIMIT_MEMLOCK"] == 16384
    assert report["in_use"]["submission entries"] < 256
    [advice] = report["advice"]
    assert advice.startswith("RLIMIT_MEMLOCK is too low")
    assert "kernel" not in advice


@pytest.mark.usefixtures("ring")
def test_doctor_without_the_pth_file(tmp_path: Path) -> None:
    """As in an editable installation."""
    for entry in Path(trio_uring.__file__).parent.parent.iterdir():
        if entry.name != "trio_uring.pth":
            (tmp_path / entry.name).symlink_to(entry)
    isolated = (LAUNCHER[0], "-S", *LAUNCHER[1:])
    result = run(*isolated, "doctor", "--json", cwd=Path("/"), PYTHONPATH=str(tmp_path))
    report = json.loads(result.stdout)
    assert report["ok"]
    [advice] = report["advice"]
    assert "has no trio_uring.pth" in advice
    assert "`python -m trio_uring`" in advice


@pytest.mark.usefixtures("ring")
def test_doctor_of_an_installed_package_in_a_checkout(tmp_path: Path) -> None:
    """There ``python -m`` finds the sources first."""
    (tmp_path / "trio_uring").symlink_to(Path(trio_uring.__file__).parent)
    for directory in tmp_path, Path("/"):
        result = launch("doctor", "--json", cwd=directory)
        assert json.loads(result.stdout)["advice"] == []


def test_doctor_where_io_uring_is_forbidden(tmp_path: Path) -> None:
    result = without_io_uring("doctor", "--json", cwd=tmp_path, status=1)
    report = json.loads(result.stdout)
    check_schema(report)
    assert not report["ok"]
    assert report["in_use"] == {}
    assert report["missing"] == ["a ring"]
    [advice] = report["advice"]
    assert advice.startswith("io_uring_setup failed with EPERM")
    assert "kernel.io_uring_disabled" in advice
    assert "seccomp" in advice
    text = without_io_uring("doctor", cwd=tmp_path, status=1).stdout
    assert text.startswith("io_uring: not available, runs fall back to Trio's epoll\n")
    assert f"- {advice}\n" in text


@pytest.mark.parametrize("setting", ["off", "0", " Off "])
@pytest.mark.usefixtures("ring")
def test_doctor_where_it_is_switched_off(tmp_path: Path, setting: str) -> None:
    result = launch("doctor", "--json", cwd=tmp_path, status=1, TRIO_URING=setting)
    report = json.loads(result.stdout)
    check_schema(report)
    assert not report["ok"]
    assert "a ring" not in report["missing"]
    assert report["settings"]["TRIO_URING"] == setting
    assert report["advice"][-1] == "TRIO_URING switches io_uring off: unset it"
    text = launch("doctor", cwd=tmp_path, status=1, TRIO_URING=setting).stdout
    assert text.startswith("io_uring: works here, but is switched off\n")


@pytest.mark.usefixtures("ring")
def test_doctor_where_layers_are_switched_off(tmp_path: Path) -> None:
    result = launch("doctor", "--json", cwd=tmp_path, TRIO_URING_DISABLE="files")
    report = json.loads(result.stdout)
    assert report["ok"]
    assert report["settings"]["TRIO_URING_DISABLE"] == "files"
    result = launch("doctor", "--json", cwd=tmp_path, status=1, TRIO_URING_DISABLE="disks")
    report = json.loads(result.stdout)
    assert report["verdict"] == "works here, but a setting is wrong"
    assert "TRIO_URING_DISABLE names disks" in report["advice"][-1]


@pytest.mark.usefixtures("ring")
def test_doctor_with_an_unknown_trio(tmp_path: Path) -> None:
    unknown = write(tmp_path / "unknown.py", UNKNOWN_TRIO)
    result = run(sys.executable, unknown, "1", "doctor", "--json", cwd=tmp_path, status=1)
    report = json.loads(result.stdout)
    assert not report["ok"]
    assert report["verdict"] == "works here, but not with this Trio"
    [advice] = report["advice"]
    assert advice.startswith("Trio 9.9 is installed")
