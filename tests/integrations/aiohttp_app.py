"""An aiohttp application that answers as the examples do, with a WebSocket echo at /ws."""

from __future__ import annotations

import asyncio
import os
import sys

from aiohttp import WSMsgType, web

import handoff.aio


def make(service: handoff.aio.Service, *, broken: bool = False) -> web.Application:
    """Make the application; it writes to standard error when it is cleaned up."""

    def headers() -> dict[str, str]:
        return {"X-Generation": str(service.generation), "X-Pid": str(os.getpid())}

    async def echo(request: web.Request) -> web.StreamResponse:
        return web.Response(text=f"{request.match_info['text']}\n", headers=headers())

    async def slow(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers=headers())
        await answer.prepare(request)
        for number in range(int(request.match_info["lines"])):
            await asyncio.sleep(float(request.match_info["seconds"]))
            await answer.write(f"{request.match_info['text']} {number}\n".encode())
        return answer

    async def websocket(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await socket.send_str(f"{service.generation} {message.data}")
        return socket

    async def startup(_: web.Application) -> None:
        if broken:
            raise ValueError("no database")

    async def cleanup(_: web.Application) -> None:
        sys.stderr.write(f"ended: generation {service.generation}, {service.connections} open\n")

    app = web.Application()
    app.add_routes(
        [
            web.get("/echo/{text}", echo),
            web.get("/slow/{text}/{lines}/{seconds}", slow),
            web.get("/ws", websocket),
        ]
    )
    app.on_startup.append(startup)
    app.on_cleanup.append(cleanup)
    return app
