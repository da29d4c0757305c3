"""Records which lines of the package are reached, in this Python and in those that it starts.

The started ones find a copy of this file as their module `sitecustomize`. The coverage package
takes longer by far: it cannot begin again for each test, and every line costs something once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from types import CodeType

# The environment variable with the name of the file for the lines that other processes reach. It
# begins otherwise than what Trio and the package read, which tests remove.
VARIABLE: Final = "REACHED_LINES"

# What this process has reached, as "file:line".
spots: Final[set[str]] = set()


def start(package: Path, owner: int = 0) -> None:
    """Record the lines below *package*, in the process *owner* in `spots`."""
    root = f"{package}/"
    monitoring: Any = sys.monitoring

    def reached(code: CodeType, line: int) -> object:
        if code.co_filename.startswith(root):
            spot = f"{code.co_filename[len(root) :]}:{line}"
            if os.getpid() == owner:
                spots.add(spot)
            else:
                with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
                    file.write(f"{spot}\n")
        return monitoring.DISABLE  # until `begin_again`

    monitoring.use_tool_id(monitoring.COVERAGE_ID, "reached")
    monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, reached)
    monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)


def begin_again() -> None:
    """Forget what was reached."""
    spots.clear()
    monitoring: Any = sys.monitoring
    monitoring.restart_events()


if __name__ == "sitecustomize" and VARIABLE in os.environ:
    start(Path(__file__).parent / "trio_uring")
