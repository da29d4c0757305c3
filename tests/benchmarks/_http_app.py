"""The ASGI application that `bench_sockets.py` serves."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hypercorn.config import Config
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"path": request.url.path, "items": [{"id": n} for n in range(10)]})


def app_and_config(fd: str) -> tuple[Starlette, Config]:
    """Return the application, and how to serve it on a socket that listens already."""
    config = Config()
    config.bind = [f"fd://{fd}"]
    config.keep_alive_max_requests = sys.maxsize
    return Starlette(routes=[Route("/", answer)]), config
