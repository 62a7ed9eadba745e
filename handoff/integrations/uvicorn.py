"""Uvicorn, run from a program of its own.

::

    import uvicorn
    import handoff.aio
    from handoff.integrations.uvicorn import Server

    service = handoff.aio.Service("web")
    Server(uvicorn.Config("myapp:app"), service, "tcp://127.0.0.1:8080").run()

The goodbye: `Connection: close` on each answer, close code 1012 for WebSockets, uvicorn's own `shutdown` for what is
left after the grace time. The lifespan starts before `ready` and shuts down after the last connection. Uvicorn's
options hold, but for those of its listeners (host, port, uds, fd, backlog) and of its processes (workers, reload).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import socket
import time
from typing import Final

import uvicorn

import handoff.aio
from handoff.integrations.asgi import Goodbye
from handoff.runtime.listener import Gate, Listener

_TICK: Final = 0.1  # seconds; uvicorn counts its ticks by it
_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A uvicorn.Server whose connections a service accepts; `run` and `serve` are called as ever."""

    def __init__(self, config: uvicorn.Config, service: handoff.aio.Service, *addresses: str) -> None:
        """Listen at `addresses`; see `handoff.Service.listen`. `serve` enters the service."""
        super().__init__(config)
        self.servers: list[asyncio.base_events.Server] = []  # those of asyncio, for uvicorn's shutdown: there are none
        self._service = service
        self._addresses = addresses
        self._listeners: list[Listener] = []

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until this generation is replaced or stopped and its last connection has ended.

        Raises as `handoff.Service` does, and RuntimeError where the application's lifespan does not start.
        """
        if sockets:
            raise ValueError("the service has the sockets; give the Server their addresses")
        self._service.goodbye(self._say_goodbye)
        self._service.on("rollback", lambda _: self._taken_back())
        try:
            async with self._service:
                await self.startup()
                await self.main_loop()
        finally:
            if self.started:
                await self.shutdown()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, listen, and be ready."""
        if not self.config.loaded:
            self.config.load()
        self.config.loaded_app = Goodbye(self.config.loaded_app, self._service)
        self.lifespan = self.config.lifespan_class(self.config)
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise RuntimeError("the application's lifespan did not start")
        self.started = True
        for address in self._addresses:
            self._listeners.append(await self._service.create_server(self._protocol, address, ssl=self.config.ssl))
        self._service.ready()
        addresses = ", ".join(listener.address for listener in self._listeners)
        _log.info("generation %d serves %s", self._service.generation, addresses)

    async def main_loop(self) -> None:
        """Tick until this generation accepts no more.

        What asks uvicorn to exit (`should_exit`, `limit_max_requests`) stops the service, but not in probation: the
        paused generation may have to take back.
        """
        over = asyncio.ensure_future(self._service.wait())
        try:
            for count in itertools.count():
                if await self.on_tick(count) and any(listener.gate is Gate.OPEN for listener in self._listeners):
                    self._service.stop()
                await asyncio.wait([over], timeout=_TICK)
                if over.done():
                    return
        finally:
            over.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's own: wait for tasks that outlast their connection, to the drain's deadline; end the lifespan."""
        if (until := self._service.drain_until) is not None:
            left = max(0, math.ceil(until - time.monotonic()))
            own = self.config.timeout_graceful_shutdown
            self.config.timeout_graceful_shutdown = left if own is None else min(own, left)
        await super().shutdown()

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(
            config=self.config,  # type: ignore[call-arg]  # typed as asyncio.Protocol; uvicorn ignores the same
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )

    async def _say_goodbye(self) -> None:
        """Tick on; close each WebSocket once its handshake is done, and everything else when the grace time is over."""
        grace_over = asyncio.ensure_future(self._service.grace_over())
        try:
            for count in itertools.count():
                await self.on_tick(count)
                for connection in list(self.server_state.connections):
                    told = getattr(connection, "handshake_complete", False) or grace_over.done()
                    if told and not connection.transport.is_closing():
                        connection.shutdown()
                await asyncio.sleep(_TICK)
        finally:
            grace_over.cancel()

    def _taken_back(self) -> None:
        """Serve on, whatever asked uvicorn to exit in probation."""
        self.should_exit = False
        self.server_state.total_requests = 0
