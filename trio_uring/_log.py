"""The logger ``trio_uring``. It gets one line for each run that asked for a ring."""

from __future__ import annotations

import logging
from typing import Final

_logger: Final = logging.getLogger("trio_uring")


def log_ring_run(why_python: str) -> None:
    """Say that a run is on io_uring, and *why_python* is its engine, if it is."""
    if why_python:
        _logger.info("run on io_uring, Python engine: %s", why_python)
    else:
        _logger.info("run on io_uring, native engine")


def log_fallback_run(reason: str) -> None:
    """Say that a run is on epoll because of *reason*."""
    _logger.info("run on epoll: %s", reason)
