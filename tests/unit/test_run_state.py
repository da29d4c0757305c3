"""What is kept for one run, also for a run without a ring."""

from __future__ import annotations

import trio

from trio_uring._engine._run_state import RunResource, run_state_without_ring


class Resource(RunResource):
    closed: bool | None = None

    def close(self, *, drained: bool) -> None:
        self.closed = drained


def test_a_run_without_a_ring_has_one_state_that_it_closes() -> None:
    async def main() -> Resource:
        resource = run_state_without_ring().get(Resource)
        assert run_state_without_ring().get(Resource) is resource
        assert resource.closed is None
        return resource

    first, second = trio.run(main), trio.run(main)
    assert first is not second
    assert (first.closed, second.closed) == (True, True)
