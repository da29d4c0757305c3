"""What is checked, and how.

`nox` checks everything that a change usually breaks, on every Python found, in about 35 minutes.
`nox -s quick` takes 3, `nox -s full` runs the whole matrix, and `nox -l` lists the sessions.

Sessions install the wheel, not the checkout, and run elsewhere: the checkout's `trio_uring`
has no compiled module.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import nox

ROOT = Path(__file__).parent.resolve()
CONFORMANCE = ROOT / "tests" / "conformance"
sys.path.insert(0, str(CONFORMANCE))  # for the list of other projects' suites

from other_suites import SUITES  # noqa: E402 (found through the line above)

if TYPE_CHECKING:
    from collections.abc import Iterator

nox.needs_version = ">=2024.10.9"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
GROUPS = {
    group: nox.project.dependency_groups(PYPROJECT, group)
    for group in ("test", "lint", "types", "docs", "bench", "integrations", "news", "wheels")
}

# The newest that the code was read against. With a later one, every run falls back.
_READ = ROOT / "trio_uring" / "_trio_private.py"
[NEWEST] = re.findall(
    r"^NEWEST_TRIO: Final = \(0, (\d+)\)$", _READ.read_text("utf-8"), re.MULTILINE
)
NEWEST_TRIO = f"trio==0.{NEWEST}.*"
OLDEST_TRIO = "trio==0.32.0"
NEXT_TRIO = "trio>=0.32"
NEWEST_ANYIO = PYPROJECT["project"]["optional-dependencies"]["anyio"][0]
OLDEST_ANYIO = "anyio==4.10.0"

# Every Python that we look for; and the one that is used where one is enough, because Trio's
# suite has its full requirements for it.
SUPPORTED_PYTHONS = [f"3.{minor}" for minor in range(10, 15)]
MAIN_PYTHON = "3.11"

# One Python hides what another does differently, so in CI one alone is an error.
IN_CI = bool(os.environ.get("CI"))
PYTHONS_MIN = 2 if IN_CI else 1

# What Trio's suite needs; and what its tests of exports and documentation need besides, all of
# which has releases for the main Python.
TRIO_SUITE = ["pytest", "trustme", "pyopenssl"]
TRIO_SUITE_OPTIONAL = [
    *("astor", "async_generator", "black", "coverage", "jedi", "mypy", "pylint"),
    *("pyright", "pyyaml", "ruff"),
]

# What AnyIO's suite needs. Without the optional blockbuster, which replaces functions of `os`: a
# function that was replaced is called in a thread, and hardly a path would be on the ring.
ANYIO_SUITE = [
    *("coverage", "exceptiongroup", "hypothesis", "psutil", "pytest", "pytest-mock"),
    *("pytest-timeout", "sniffio", "trustme", "truststore", "uvloop"),
]

# Other event loops on io_uring, and other packages for files. What does not install is left out. Of
# pyaio, the releases with io_uring are candidates.
BENCH_PEERS = ["aiofiles", "blazio", "caio", "pyaio>=0.5.0rc1", "uringio", "zloop"]

# A shell's background job starts with SIGINT ignored, and every child inherits that: tests of
# Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _find_pythons() -> list[str]:
    """Find CPython 3.10 and later: on PATH, in pyenv, and the one that runs nox."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    bins = [*sorted(pyenv.glob("versions/3.*/bin")), Path(sys.base_prefix, "bin")]
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, bins)])
    return [version for version in SUPPORTED_PYTHONS if _runs(version)]


def _runs(version: str) -> bool:
    # pyenv's shims stand on the path even for a Python that they will not run: a directory
    # behind them may have it, so look at each.
    for directory in os.environ["PATH"].split(os.pathsep):
        python = shutil.which(f"python{version}", path=directory)
        if python is None:
            continue
        ran = subprocess.run([python, "-c", "import venv"], capture_output=True, check=False)
        if ran.returncode == 0:
            return True
    return False


PYTHONS = _find_pythons()
ONE_PYTHON = MAIN_PYTHON if MAIN_PYTHON in PYTHONS or not PYTHONS else PYTHONS[0]

# Our own tests on the oldest, the main and the newest Python; the others add little but time.
FEW_PYTHONS = [version for version in PYTHONS if version in {PYTHONS[0], ONE_PYTHON, PYTHONS[-1]}]
# There they run on the Python engine, too, which every Python can use and few will.
ENGINE_PYTHONS = PYTHONS[-1:]
ENGINE_TESTS = ["tests/kernel", "tests/conformance", "tests/fuzz"]
# What tests our own programs for measuring: it takes two minutes, and is run on the newest alone.
NEWEST_TESTS = ["tests/test_bench_command.py", "tests/test_benchmarks.py", "tests/test_soak.py"]
SDIST_TEST = "tests/unit/test_operations.py"  # which is run from the sdist alone
NATIVE = {"TRIO_URING_ENGINE": "native"}
ON_PYTHON_ENGINE = {"TRIO_URING_ENGINE": "python"}

nox.options.sessions = [
    *("plan", "lint", "types", "docs", "model"),
    *(f"tests({version}-newest-trio)" for version in FEW_PYTHONS),
    *("trio_suite", "anyio_suite"),
]

# What `kernels` runs where processors are simulated, and so are slower by a factor of ten.
KERNEL_TESTS = [
    *("tests/kernel/test_ring.py", "tests/kernel/test_in_flight.py"),
    *("tests/kernel/test_crowds.py", "tests/kernel/test_closing.py"),
    *("tests/kernel/test_datagrams.py", "tests/kernel/test_listeners.py"),
    *("tests/kernel/test_file_operations.py", "tests/kernel/test_write_file.py"),
]

# On two cores with nothing else to do, with the time that it takes to make the environments.
MINUTES_FOR_ALL_PYTHONS = 6
MINUTES_FOR_OWN_TESTS = 5  # on each of FEW_PYTHONS, and again on each of ENGINE_PYTHONS
MINUTES_FOR_TRIO_SUITE = 2  # on each of PYTHONS

# What `nox -s quick` leaves out, which is more than half of the time of our own tests: what
# starts other programs, what waits for the kernel's threads to fall asleep, and the fuzzing.
SLOW_TESTS = [
    *("tests/test_examples.py", "tests/test_launcher.py", "tests/test_plugin.py"),
    *("tests/test_bench_command.py", "tests/test_soak.py"),
    *("tests/kernel/test_ring_setup.py", "tests/kernel/test_sqpoll.py"),
    "tests/fuzz",
]


# --- The sessions of `nox` ------------------------------------------------------------------


@nox.session(venv_backend="none")
def plan(session: nox.Session) -> None:
    """Say how long `nox` takes, and which Pythons were found."""
    need_pythons(session)
    minutes = (
        MINUTES_FOR_ALL_PYTHONS
        + MINUTES_FOR_OWN_TESTS * (len(FEW_PYTHONS) + len(ENGINE_PYTHONS))
        + MINUTES_FOR_TRIO_SUITE * len(PYTHONS)
    )
    session.log(
        f"`nox` takes about {minutes:.0f} minutes on two idle cores, `nox -s quick` about 3."
    )
    session.log(f"It runs on CPython {', '.join(PYTHONS)}.")
    session.log(
        f"The project's own tests run on the native engine on {', '.join(FEW_PYTHONS)}, and on the "
        f"Python engine on {', '.join(ENGINE_PYTHONS)}; Trio's and AnyIO's suites run on both."
    )
    if missing := [version for version in SUPPORTED_PYTHONS if version not in PYTHONS]:
        session.log(
            f"Not found, so not tested: CPython {', '.join(missing)}. To test with more of them, "
            "put them on PATH, or install them with pyenv."
        )


@nox.session(python=ONE_PYTHON)
def lint(session: nox.Session) -> None:
    """Check style, formatting, spelling, and who imports whom."""
    session.install(*GROUPS["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    # It reads the checkout: imports are looked at, not run.
    session.run("lint-imports", "--no-cache")


@nox.session(python=ONE_PYTHON)
def types(session: nox.Session) -> None:
    """Check types with mypy and pyright, and that every public name has one."""
    install_wheel(session, NEWEST_TRIO, *GROUPS["types"], extras="[anyio]")
    session.run("mypy")
    session.run("python", str(ROOT / "tests" / "typing" / "check_documentation.py"))
    session.run("pyright", "--pythonpath", session_python(session))
    with elsewhere(session):
        session.run("pyright", "--verifytypes", "trio_uring", "--ignoreexternal")


@nox.session(python=ONE_PYTHON)
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    install_wheel(session, NEWEST_TRIO, *GROUPS["docs"], *GROUPS["news"], extras="[anyio]")
    with elsewhere(session):
        html = ROOT / "docs" / "_build" / "html"
        session.run(
            *("python", "-m", "sphinx", "--nitpicky", "--fail-on-warning", "--keep-going"),
            *("--fresh-env", "--doctree-dir", "doctrees", str(ROOT / "docs"), str(html)),
        )


@nox.session(python=ONE_PYTHON)
def changelog(session: nox.Session) -> None:
    """Print what the newsfragments say. With a version as argument, write it to CHANGELOG.md."""
    session.install(*GROUPS["news"])
    if session.posargs:
        session.run("towncrier", "build", "--yes", "--version", *session.posargs)
    else:
        session.run("towncrier", "build", "--draft", "--version", "Unreleased", "--date", "")


@nox.session(venv_backend="none")
def model(session: nox.Session) -> None:
    """Check the models of the memory orders with spin: ``apt-get install spin gcc``. 20 seconds."""
    if shutil.which("spin") is None and not IN_CI:
        session.skip("spin is not installed: `apt-get install spin gcc` (CI always has it)")
    session.run(sys.executable, str(ROOT / "tests" / "model" / "check.py"))


@nox.session
@nox.parametrize(
    "python,trio",
    [(python, NEWEST_TRIO) for python in PYTHONS] + [(ONE_PYTHON, OLDEST_TRIO)],
    ids=[f"{python}-newest-trio" for python in PYTHONS] + [f"{ONE_PYTHON}-oldest-trio"],
)
def tests(session: nox.Session, trio: str) -> None:
    """Run the project's own tests; on some Pythons, on both engines."""
    need_pythons(session)
    install_wheel(session, trio, *GROUPS["test"], extras="[anyio]")
    if session.posargs:  # on the engine that the environment asks for
        run_pytest(session, *session.posargs)
    elif session.python in ENGINE_PYTHONS:
        run_pytest(session, "tests", env=NATIVE)
        run_pytest(session, *ENGINE_TESTS, env=ON_PYTHON_ENGINE)
    else:
        left_out = [f"--ignore={ROOT / path}" for path in NEWEST_TESTS]
        run_pytest(session, "tests", *left_out, env=NATIVE)


@nox.session(python=ONE_PYTHON)
def coverage(session: nox.Session) -> None:
    """Measure the branch coverage of the project's own tests: twice as slow as they are."""
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"], extras="[anyio]")
    rcfile = f"--rcfile={ROOT / 'pyproject.toml'}"
    with elsewhere(session):
        session.run(
            *("python", "-m", "coverage", "run", rcfile, "-m"),
            *("pytest", *pytest_options(), str(ROOT / "tests")),
        )
        session.run("python", "-m", "coverage", "combine", rcfile, "--quiet")
        session.run("python", "-m", "coverage", "report", rcfile)


@nox.session(python=PYTHONS)
def trio_suite(session: nox.Session) -> None:
    """Run Trio's test suite on the ring, on both engines."""
    need_pythons(session)
    compare_trio_suite(session, NEWEST_TRIO, "ring", engines=(NATIVE, ON_PYTHON_ENGINE))


@nox.session(python=ONE_PYTHON)
def anyio_suite(session: nox.Session) -> None:
    """Run AnyIO's test suite, its newest release's, on the ring."""
    # By its name too: AnyIO's tests take the names of the backends from AnyIO.
    compare_anyio_suite(
        session, NEWEST_ANYIO, ["unused", "answers", "by-name"], on_python_engine=["answers"]
    )


# --- A part of it ---------------------------------------------------------------------------


@nox.session(venv_backend="none")
def quick(session: nox.Session) -> None:
    """Run `lint`, and on one Python the project's own tests except the slow ones: 3 minutes."""
    if gone := [path for path in SLOW_TESTS if not (ROOT / path).exists()]:
        session.error(f"SLOW_TESTS lists what does not exist: {', '.join(gone)}")
    session.log(f"Left out: {', '.join(SLOW_TESTS)}, and every session but lint and tests.")
    session.notify("lint")
    session.notify(
        f"tests({ONE_PYTHON}-newest-trio)",
        ["tests", *(f"--ignore={ROOT / path}" for path in SLOW_TESTS)],
    )


# --- The rest of the matrix -----------------------------------------------------------------


@nox.session(python=PYTHONS)
def trio_suite_unused(session: nox.Session) -> None:
    """Run Trio's test suite with trio_uring installed but not used."""
    compare_trio_suite(session, NEWEST_TRIO, "unused")


@nox.session(python=PYTHONS)
def trio_suite_oldest(session: nox.Session) -> None:
    """Run the oldest supported Trio's test suite on the ring."""
    compare_trio_suite(session, OLDEST_TRIO, "ring")


@nox.session(python=ONE_PYTHON)
def anyio_suite_oldest(session: nox.Session) -> None:
    """Run the oldest supported AnyIO's test suite on the ring."""
    # Its tests name the backends themselves, and warn under pytest 9.
    compare_anyio_suite(session, OLDEST_ANYIO, ["answers"], "pytest<9")


@nox.session(python=ONE_PYTHON)
@nox.parametrize("project", sorted(SUITES), ids=sorted(SUITES))
def suites(session: nox.Session, project: str) -> None:
    """Run other projects' test suites on plain Trio and on the ring."""
    suite = SUITES[project]
    with downloaded_sdist(session, suite.sdist) as source:
        # Installed from its source, so that its tests and its code are of one version.
        install_wheel(session, NEWEST_TRIO, suite.pytest, *suite.requirements, str(source))
        session.run("python", str(CONFORMANCE / "other_suites.py"), project, str(source))


@nox.session(python=ONE_PYTHON)
def examples(session: nox.Session) -> None:
    """Run the examples, and the programs of the README and the documentation."""
    requirements = (*GROUPS["test"], *GROUPS["integrations"])
    install_wheel(session, NEWEST_TRIO, *requirements, extras="[anyio]")
    run_pytest(session, str(ROOT / "tests" / "test_examples.py"))


@nox.session(python=ONE_PYTHON)
def fuzz(session: nox.Session) -> None:
    """Run `tests/fuzz` with many more examples than `tests`: `FUZZ_EXAMPLES`, or 20000."""
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"])
    run_pytest(
        session,
        *(session.posargs or ["tests/fuzz"]),
        env={
            "TRIO_URING_FUZZ_EXAMPLES": os.environ.get("FUZZ_EXAMPLES", "20000"),
            # A test of so many examples takes minutes.
            "PYTEST_TIMEOUT": "3600",
        },
    )


@nox.session(python=ONE_PYTHON)
def simulation(session: nox.Session) -> None:
    """Make a million steps on the simulated kernel, on each engine. Half an hour.

    `TRIO_URING_SIMULATION_STEPS` is another number, `TRIO_URING_SIMULATION_SEED` where to begin.
    """
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"])
    run_pytest(
        session,
        *("-s", "tests/fuzz/test_simulated_kernel.py"),  # it prints the seed
        env={
            "TRIO_URING_SIMULATION_STEPS": os.environ.get("TRIO_URING_SIMULATION_STEPS", "1000000"),
            # Others each time, unless one is asked for.
            "TRIO_URING_SIMULATION_SEED": os.environ.get(
                "TRIO_URING_SIMULATION_SEED", str(secrets.randbelow(2**32))
            ),
            "PYTEST_TIMEOUT": "7200",
        },
    )


# On the newest, since it reads TOML.
@nox.session(python=PYTHONS[-1] if PYTHONS else MAIN_PYTHON)
def mutation(session: nox.Session) -> None:
    """Break the code on purpose: the tests must notice. Hours; what to break is an argument.

    `nox -s mutation -- promises` breaks what the README promises, in half an hour,
    `nox -s mutation -- c batch` tries the breaks of C with "batch" in their names,
    `nox -s mutation -- python --each 5 _engine/_ring.py` five mutants of a Python file, and
    `nox -s mutation -- python --all` all of every file, in two hours. If that is interrupted, the
    same again goes on with those that have survived or were not tried.
    """
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"], extras="[anyio]")
    session.install("cffi", "setuptools")
    # The tests run on a copy of the checkout, and must find nothing else.
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "trio-uring")
    for arguments in [session.posargs] if session.posargs else [["promises"], ["c"], ["python"]]:
        session.run("python", str(ROOT / "tests" / "mutation" / "mutate.py"), *arguments)


@nox.session(python=ONE_PYTHON)
def ledgers(session: nox.Session) -> None:
    """Cancel 100,000 operations at random on each engine: nothing may be lost. Two minutes."""
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"])
    run_pytest(
        session,
        *("-s", "tests/kernel/test_ledgers.py"),  # it prints the seed
        env={
            "TRIO_URING_LEDGER_CANCELS": "100000",
            # Another each time, unless one is asked for.
            "TRIO_URING_LEDGER_SEED": os.environ.get(
                "TRIO_URING_LEDGER_SEED", str(secrets.randbelow(2**32))
            ),
        },
    )


@nox.session(python=ONE_PYTHON)
def interrupts(session: nox.Session) -> None:
    """Interrupt programs at 500 random moments, on each engine. Each ends within a second."""
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"])
    for engine in (NATIVE, ON_PYTHON_ENGINE):
        run_pytest(
            session,
            *("tests/kernel/test_signals.py", "-k", "at_any_moment"),
            env={"TRIO_URING_INTERRUPTS": "500", **engine},
        )


@nox.session(python=ONE_PYTHON)
def soak(session: nox.Session) -> None:
    """Do everything for minutes, on every kind of ring: `nox -s soak -- 30`. 10 without a number.

    It prints a table, and leaves a plot in `.nox/soak.svg`. Two cores are busy all the time.
    """
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"], "matplotlib", extras="[anyio]")
    program = str(ROOT / "tests" / "soak" / "soak.py")
    plot = str(ROOT / ".nox" / "soak.svg")
    with elsewhere(session):
        session.run("python", program, "--plot", plot, *session.posargs)


@nox.session(python=ONE_PYTHON)
def kernels(session: nox.Session) -> None:
    """Run tests on Debian's own kernel, in QEMU: `apt-get install qemu-system-x86 busybox-static`.

    Arguments are other linux-image packages, and tests. All of `tests/kernel` takes hours.
    """
    if missing := [name for name in ("qemu-system-x86_64", "busybox") if not shutil.which(name)]:
        session.error(f"{' and '.join(missing)} must be installed")
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"], extras="[anyio]")
    python = session_python(session)
    guest = str(ROOT / "tests" / "guests" / "guest.py")
    packages = [name for name in session.posargs if name.endswith(".deb")]
    tests = [name for name in session.posargs if name not in packages] or KERNEL_TESTS
    with elsewhere(session):
        for package in packages or [downloaded_kernel(session)]:
            session.run(
                *("python", guest, package, "--", python, "-m", "pytest", *pytest_options()),
                *("--basetemp=/dev/shm/pytest", "--color=no", "-o", "timeout=3600"),
                *(str(ROOT / test) for test in tests),
            )


# On the newest, since some peers need it.
@nox.session(python=PYTHONS[-1] if PYTHONS else MAIN_PYTHON)
def bench(session: nox.Session) -> None:
    """Measure, and print; nothing passes or fails. `nox -s bench -- bench_sockets --short`."""
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"], *GROUPS["bench"], extras="[anyio]")
    for peer in BENCH_PEERS:
        # Without one that has no wheel for this Python, the others are measured.
        session.install(peer, success_codes=[0, 1])
    benchmarks = {path.stem: path for path in (ROOT / "tests" / "benchmarks").glob("bench_*.py")}
    names = [name for name in session.posargs if name in benchmarks]
    options = [option for option in session.posargs if option not in benchmarks]
    with elsewhere(session):
        for name in names or sorted(benchmarks):
            session.run("python", str(benchmarks[name]), *options)


@nox.session(python=ONE_PYTHON)
def asan(session: nox.Session) -> None:
    """Run the tests of behaviour with all C built for AddressSanitizer and UBSan."""
    libraries = [
        session.run("gcc", f"-print-file-name={name}", external=True, silent=True, log=False)
        for name in ("libasan.so", "libubsan.so")
    ]
    install_wheel(session, NEWEST_TRIO, *GROUPS["test"], extras="[anyio]")
    with unpacked_sdist(session) as source:
        session.install(
            *("--force-reinstall", "--no-deps", "--no-cache-dir", str(source)),
            env={
                # greenlet copies the stack, and must find nothing there that may not be read.
                "CFLAGS": "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined "
                "--param=asan-stack=0",
                "LDFLAGS": "-fsanitize=address,undefined",
            },
        )
    run_pytest(
        session,
        "--capture=sys",  # what a sanitizer says as it ends the process is lost otherwise
        *(session.posargs or ["tests/kernel", "tests/conformance", "tests/fuzz"]),
        env={
            "LD_PRELOAD": " ".join(str(library).strip() for library in libraries),
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            # Python keeps memory until it exits, which is no leak of ours. And tests ask for more
            # memory than there is, which must be Python's MemoryError.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
            # Python's own allocator hides from the sanitizer where one object ends.
            "PYTHONMALLOC": "malloc",
        },
    )


@nox.session(python=PYTHONS)
def build(session: nox.Session) -> None:
    """Build the sdist and this Python's wheel, and run an echo on each in an empty environment.

    The wheels stay in `.nox/dist`. And once without a C compiler.
    """
    wheel, sdist = built(session)
    for package in (wheel, sdist):
        session.install("--force-reinstall", "--no-cache-dir", f"{package}")
        check_installed(session)
        for engine in ("native", "python"):
            check_echo(session, engine, {"TRIO_URING_ENGINE": engine})
        with elsewhere(session):
            session.run("python", "-m", "trio_uring", "--help", silent=True)
        session.run("python", "-m", "pip", "check")
        session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "trio-uring")
    with unpacked_sdist(session) as source:  # which has the tests, too
        session.install("--no-cache-dir", f"{source}", *GROUPS["test"])
        options = (
            f"--rootdir={source}",
            "-c",
            f"{source}/pyproject.toml",
            "-p",
            "no:cacheprovider",
        )
        with elsewhere(session):
            session.run("python", "-m", "pytest", *options, f"{source}/{SDIST_TEST}")
        session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "trio-uring")
    session.install("--no-cache-dir", f"{sdist}", env={"CC": "false"})  # no compiler
    check_echo(session, "epoll")
    with elsewhere(session):
        # There is no ring, and it says why.
        session.run("python", "-m", "trio_uring", "doctor", success_codes=[1], silent=True)


@nox.session(python=PYTHONS)
def wheels(session: nox.Session) -> None:
    """Make the wheel to publish for this Python and machine, and run an echo on it.

    auditwheel checks that it needs no newer C library than its name says. It stays in
    `.nox/wheels`. The release workflow makes those for all machines, in the same way.
    """
    wheel, _ = built(session)
    session.install(*GROUPS["wheels"])
    directory = ROOT / ".nox" / "wheels" / str(session.python)
    shutil.rmtree(directory, ignore_errors=True)
    session.run("auditwheel", "repair", "--wheel-dir", str(directory), str(wheel))
    [repaired] = directory.glob("*-manylinux*.whl")
    session.install("--force-reinstall", "--no-cache-dir", str(repaired))
    for engine in ("native", "python"):
        check_echo(session, engine, {"TRIO_URING_ENGINE": engine})


@nox.session(python=ONE_PYTHON)
def next_trio(session: nox.Session) -> None:
    """Run the project's own tests with the newest Trio there is, which nobody may have read yet."""
    install_wheel(session, NEXT_TRIO, *GROUPS["test"], extras="[anyio]")
    run_pytest(session, *ENGINE_TESTS, env={**NATIVE, "TRIO_URING_ANY_TRIO": "1"})


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Run everything."""
    for name in (
        *("lint", "types", "model", "tests"),
        *("trio_suite", "trio_suite_unused", "trio_suite_oldest"),
        *("anyio_suite", "anyio_suite_oldest", "suites", "examples", "docs"),
        *("asan", "coverage", "fuzz", "simulation", "ledgers", "interrupts", "soak"),
        *("build", "wheels", "changelog", "bench"),
    ):
        session.notify(name)


# --- How a session gets what it tests -------------------------------------------------------

_built: dict[str, tuple[Path, Path]] = {}


def built(session: nox.Session) -> tuple[Path, Path]:
    """Return the wheel for the session's Python and the sdist, built once for each nox run."""
    python = str(session.python)
    if python not in _built:
        directory = ROOT / ".nox" / "dist" / python
        shutil.rmtree(directory, ignore_errors=True)
        session.install("build")
        # The wheel is built from the sdist, so that a file the sdist lacks is found here.
        session.run("python", "-m", "build", "--outdir", str(directory), str(ROOT), silent=True)
        [wheel] = directory.glob("*.whl")
        [sdist] = directory.glob("*.tar.gz")
        check_wheel(session, wheel)
        # Made for the stable ABI, or without C: good for every Python.
        every_python = "-abi3-" in wheel.name or "-none-" in wheel.name
        if every_python and (modules := modules_for_one_python(wheel)):
            session.error(f"{wheel.name} is for one Python only, with {', '.join(modules)}")
        pythons = PYTHONS if every_python else [python]
        _built.update(dict.fromkeys(pythons, (wheel, sdist)))
    return _built[python]


def check_wheel(session: nox.Session, wheel: Path) -> None:
    """Fail where the C core or the native engine was not built: nothing else would say so."""
    with zipfile.ZipFile(wheel) as archive:
        files = {Path(name).name.partition(".")[0] for name in archive.namelist()}
    if missing := {"_ring", "_native"} - files:
        session.error(f"{wheel.name} has no {' and no '.join(sorted(missing))}: is there a gcc?")


def modules_for_one_python(wheel: Path) -> list[str]:
    """List the compiled modules of *wheel* that other Pythons would not import, and not miss."""
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".cpython-" in Path(name).name]


@contextmanager
def downloaded_sdist(session: nox.Session, requirement: str) -> Iterator[Path]:
    """Unpack another project's sdist: what is installed often has no tests."""
    with tempfile.TemporaryDirectory() as directory:
        session.run(
            *("python", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"),
            *("--dest", directory, requirement),
        )
        [archive] = Path(directory).glob("*.tar.gz")
        with tarfile.open(archive) as sdist:
            sdist.extractall(directory)
        [source] = (path for path in Path(directory).iterdir() if path.is_dir())
        yield source


@contextmanager
def unpacked_sdist(session: nox.Session) -> Iterator[Path]:
    """Unpack the sdist, to build it in another way."""
    _, archive = built(session)
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(archive) as sdist:
            sdist.extractall(directory)
        [source] = Path(directory).iterdir()
        yield source


def install_wheel(session: nox.Session, trio: str, *requirements: str, extras: str = "") -> None:
    """Install *requirements* and our wheel, with *trio* and nothing else deciding its version."""
    wheel, _ = built(session)
    session.install(trio, *requirements, f"trio-uring{extras} @ {wheel.as_uri()}")
    # The version number is the same as that of the wheel a reused environment has.
    session.install("--force-reinstall", "--no-deps", str(wheel))
    check_installed(session)


def check_installed(session: nox.Session) -> None:
    """Fail if `import trio_uring` would find the checkout."""
    with elsewhere(session):
        session.run(
            *("python", "-c"),
            "import sys, trio_uring; assert trio_uring.__file__.startswith(sys.prefix)",
            silent=True,
        )


def check_echo(session: nox.Session, runs_on: str, env: dict[str, str] | None = None) -> None:
    """Fail if an echo on the installed package does not run on what *runs_on* says."""
    program = ROOT / "tests" / "programs" / "installed.py"
    with elsewhere(session):
        session.run("python", str(program), runs_on, env=env)


def downloaded_kernel(session: nox.Session) -> str:
    """Download the package with the kernel of this release of Debian, and return its name."""
    depends = session.run(
        *("apt-cache", "depends", "linux-image-amd64"), external=True, silent=True, log=False
    )
    package = next(word for word in str(depends).split()[1:] if word.startswith("linux-image-"))
    session.run("apt-get", "download", package, external=True, silent=True)
    [path] = Path.cwd().glob(f"{package}_*.deb")
    return str(path)


@contextmanager
def elsewhere(session: nox.Session) -> Iterator[None]:
    """Leave the checkout: Python puts the current directory in front of what is installed.

    Not into the session's own directory, whose path is too long for the UNIX sockets of tests.
    """
    with tempfile.TemporaryDirectory() as directory, session.chdir(directory):
        yield


def pytest_options() -> list[str]:
    """Return what makes pytest use the checkout's settings from another directory."""
    return [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]


def run_pytest(session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run pytest on the installed package."""
    paths = [str(ROOT / path) if (ROOT / path).exists() else path for path in arguments]
    with elsewhere(session):
        session.run("python", "-m", "pytest", *pytest_options(), *paths, env=env)


def compare_trio_suite(
    session: nox.Session, trio: str, way: str, engines: tuple[dict[str, str], ...] = (NATIVE,)
) -> None:
    """Run Trio's suite without trio_uring, then with it in one *way*, on each of the *engines*."""
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "trio-uring")
    # Of the oldest Trio's tests of its exports, some fail with today's mypy and jedi.
    complete = session.python == MAIN_PYTHON and trio == NEWEST_TRIO
    optional = TRIO_SUITE_OPTIONAL if complete else []
    session.install(trio, *TRIO_SUITE, *optional)
    script = str(CONFORMANCE / "trio_suite.py")
    with tempfile.TemporaryDirectory() as directory:
        plain = f"{directory}/plain.json"
        session.run("python", script, "plain", plain, *session.posargs)
        install_wheel(session, trio)
        for engine in engines:
            session.run("python", script, way, plain, *session.posargs, env=engine)


def compare_anyio_suite(
    session: nox.Session,
    anyio: str,
    ways: list[str],
    *requirements: str,
    on_python_engine: list[str] | None = None,
) -> None:
    """Run AnyIO's suite without trio_uring, then with it in each of the *ways*."""
    script = str(CONFORMANCE / "anyio_suite.py")
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "trio-uring")
    with downloaded_sdist(session, anyio) as source:
        session.install(NEWEST_TRIO, str(source), *ANYIO_SUITE, *requirements)
        plain = str(source.parent / "plain.json")
        session.run("python", script, "plain", str(source), plain, *session.posargs)
        install_wheel(session, NEWEST_TRIO, str(source), *ANYIO_SUITE, *requirements)
        runs = [(way, NATIVE) for way in ways]
        runs += [(way, ON_PYTHON_ENGINE) for way in on_python_engine or ()]
        for way, engine in runs:
            session.run("python", script, way, str(source), plain, *session.posargs, env=engine)


def session_python(session: nox.Session) -> str:
    """Return the path of the session's interpreter."""
    return str(Path(session.bin, "python"))


def need_pythons(session: nox.Session) -> None:
    """Fail where too few Pythons were found."""
    if len(PYTHONS) < PYTHONS_MIN:
        session.error(
            f"{PYTHONS_MIN} of CPython {', '.join(SUPPORTED_PYTHONS)} are needed, found: "
            f"{', '.join(PYTHONS) or 'none'}. Put others on PATH, or install them with pyenv"
        )
