"""Check the models beside this file with spin: each holds, and each of its mutants does not.

    python tests/model/check.py

A mutant is the model without one of the lines that make it right (``#ifdef MUTANT_...``). A
model in which spin finds nothing wrong may be too weak to show anything, so for every mutant
spin must find a deadlock, which here is a missed wakeup, or it is this check that fails.

Needs spin and gcc: ``apt-get install spin gcc``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.resolve()

# Of SQEs: as many as it takes for one to be pushed while another is just being taken.
SQES = 3


# How spin's verifier is compiled, and run: to find deadlocks, and to find something published
# that is never taken, though every process that can go on does so (weak fairness).
DEADLOCK = (("-DSAFETY", "-DNOCLAIM"), ())
NEVER_TAKEN = ((), ("-a", "-f"))

Search = tuple[tuple[str, ...], tuple[str, ...]]


def verify(model: Path, mutant: str | None, search: Search) -> tuple[bool, int]:
    """Search all states; return whether no error was found, and how many states were looked at."""
    options = [f"-DSQES={SQES}", *([f"-D{mutant}"] if mutant else [])]
    compiling, running = search
    with tempfile.TemporaryDirectory() as directory:
        _call(directory, "spin", *options, "-a", str(model))
        _call(directory, "gcc", "-O1", "-w", *compiling, "-o", "pan", "pan.c")
        output = _call(directory, "./pan", "-w18", *running)
    # Reaching the limit on depth would leave states unseen.
    if "max search depth too small" in output:
        raise SystemExit(output)
    [errors] = re.findall(r"errors: (\d+)", output)
    [states] = re.findall(r"(\d+) states, stored", output)
    return errors == "0", int(states)


def _call(directory: str, *command: str) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Check every model, print what was found, and fail if any of it is not as it should be."""
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing: apt-get install spin gcc")
    wrong = 0
    models = sorted(HERE.glob("*.pml"))
    for model in models:
        checks: list[tuple[str, str | None, Search, bool]] = [
            ("no wakeup is missed", None, DEADLOCK, True),
            ("all is taken in the end", None, NEVER_TAKEN, True),
        ]
        mutants = sorted(set(re.findall(r"\bMUTANT_\w+", model.read_text())))
        checks += [(mutant, mutant, DEADLOCK, False) for mutant in mutants]
        for title, mutant, search, expected in checks:
            holds, states = verify(model, mutant, search)
            verdict = "holds" if holds else "rejected"
            right = holds == expected
            wrong += not right
            print(f"{model.name}: {title}: {verdict}, {states} states{'' if right else '  WRONG'}")
        wrong += not mutants
    if wrong or not models:
        sys.exit(f"{wrong} checks failed")


if __name__ == "__main__":
    main()
