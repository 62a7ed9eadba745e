"""`Connection: close` on an ASGI application's answers while its generation drains: for servers that don't say it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import handoff.aio

_CLOSE: Final = (b"connection", b"close")
_HTTP_1: Final = ("1.0", "1.1")  # in HTTP/2 that header is malformed: RFC 9113, 8.2.2

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Goodbye:
    """Wraps an ASGI application; decides when an answer begins, so that nobody is told before the drain."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: handoff.aio.Service) -> None:
        """Call `app` for everything; the service is borrowed."""
        self._app = app
        self._service = service

    async def __call__(self, scope: Message, receive: Any, send: Send, *more: Any) -> None:
        """Serve one ASGI scope; `more` is what a server adds to the interface."""
        if scope["type"] != "http" or scope["http_version"] not in _HTTP_1:
            return await self._app(scope, receive, send, *more)

        async def send_goodbye(message: Message) -> None:
            # None is hypercorn's, at the application's end
            if message and message["type"] == "http.response.start" and self._service.draining:
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
            await send(message)

        return await self._app(scope, receive, send_goodbye, *more)
