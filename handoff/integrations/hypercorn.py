"""Hypercorn with asyncio, HTTP/2 included, in place of `hypercorn.asyncio.serve`.

::

    import asyncio
    from hypercorn.config import Config
    import handoff.aio
    from handoff.integrations.hypercorn import serve
    from myapp import app

    service = handoff.aio.Service("web")
    asyncio.run(serve(service, app, Config(), "tcp://127.0.0.1:8080"))

The goodbye: `Connection: close` on each HTTP/1 answer, GOAWAY for HTTP/2, close code 1012 for WebSockets; idle
connections are closed when the grace time is over. The lifespan starts before `ready` and shuts down after the last
connection. Hypercorn's options hold, but for those of its listeners (bind, ...), of its processes, and QUIC.

Hypercorn's own end of an HTTP/2 connection (`H2Connection.close_connection`) makes h2 refuse to send the rest of every
answer that is on its way, so GOAWAY is written here, as RFC 9113, 6.8 has it: with the highest stream number, which
refuses nothing. A connection hears it when no stream is open, at the latest when the grace time is over: clients that
are built on h2 (httpx) break off the answers that they wait for when they receive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any, Final, Literal

from hypercorn.asyncio.lifespan import Lifespan
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import RawData
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WSStream
from hypercorn.typing import Framework, LifespanState
from hypercorn.utils import wrap_app
from hyperframe.frame import GoAwayFrame
from wsproto.events import CloseConnection

import handoff.aio
from handoff.integrations.asgi import Goodbye

_LOOK: Final = 0.1  # seconds between two looks for connections that can be told
_ROUND_TRIP: Final = 1.0  # seconds from GOAWAY until a client that has received it sends nothing new
_SERVICE_RESTART: Final = 1012  # IANA's registry of WebSocket close codes
_GOAWAY: Final = GoAwayFrame(last_stream_id=2**31 - 1).serialize()
_log = logging.getLogger(__name__)


async def serve(
    service: handoff.aio.Service,
    app: Framework,
    config: Config,
    *addresses: str,
    mode: Literal["asgi", "wsgi"] | None = None,
) -> None:
    """Serve until this generation is replaced or stopped and its last connection has ended; enters the service.

    `addresses` are those of `handoff.Service.listen`; with certificates in `config` all of them speak TLS. Raises as
    `handoff.Service` does, and hypercorn's LifespanFailureError.
    """
    worker = _Worker(service, wrap_app(app, config.wsgi_max_body_size, mode), config)
    service.goodbye(worker.say_goodbye)
    try:
        async with service:
            await worker.start()
            tls: dict[str, Any] = {}
            if config.ssl_enabled:
                tls = {"ssl": config.create_ssl_context(), "ssl_handshake_timeout": config.ssl_handshake_timeout}
            listeners = [await service.start_server(worker.connected, address, **tls) for address in addresses]
            service.ready()
            where = ", ".join(listener.address for listener in listeners)
            _log.info("generation %d serves %s", service.generation, where)
            await service.wait()
    finally:
        await worker.end()


class _Worker:
    """What hypercorn.asyncio.run.worker_serve is, without its listeners."""

    def __init__(self, service: handoff.aio.Service, app: Any, config: Config) -> None:
        self._service = service
        self._app: Any = Goodbye(app, service)
        self._config = config
        self._context = WorkerContext(None)
        self._state: LifespanState = {}
        self._lifespan: Lifespan | None = None
        self._lifespan_task: asyncio.Task[None] | None = None
        self._connections: set[TCPServer] = set()
        self._tasks: set[asyncio.Task[Any]] = set()  # theirs
        self._told: set[TCPServer] = set()  # of those that speak HTTP/2
        self._telling: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the application."""
        loop = asyncio.get_running_loop()
        self._lifespan = Lifespan(self._app, self._config, loop, self._state)
        self._lifespan_task = loop.create_task(self._lifespan.handle_lifespan())
        await self._lifespan.wait_for_startup()
        if self._lifespan_task.done():
            self._lifespan_task.result()

    async def end(self) -> None:
        """Wait for what outlasts its connection, not beyond the drain's deadline; then shut the application down."""
        await self._context.terminated.set()
        until = self._service.drain_until
        left = 0.0 if until is None else max(0.0, until - time.monotonic())
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=min(left, self._config.graceful_timeout))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)
        if self._lifespan and self._lifespan_task:
            await self._lifespan.wait_for_shutdown()
            self._lifespan_task.cancel()
            await asyncio.gather(self._lifespan_task, return_exceptions=True)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        loop = asyncio.get_running_loop()
        connection = TCPServer(self._app, loop, self._config, self._context, self._state, reader, writer)
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self._connections.add(connection)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by `end`; asyncio.streams would complain of it
                await connection
        finally:
            self._tasks.discard(task)
            self._connections.discard(connection)
            self._told.discard(connection)

    async def say_goodbye(self) -> None:
        """Tell each connection once it can be told; when the grace time is over, hypercorn's own termination."""
        grace_over = asyncio.ensure_future(self._service.grace_over())
        try:
            while not grace_over.done():
                self._tell(busy=False)
                await asyncio.wait([grace_over], timeout=_LOOK)
            if self._tell(busy=True):
                await asyncio.sleep(_ROUND_TRIP)
            await self._context.terminated.set()
        finally:
            for task in (grace_over, *self._telling):
                task.cancel()

    def _tell(self, *, busy: bool) -> bool:
        """Say what can be said now, also to `busy` HTTP/2 connections; returns whether any of those heard it."""
        any_busy = False
        for connection in self._connections:
            wrapper = getattr(connection, "protocol", None)  # there once the connection's task has begun
            if wrapper is None:
                continue
            elif isinstance(wrapper.protocol, H2Protocol):
                streams = list(wrapper.protocol.streams.values())
                if connection not in self._told and (busy or not streams):
                    self._told.add(connection)
                    any_busy |= bool(streams)
                    self._start(connection.protocol_send(RawData(data=_GOAWAY)))
            else:
                streams = [wrapper.protocol.stream]
            for stream in streams:
                if isinstance(stream, WSStream) and stream.state is ASGIWebsocketState.CONNECTED:
                    # Not app_send({"type": "websocket.close"}): after that, what the application sends is its error.
                    self._start(stream._send_wsproto_event(CloseConnection(code=_SERVICE_RESTART)))
        return any_busy

    def _start(self, send: Coroutine[Any, Any, None]) -> None:
        """Send in a task of its own: a client that does not read holds nobody up."""
        task = asyncio.create_task(send)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
