"""Both engines, on a simulated kernel that does all a kernel may do, in any order.

`tests/programs/simulation.py` says what is checked. ``nox -s simulation`` makes a million steps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter

import pytest
from children import TESTS, output_of, run_python

from trio_uring._kernel import why_no_native

STEPS = int(os.environ.get("TRIO_URING_SIMULATION_STEPS", "8000"))
STEPS_OF_CHILD = 40_000  # about a minute
SEED = int(os.environ.get("TRIO_URING_SIMULATION_SEED", "1"))

# What must have happened in so many steps, or the simulation shows less than it says.
HAPPENS = {
    *("EINTR", "EAGAIN", "EBUSY", "ENOBUFS", "overflow", "short", "failed", "inline"),
    *("cancel: ENOENT", "cancel: EALREADY", "cancel: done", "work left over"),
    *("handed to a worker", "blocked a worker"),
    *("receive_some: completed", "receive_some: cancelled", "receive_many: completed"),
    *("send_all: completed", "send_all: cancelled", "accept_many: completed", "file: completed"),
}


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build what gives the calls of io_uring to the simulated kernel."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler is needed")
    library = tmp_path_factory.mktemp("simulated") / "simulated_kernel.so"
    source = TESTS / "simulated_kernel.c"
    command = [compiler, "-shared", "-fPIC", "-O", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return ":".join([*filter(None, [os.environ.get("LD_PRELOAD")]), str(library)])


@pytest.mark.parametrize("engine", ["native", "python"])
def test_nothing_is_lost(preload: str, engine: str) -> None:
    if engine == "native" and why_no_native:
        pytest.skip(why_no_native)
    counts: Counter[str] = Counter()
    seed = SEED
    while counts["steps"] < STEPS:
        result = run_python(
            "import simulation; simulation.main()",
            *(seed, min(STEPS - counts["steps"], STEPS_OF_CHILD)),
            environment={
                "LD_PRELOAD": preload,
                "TRIO_URING_ENGINE": engine,
                "PYTHONHASHSEED": "0",  # so that a seed replays
            },
        )
        counts.update(json.loads("\n".join(output_of(result))))
        seed = SEED + counts["runs"]
    print(counts["steps"], "steps on the", engine, "engine, from seed", SEED)
    assert counts.keys() >= HAPPENS, HAPPENS - counts.keys()


TIMEOUTS = """
import random
from simulated_kernel import SimulatedKernel
from trio_uring import RingConfig
from trio_uring._engine._ring import Ring

kernel = SimulatedKernel(random.Random(0), name="timeouts", faults=0)
kernel.install()
ring = Ring(RingConfig())
for seconds in (0.25, 1.75, 3000.5):
    assert ring.submit_and_wait(seconds) == []
    print(kernel.timeout)
ring.close()
kernel.remove()
"""


def test_the_kernel_gets_the_whole_timeout(preload: str) -> None:
    """Who waits for real cannot tell a timeout that is too short from one that is not."""
    result = run_python(TIMEOUTS, environment={"LD_PRELOAD": preload})
    assert output_of(result) == ["0.25", "1.75", "3000.5"]


FAILED_RECEIVE = """
import errno
import random
import trio
import trio_uring
from simulated_kernel import SimulatedKernel
from trio_uring import RingConfig
from trio_uring._kernel.uapi import Opcode

class Kernel(SimulatedKernel):
    fails = False
    unknown_flags = 0

    def _attempt(self, request):
        if self.fails and request.sqe.opcode == Opcode.RECV:
            self.fails = False
            group = self.groups[request.sqe.buf_index]
            assert group.available()
            return -errno.EIO, group.use(0)
        return super()._attempt(request)

async def receive(sock, size):
    data = b""
    while len(data) < size:
        data += await sock.recv(size)
    return data

async def main():
    left, right = trio.socket.socketpair()
    with left, right:
        for data in (b"first", b"second"):
            await left.send(data)
            assert await receive(right, len(data)) == data
        kernel.fails = True
        await left.send(b"third")
        try:
            await right.recv(9)
        except OSError as exc:
            print(errno.errorcode[exc.errno])
        print((await receive(right, 5)).decode())

kernel = Kernel(random.Random(0), name="a failed receive", faults=0)
kernel.unknown_registrations = set()
kernel.incremental = kernel.limits_receives = True
kernel.install()
trio_uring.run(main, ring=RingConfig(receive_buffers=1, require=True))
kernel.remove()
"""


@pytest.mark.parametrize("engine", ["native", "python"])
def test_a_failed_receive_uses_nothing_of_its_buffer(preload: str, engine: str) -> None:
    result = run_python(
        FAILED_RECEIVE, environment={"LD_PRELOAD": preload, "TRIO_URING_ENGINE": engine}
    )
    assert output_of(result) == ["EIO", "third"]
