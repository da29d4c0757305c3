"""Check the models beside this file with spin: each holds, and each of its mutants does not.

    python tests/model/check.py

A mutant is the model without one of the lines that make it right (``#ifdef MUTANT_...``). A
model in which spin finds nothing wrong may be too weak to show anything, so in every mutant
spin must find a deadlock or a false assertion, or it is this check that fails.

A comment that begins with the name of a C file quotes it. If the file does not have that code, in
that order, the model is not that of the code, and the check fails, too.

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
C_FILES = HERE.parents[1] / "trio_uring" / "_kernel"

# Of SQEs: as many as it takes for one to be pushed while another is just being taken.
SQES = 3


# How spin's verifier is compiled, and run: to find deadlocks and false assertions; and to find that
# a model's claim is false, though every process that can go on does so (weak fairness).
BAD_STATE = (("-DSAFETY", "-DNOCLAIM"), ())
FALSE_CLAIM = ((), ("-a", "-f"))

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


def quotes(model: str) -> list[tuple[str, str]]:
    """List what *model* quotes from C: the file, and its code."""
    return re.findall(r"/\* (\w+\.c): (.*?) \*/", model, re.DOTALL)


def wrong_quotes(model: Path) -> list[str]:
    """List the quotes of *model* that are not in the C file."""
    wrong: list[str] = []
    for name, code in quotes(model.read_text()):
        text = " ".join((C_FILES / name).read_text().split())
        if " ".join(code.split()) not in text:
            wrong.append(f"{model.name}: {name} does not have: {code}")
    return wrong


def checks_of(model: str) -> list[tuple[str, str | None, Search, bool]]:
    """List the checks of a model: the title, the mutant, the search, and whether it must hold."""
    checks: list[tuple[str, str | None, Search, bool]] = [("no bad state", None, BAD_STATE, True)]
    if "\nltl " in model:
        checks.append(("what it claims", None, FALSE_CLAIM, True))
    mutants = sorted(set(re.findall(r"\bMUTANT_\w+", model)))
    return checks + [(mutant, mutant, BAD_STATE, False) for mutant in mutants]


def main() -> None:
    """Check every model, print what was found, and fail if any of it is not as it should be."""
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing: apt-get install spin gcc")
    models = sorted(HERE.glob("*.pml"))
    if wrong := [quote for model in models for quote in wrong_quotes(model)]:
        raise SystemExit("\n".join(wrong))
    failed = 0
    for model in models:
        text = model.read_text()
        checks = checks_of(text)
        for title, mutant, search, expected in checks:
            holds, states = verify(model, mutant, search)
            right = holds == expected
            failed += not right
            verdict = "holds" if holds else "rejected"
            print(f"{model.name}: {title}: {verdict}, {states} states{'' if right else '  WRONG'}")
        if not quotes(text) or all(mutant is None for _, mutant, *_ in checks):
            raise SystemExit(f"{model.name} quotes no C, or has no mutants")
    if failed or not models:
        sys.exit(f"{failed} checks failed")


if __name__ == "__main__":
    main()
