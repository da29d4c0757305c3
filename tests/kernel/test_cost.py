"""What small programs cost, counted and not timed: no cost may grow.

`COSTS` is a ratchet. Where a change makes something cheaper, record the smaller number: the failure
of a test, or ``python tests/programs/costs.py``, run with each engine and Python, says which. Where
a number must grow, say why in the commit that raises it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Final, NamedTuple

import pytest
from children import output_of, run_python
from costs import PROGRAMS

from trio_uring._kernel import why_no_native


class Cost(NamedTuple):
    """What one operation costs, as `costs.py` counts it.

    The calls are for each of PYTHONS: what is a function call in one is none in another.
    """

    calls: tuple[int, ...]
    enters: float
    blocks: int


PYTHONS: Final = ((3, 10), (3, 11), (3, 12), (3, 13))

# With Trio 0.35; the calls of Trio's own functions are among them.
COSTS: Final = {
    "native": {
        # The two tasks take turns, and alone in a turn each sends with send(2).
        "stream_echo": Cost((42, 43, 41, 41), 4.0, 0),
        "socket_echo": Cost((40, 41, 39, 39), 4.0, 0),
        "datagram_echo": Cost((134, 135, 133, 133), 2.0, 0),
        "anyio_echo": Cost((42, 43, 41, 41), 4.0, 0),
        "accept": Cost((261, 266, 256, 256), 1.0, 0),
        "cached_read": Cost((2, 2, 2, 2), 0.0, 0),
        "small_file": Cost((21, 21, 21, 21), 0.0, 0),
        "path_read": Cost((3, 3, 3, 3), 0.0, 0),
        "path_stat": Cost((3, 3, 3, 3), 0.0, 0),
        "empty_turn": Cost((20, 21, 19, 19), 0.0, 0),
    },
    "python": {
        "stream_echo": Cost((134, 135, 133, 133), 4.0, 0),
        "socket_echo": Cost((112, 113, 111, 111), 4.0, 0),
        "datagram_echo": Cost((164, 165, 163, 163), 2.0, 0),
        "anyio_echo": Cost((128, 129, 127, 127), 4.0, 0),
        "accept": Cost((284, 289, 279, 279), 1.0, 0),
        "cached_read": Cost((37, 37, 37, 37), 0.0, 0),
        "small_file": Cost((100, 100, 100, 100), 0.0, 0),
        "path_read": Cost((31, 31, 31, 31), 0.0, 0),
        "path_stat": Cost((28, 28, 28, 28), 0.0, 0),
        "empty_turn": Cost((27, 28, 26, 26), 0.0, 0),
    },
}

WHERE: Final = {
    "calls": "Python functions entered: look at what a profiler lists",
    "enters": "system calls: look at what is submitted and waited for apart, and at strace",
    "blocks": "memory kept: look for reference cycles and lists that grow",
}

# From 6.12 on the buffers for streams are consumed in parts; before, giving them back costs calls.
LINUX_MIN: Final = (6, 12)


def linux() -> tuple[int, ...]:
    major, minor, *_ = os.uname().release.split("-")[0].split(".")
    return int(major), int(minor)


@pytest.mark.parametrize("engine", COSTS)
def test_no_cost_has_grown(engine: str) -> None:
    if engine == "native" and why_no_native:
        pytest.skip(why_no_native)
    if sys.version_info[:2] not in PYTHONS:
        pytest.skip("nothing is recorded for this Python: see PYTHONS")
    if linux() < LINUX_MIN:
        pytest.skip("counted on Linux 6.12 and later")
    python = PYTHONS.index(sys.version_info[:2])
    result = run_python(
        "from costs import print_costs; print_costs()",
        options=("-W", "error"),
        environment={"TRIO_URING_ENGINE": engine},
    )
    [line] = output_of(result)
    counted: Any = json.loads(line)
    assert counted["engine"] == engine
    grown: list[str] = []
    smaller: list[str] = []
    for program, cost in COSTS[engine].items():
        recorded = cost._replace(calls=cost.calls[python])._asdict()
        for what, limit in recorded.items():
            found = counted["costs"][program][what]
            row = f"{engine} {program}: {found} {what}, {limit} recorded"
            if found > limit:
                grown.append(f"{row} ({WHERE[what]})")
            elif found < limit:
                smaller.append(row)
    if smaller:
        # Not a failure: one engine may have become cheaper on the way to a fix of the other.
        print("Cheaper than recorded; write the smaller numbers into COSTS:", *smaller, sep="\n")
    assert not grown, "\n".join(
        [
            "These have grown; make them cheap again, or say in the commit why they must grow:",
            *grown,
            f"`TRIO_URING_ENGINE={engine} python tests/programs/costs.py` counts again.",
        ]
    )


def test_every_program_is_recorded() -> None:
    names = [program.__name__ for program in PROGRAMS]
    assert all(list(costs) == names for costs in COSTS.values())
