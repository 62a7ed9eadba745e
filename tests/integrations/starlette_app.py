"""A Starlette application that answers as the examples do, with a WebSocket echo at /ws."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

import handoff.aio


def make(service: handoff.aio.Service, *, broken: bool = False) -> Starlette:
    """Make the application; it writes to standard error when its lifespan ends."""

    def headers() -> dict[str, str]:
        return {"X-Generation": str(service.generation), "X-Pid": str(os.getpid())}

    async def echo(request: Request) -> Response:
        return PlainTextResponse(f"{request.path_params['text']}\n", headers=headers())

    async def slow(request: Request) -> Response:
        async def lines() -> AsyncIterator[str]:
            for number in range(request.path_params["lines"]):
                await asyncio.sleep(request.path_params["seconds"])
                yield f"{request.path_params['text']} {number}\n"

        return StreamingResponse(lines(), headers=headers())

    async def websocket(socket: WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(f"{service.generation} {text}")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if broken:
            raise ValueError("no database")
        yield
        sys.stderr.write(f"ended: generation {service.generation}, {service.connections} open\n")

    routes = [
        Route("/echo/{text}", echo),
        Route("/slow/{text}/{lines:int}/{seconds:float}", slow),
        WebSocketRoute("/ws", websocket),
    ]
    return Starlette(routes=routes, lifespan=lifespan)
