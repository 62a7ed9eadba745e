"""A Django application that answers as the examples do, by ASGI and by WSGI."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import django  # type: ignore[import-untyped]  # django has no types
from django.conf import settings  # type: ignore[import-untyped]  # as above
from django.core.handlers.asgi import ASGIHandler  # type: ignore[import-untyped]  # as above
from django.core.handlers.wsgi import WSGIHandler  # type: ignore[import-untyped]  # as above
from django.http import HttpResponse, StreamingHttpResponse  # type: ignore[import-untyped]  # as above
from django.urls import path  # type: ignore[import-untyped]  # as above

generation: Callable[[], int] = int  # set by the program
urlpatterns: list[Any] = []


def headers() -> dict[str, str]:
    """Who answers."""
    return {"X-Generation": str(generation()), "X-Pid": str(os.getpid())}


def asgi() -> ASGIHandler:
    """The application with asynchronous views."""

    async def echo(_: object, text: str) -> HttpResponse:
        return HttpResponse(f"{text}\n", headers=headers())

    async def slow(_: object, text: str, lines: int, seconds: str) -> StreamingHttpResponse:
        async def parts() -> AsyncIterator[str]:
            for number in range(lines):
                await asyncio.sleep(float(seconds))
                yield f"{text} {number}\n"

        return StreamingHttpResponse(parts(), headers=headers())

    _set_up(echo, slow)
    return ASGIHandler()


def wsgi() -> WSGIHandler:
    """The application with synchronous views."""

    def echo(_: object, text: str) -> HttpResponse:
        body = f"{text}\n"
        return HttpResponse(body, headers={"Content-Length": str(len(body)), **headers()})

    def slow(_: object, text: str, lines: int, seconds: str) -> StreamingHttpResponse:
        def parts() -> Iterator[str]:
            pause = threading.Event()
            for number in range(lines):
                pause.wait(float(seconds))
                yield f"{text} {number}\n"

        return StreamingHttpResponse(parts(), headers=headers())

    _set_up(echo, slow)
    return WSGIHandler()


def _set_up(echo: Callable[..., Any], slow: Callable[..., Any]) -> None:
    urlpatterns.extend([path("echo/<text>", echo), path("slow/<text>/<int:lines>/<seconds>", slow)])
    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="test", USE_TZ=True)
    django.setup()
