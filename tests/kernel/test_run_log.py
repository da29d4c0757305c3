"""The logger ``trio_uring`` gets one INFO line for each run that asked for a ring."""

from __future__ import annotations

import logging
import warnings

import pytest
import trio

import trio_uring
from trio_uring import RingConfig, _run
from trio_uring._kernel import why_no_native


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="trio_uring")
    return caplog


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


def test_a_run_on_each_engine(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_URING_ENGINE", "python")
    trio_uring.run(nothing, ring=RingConfig(require=True))
    monkeypatch.setenv("TRIO_URING_ENGINE", "native")
    trio_uring.run(nothing, ring=RingConfig(require=True))
    native = f"Python engine: {why_no_native}" if why_no_native else "native engine"
    assert log.record_tuples == [
        (
            "trio_uring",
            logging.INFO,
            "run on io_uring, Python engine: TRIO_URING_ENGINE is python",
        ),
        ("trio_uring", logging.INFO, f"run on io_uring, {native}"),
    ]


def test_a_run_without_a_ring(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_URING", "off")
    trio_uring.run(nothing)
    monkeypatch.delenv("TRIO_URING")
    monkeypatch.setattr(_run, "why_no_core", "no core, for the log")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):  # the warning comes once, the line each time
            trio_uring.run(nothing)
    trio.run(nothing)  # which asked for none
    assert log.record_tuples == [
        ("trio_uring", logging.INFO, "run on epoll: TRIO_URING switches io_uring off"),
        ("trio_uring", logging.INFO, "run on epoll: no core, for the log"),
        ("trio_uring", logging.INFO, "run on epoll: no core, for the log"),
    ]
