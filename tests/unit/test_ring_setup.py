"""How a ring is asked for: with fewer flags, fewer entries, or again a little later."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, cast

import pytest

from trio_uring import RingConfig, RingUnavailableError, SQPoll
from trio_uring._engine import _ring_setup
from trio_uring._engine._ring_setup import SetupLog, note_close, open_ring
from trio_uring._kernel import lib
from trio_uring._kernel.uapi import SetupFlag

if TYPE_CHECKING:
    from collections.abc import Callable

RING = "a ring"
HALVED = [256, 128, 64, 32, 16, 8]


class FakeKernel:
    """Answers each attempt, by its entries, flags and time. It is the clock, too."""

    def __init__(self, answer: Callable[[int, SetupFlag, float], int]) -> None:
        self.answer = answer
        self.now = 0.0
        self.slept = 0
        self.tried: list[tuple[int, SetupFlag]] = []

    def open(self, _config: RingConfig, entries: int, flags: SetupFlag) -> tuple[object, int]:
        self.tried.append((entries, flags))
        result = self.answer(entries, flags, self.now)
        return (RING if result == 0 else None), result

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        self.now += seconds


@pytest.fixture
def kernel_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeKernel]:
    def make(answer: Callable[[int, SetupFlag, float], int]) -> FakeKernel:
        kernel = FakeKernel(answer)
        monkeypatch.setattr(_ring_setup, "_try_open", kernel.open)
        monkeypatch.setattr(_ring_setup, "time", kernel)
        monkeypatch.setattr(_ring_setup, "_memory", _ring_setup._Memory())
        return kernel

    return make


def attempt(config: RingConfig = RingConfig(entries=256)) -> tuple[object, list[str]]:  # noqa: B008
    log = SetupLog()
    try:
        return open_ring(config, log), log.steps
    except RingUnavailableError as exc:
        return exc.reason, log.steps


@pytest.mark.parametrize("config", [RingConfig(entries=256), RingConfig(sqpoll=SQPoll())])
def test_each_step_of_the_ladder_has_fewer_flags(
    kernel_of: Callable[..., FakeKernel], config: RingConfig
) -> None:
    ladder = _ring_setup._LADDER if config.sqpoll is None else _ring_setup._SQPOLL_LADDER
    for known in range(len(ladder)):
        kernel = kernel_of(lambda _entries, flags, _now: -errno.EINVAL * (flags != ladder[known]))
        note_close()  # which has nothing to do with it
        ring, steps = attempt(config)
        assert ring == RING
        assert kernel.tried == [(config.entries, flags) for flags in ladder[: known + 1]]
        assert [step.endswith(": EINVAL") for step in steps] == [True] * known
        assert kernel.slept == 0
    kernel = kernel_of(lambda *_: -errno.EINVAL)
    reason, steps = attempt(config)
    assert "io_uring_setup" in cast("str", reason)
    assert len(steps) == len(ladder)


@pytest.mark.parametrize("most", [*HALVED, 4])
def test_where_memory_is_short_there_are_fewer_entries(
    kernel_of: Callable[..., FakeKernel], most: int
) -> None:
    kernel = kernel_of(lambda entries, *_: -errno.ENOMEM * (entries > most))
    ring, steps = attempt()
    assert (ring == RING) == (most in HALVED)
    assert [entries for entries, _ in kernel.tried] == [n for n in HALVED if n >= most]
    assert {flags for _, flags in kernel.tried} == {_ring_setup._LADDER[0]}
    refused = [n for n in HALVED if n > most]
    assert [step.split(",")[0] for step in steps] == [f"{n} entries" for n in refused]
    assert kernel.slept == 0


def test_memory_of_a_ring_that_was_just_closed_is_waited_for(
    kernel_of: Callable[..., FakeKernel],
) -> None:
    kernel = kernel_of(lambda _entries, _flags, now: -errno.ENOMEM * (now < 0.1))
    note_close()
    assert attempt() == (RING, [])
    assert kernel.slept > 0


def test_it_waits_once_for_memory_that_does_not_come(
    kernel_of: Callable[..., FakeKernel],
) -> None:
    kernel = kernel_of(lambda entries, *_: -errno.ENOMEM * (entries > 64))
    note_close()
    waited = []
    for entries in (256, 256, 128, 64):
        before = kernel.slept
        ring, _ = attempt(RingConfig(entries=entries))
        assert ring == RING
        waited.append(kernel.slept > before)
        note_close()
    assert waited == [True, False, False, False]


def test_another_error_is_final(kernel_of: Callable[..., FakeKernel]) -> None:
    kernel = kernel_of(lambda *_: -errno.EPERM)
    note_close()
    reason, steps = attempt()
    assert reason != RING
    assert (len(kernel.tried), len(steps), kernel.slept) == (1, 1, 0)


@pytest.mark.parametrize(
    ("config", "entries", "expected"),
    [
        (RingConfig(entries=8, completion_entries=64), 8, (64, 0, 0, 0)),
        (RingConfig(entries=8, completion_entries=64), 4, (32, 0, 0, 0)),
        (RingConfig(entries=8, completion_entries=8), 16, (16, 0, 0, 0)),
        (
            RingConfig(entries=8, completion_entries=8, allowed_operations=frozenset({"RECV"})),
            8,
            (8, SetupFlag.R_DISABLED, 0, 0),
        ),
        (
            RingConfig(entries=8, completion_entries=8, sqpoll=SQPoll(idle=2.0)),
            8,
            (8, 0, 2000, 0),
        ),
        (
            RingConfig(entries=8, completion_entries=8, sqpoll=SQPoll(idle=0.001, cpu=3)),
            8,
            (8, SetupFlag.SQ_AFF, 1, 3),
        ),
    ],
)
@pytest.mark.parametrize("result", [0, -errno.EINVAL])
def test_what_the_kernel_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    config: RingConfig,
    entries: int,
    expected: tuple[int, int, int, int],
    result: int,
) -> None:
    asked: list[tuple[Any, ...]] = []

    class Lib:
        ring_new, ring_free = lib.ring_new, lib.ring_free

        @staticmethod
        def ring_open(_ring: object, *arguments: Any) -> int:
            asked.append(arguments)
            return result

    monkeypatch.setattr(_ring_setup, "lib", Lib)
    ring, returned = _ring_setup._try_open(config, entries, SetupFlag(0))
    assert asked == [(entries, *expected)]
    assert (ring is None, returned) == (result != 0, result)
