"""aiohttp.web, in place of `web.run_app`.

::

    import asyncio
    from aiohttp import web
    import handoff.aio
    from handoff.integrations.aiohttp import serve

    app = web.Application()
    service = handoff.aio.Service("web")
    asyncio.run(serve(service, app, "tcp://127.0.0.1:8080"))

The goodbye: `Connection: close` on each answer, close code 1012 for WebSockets, the application's `on_shutdown`; idle
connections are closed when the grace time is over. `on_startup` runs before `ready`, `on_cleanup` after the last
connection.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
import weakref
from typing import Any, Final

from aiohttp import WSCloseCode, hdrs, web
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler

import handoff.aio

_LOOK: Final = 0.1  # seconds between two looks for connections that have become idle
_log = logging.getLogger(__name__)


async def serve(
    service: handoff.aio.Service,
    app: web.Application,
    *addresses: str,
    ssl_context: ssl.SSLContext | None = None,
    **options: Any,
) -> None:
    """Serve until this generation is replaced or stopped and its last connection has ended; enters the service.

    `addresses` are those of `handoff.Service.listen`, `options` those of web.AppRunner. The application must not have
    been started. Raises as `handoff.Service` does.
    """
    runner = _Runner(service, app, **options)
    try:
        async with service:
            await runner.setup()
            assert runner.server
            listeners = [await service.create_server(runner.server, each, ssl=ssl_context) for each in addresses]
            service.ready()
            where = ", ".join(listener.address for listener in listeners)
            _log.info("generation %d serves %s", service.generation, where)
            await service.wait()
    finally:
        await runner.cleanup()


class _Runner(web.AppRunner):
    """Knows which requests are handled and which answers are on their way: a connection with neither is idle."""

    def __init__(self, service: handoff.aio.Service, app: web.Application, **options: Any) -> None:
        super().__init__(app, **options)
        self._service = service
        self._handled: set[RequestHandler] = set()
        self._answers: weakref.WeakSet[web.StreamResponse] = weakref.WeakSet()
        self._shutdown: asyncio.Future[None] | None = None
        app.middlewares.insert(0, self._handle)
        app.on_response_prepare.append(self._begin_answer)
        service.goodbye(self._say_goodbye)

    async def shutdown(self) -> None:
        """Run `on_shutdown` to its end, once: when draining begins, or in `cleanup` where it never began."""
        if self._shutdown is None:
            self._shutdown = asyncio.ensure_future(super().shutdown())
        await asyncio.shield(self._shutdown)  # the goodbye that began it may be over before it is

    async def cleanup(self) -> None:
        """End handlers that outlast their connection, at the drain's deadline; then as ever."""
        if self.server:
            await self.server.shutdown(self._left())
        await super().cleanup()

    @web.middleware
    async def _handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._handled.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._handled.discard(request.protocol)

    async def _begin_answer(self, _: web.Request, answer: web.StreamResponse) -> None:
        self._answers.add(answer)
        if self._service.draining and not isinstance(answer, web.WebSocketResponse):
            answer.headers[hdrs.CONNECTION] = "close"
            answer.force_close()

    async def _say_goodbye(self) -> None:
        """Run `on_shutdown`, then close each WebSocket; from the end of the grace time on, what is idle."""
        grace_over = asyncio.ensure_future(self._service.grace_over())
        shutdown = asyncio.ensure_future(self.shutdown())
        ends: dict[object, asyncio.Future[Any]] = {}
        try:
            while self.server:
                for answer in list(self._answers):
                    if isinstance(answer, web.WebSocketResponse):
                        if shutdown.done() and answer.prepared and answer not in ends:
                            ends[answer] = asyncio.ensure_future(answer.close(code=WSCloseCode.SERVICE_RESTART))
                    elif grace_over.done():
                        answer.force_close()
                for connection in self.server.connections:
                    if grace_over.done() and connection not in self._handled and connection not in ends:
                        # The first ends the wait for a request, the second what is left once an answer is sent. A
                        # request that is handled is left alone: after close() the rest of its body would be dropped.
                        connection.close()
                        ends[connection] = asyncio.ensure_future(connection.shutdown(self._left()))
                await asyncio.sleep(_LOOK)
        finally:
            tasks = (grace_over, shutdown, *ends.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _left(self) -> float:
        """How much time the drain has left."""
        until = self._service.drain_until
        return 0.0 if until is None else max(0.0, until - time.monotonic())
