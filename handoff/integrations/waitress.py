"""Waitress, in place of `waitress.serve`.

::

    import handoff
    from handoff.integrations.waitress import serve
    from myapp import application

    service = handoff.Service("web")
    serve(service, application, "tcp://127.0.0.1:8080", threads=8)

The goodbye: `Connection: close` on each answer; idle connections are closed when the grace time is over. Waitress's
options hold, but for those of its listeners (host, port, listen, sockets, unix_socket, backlog).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any, Final

from waitress import wasyncore  # type: ignore[import-untyped]  # waitress has no types
from waitress.adjustments import Adjustments  # type: ignore[import-untyped]  # as above
from waitress.channel import HTTPChannel  # type: ignore[import-untyped]  # as above
from waitress.server import TcpWSGIServer, UnixWSGIServer  # type: ignore[import-untyped]  # as above
from waitress.task import ThreadedTaskDispatcher, WSGITask  # type: ignore[import-untyped]  # as above

import handoff
from handoff.runtime.listener import Gate, Listener

_LOOK: Final = 0.1  # seconds between two looks for channels that have become idle
_log = logging.getLogger(__name__)


def serve(service: handoff.Service, application: Any, *addresses: str, **adjustments: Any) -> None:
    """Serve until this generation is replaced or stopped and its last connection has ended; enters the service.

    `addresses` are those of `handoff.Service.listen`, `adjustments` those of waitress.serve. Blocks; the calling thread
    becomes waitress's main loop. Raises as `handoff.Service` does.
    """
    adjusted = Adjustments(**adjustments)
    dispatcher = ThreadedTaskDispatcher()
    dispatcher.set_thread_count(adjusted.threads)
    loop = None
    try:
        with service:
            listeners = [service.listen(address) for address in addresses]
            loop = _Loop(service, listeners, application, dispatcher, adjusted)
            service.ready()
            where = ", ".join(listener.address for listener in listeners)
            _log.info("generation %d serves %s", service.generation, where)
            loop.run()
    finally:
        until = service.drain_until
        dispatcher.shutdown(timeout=0.0 if until is None else max(0.0, until - time.monotonic()))
        if loop:
            loop.close()


class _Task(WSGITask):  # type: ignore[misc]  # waitress has no types
    """One request; while the generation drains, its answer says goodbye."""

    def build_response_header(self) -> bytes:
        if self.channel.server.service.draining:
            self.set_close_on_finish()
        head: bytes = super().build_response_header()
        return head


class _Channel(HTTPChannel):  # type: ignore[misc]  # as above
    """One connection."""

    task_class = _Task

    @property
    def idle(self) -> bool:
        """Whether nothing of a request is here, and nothing of an answer left to be sent."""
        return not (self.requests or self.request or self.total_outbufs_len)


class _Accepting:
    """Mixed into waitress's servers: accepts from a listener while its gate is open."""

    channel_class = _Channel
    active_channels: dict[int, _Channel]
    accepting: bool

    def __init__(
        self,
        service: handoff.Service,
        listener: Listener,
        application: Any,
        channels: dict[int, Any],
        dispatcher: ThreadedTaskDispatcher,
        adjusted: Adjustments,
    ) -> None:
        self.service = service
        self.listener = listener
        # A descriptor of its own, which waitress may close when it likes; what is accepted comes from the listener.
        twin = socket.socket(fileno=os.dup(listener.fileno()))
        super().__init__(
            application,
            channels,
            _start=False,  # it listens already
            _sock=twin,
            dispatcher=dispatcher,
            adj=adjusted,
            bind_socket=False,
            sockinfo=(twin.family, twin.type, twin.proto, twin.getsockname()),
        )  # type: ignore[call-arg]  # the other base takes them
        self.accepting = True

    def accept(self) -> tuple[socket.socket, Any] | None:
        """Accept one connection, in place of wasyncore.dispatcher.accept."""
        return self.listener.accept_now()

    def readable(self) -> bool:
        """Whether the loop waits for connections."""
        wanted: bool = super().readable()  # type: ignore[misc]  # the other base has it; it also looks for idle channels
        return wanted and self.listener.gate is Gate.OPEN


class _Tcp(_Accepting, TcpWSGIServer):  # type: ignore[misc]  # waitress has no types
    pass


class _Unix(_Accepting, UnixWSGIServer):  # type: ignore[misc]  # as above
    pass


class _Loop:
    """Waitress's main loop; any thread may wake it."""

    def __init__(
        self,
        service: handoff.Service,
        listeners: list[Listener],
        application: Any,
        dispatcher: ThreadedTaskDispatcher,
        adjusted: Adjustments,
    ) -> None:
        self._service = service
        self._listeners = listeners
        self._adjusted = adjusted
        self._map: dict[int, Any] = {}
        self._servers = [
            (_Unix if listener.path else _Tcp)(service, listener, application, self._map, dispatcher, adjusted)
            for listener in listeners
        ]
        for listener in listeners:
            listener.changes.add(self._wake)

    def run(self) -> None:
        """Serve until nothing accepts and nothing is open."""
        poll = wasyncore.poll2 if self._adjusted.asyncore_use_poll else wasyncore.poll
        while any(listener.gate is not Gate.ENDED for listener in self._listeners) or self._channels():
            poll(self._patience(), self._map)
            until = self._service.idle_until
            if until is not None and until <= time.monotonic():
                for channel in self._channels():
                    channel.will_close |= channel.idle

    def close(self) -> None:
        """Close what is left. Nobody wakes the loop from here on."""
        for listener in self._listeners:
            listener.changes.remove(self._wake)
        wasyncore.close_all(self._map)

    def _channels(self) -> list[_Channel]:
        return [channel for server in self._servers for channel in list(server.active_channels.values())]

    def _patience(self) -> float:
        """How long the loop may wait: to the end of the grace time, not longer than waitress's own timeout."""
        timeout: float = self._adjusted.asyncore_loop_timeout
        until = self._service.idle_until
        left = timeout if until is None else until - time.monotonic()
        return min(timeout, left) if left > 0 else min(timeout, _LOOK)

    def _wake(self) -> None:
        self._servers[0].pull_trigger()
