"""A server that a test starts: `server.py NAME --listen ADDRESS`; prints its address when it serves."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socketserver
import sys
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own directory is there instead

import handoff.aio
from tests.integrations import django_app


def uvicorn_starlette(arguments: argparse.Namespace, **options: Any) -> None:
    """Uvicorn with Starlette."""
    import uvicorn

    from handoff.integrations.uvicorn import Server
    from tests.integrations import starlette_app

    service = handoff.aio.Service("web", **options)
    app = starlette_app.make(service, broken=arguments.broken)
    config = uvicorn.Config(app, http=arguments.http, ws=arguments.ws, access_log=False, log_level="warning")
    server = Server(config, service, arguments.listen)
    if arguments.exit_at_cutover:
        service.on("cutover", lambda record: setattr(server, "should_exit", record.old == service.generation))
    server.run()


def uvicorn_django(arguments: argparse.Namespace, **options: Any) -> None:
    """Uvicorn with Django."""
    import uvicorn

    from handoff.integrations.uvicorn import Server

    service = handoff.aio.Service("web", **options)
    django_app.generation = lambda: service.generation
    config = uvicorn.Config(django_app.asgi(), access_log=False, log_level="warning")
    Server(config, service, arguments.listen).run()


def hypercorn_starlette(arguments: argparse.Namespace, **options: Any) -> None:
    """Hypercorn with Starlette."""
    from hypercorn.config import Config

    from handoff.integrations.hypercorn import serve
    from tests.integrations import starlette_app

    service = handoff.aio.Service("web", **options)
    app: Any = starlette_app.make(service, broken=arguments.broken)
    asyncio.run(serve(service, app, Config(), arguments.listen))


def aiohttp_web(arguments: argparse.Namespace, **options: Any) -> None:
    """aiohttp with an application of its own."""
    from handoff.integrations.aiohttp import serve
    from tests.integrations import aiohttp_app

    service = handoff.aio.Service("web", **options)
    asyncio.run(serve(service, aiohttp_app.make(service, broken=arguments.broken), arguments.listen, access_log=None))


def waitress_django(arguments: argparse.Namespace, **options: Any) -> None:
    """Waitress with Django."""
    from handoff.integrations.waitress import serve

    service = handoff.Service("web", **options)
    django_app.generation = lambda: service.generation
    serve(service, django_app.wsgi(), arguments.listen, threads=8)


def wsgiref_plain(arguments: argparse.Namespace, **options: Any) -> None:
    """wsgiref.simple_server in threads: needs no code of handoff's but its Service."""

    class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
        pass

    class Handler(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's signature
            """Write no line for each request."""

    with handoff.Service("web", **options) as service:
        listener = service.listen(arguments.listen)
        server = Server(("", 0), Handler, bind_and_activate=False)
        server.server_name, server.server_port = "127.0.0.1", listener.port
        server.setup_environ()
        server.set_app(_plain_wsgi(service))
        service.ready()
        sys.stdout.write(f"serves {listener.address}\n")
        sys.stdout.flush()
        for connection, peer in listener:
            server.process_request(connection, peer)
        server.server_close()  # joins the threads


def _plain_wsgi(service: handoff.Service) -> Callable[..., Iterable[bytes]]:
    def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        kind, text, *more = environ["PATH_INFO"].strip("/").split("/")
        lines = [text] if kind == "echo" else [f"{text} {number}" for number in range(int(more[0]))]
        parts = [f"{line}\n".encode() for line in lines]
        length = str(sum(map(len, parts)))  # HTTP/1.0, with which only this tells a whole answer from a cut one
        headers = {"Content-Length": length, "X-Generation": str(service.generation), "X-Pid": str(os.getpid())}
        start_response("200 OK", list(headers.items()))
        return parts if kind == "echo" else slowly(parts, float(more[1]))

    def slowly(parts: list[bytes], seconds: float) -> Iterator[bytes]:
        pause = threading.Event()
        for part in parts:
            pause.wait(seconds)
            yield part

    return application


def grpc_relayed(arguments: argparse.Namespace, **options: Any) -> None:
    """grpc.aio, which takes no socket, behind a relay."""
    from handoff.integrations.relay import private_path, relay

    async def serve() -> None:
        service = handoff.aio.Service("web", **options)
        with private_path() as path:
            server = _grpc_server(service)
            server.add_insecure_port(f"unix:{path}")
            await server.start()
            async with service:
                listener = await relay(service, arguments.listen, path)
                service.ready()
                sys.stdout.write(f"serves {listener.address}\n")
                sys.stdout.flush()
                await service.wait()
            await server.stop(None)

    asyncio.run(serve())


def grpc_own_listener(arguments: argparse.Namespace, **options: Any) -> None:
    """grpc.aio with a listener of its own in each generation (SO_REUSEPORT): to measure what that loses."""

    async def serve() -> None:
        async with handoff.aio.Service("web", **options) as service:
            server = _grpc_server(service)
            port = server.add_insecure_port(arguments.listen.removeprefix("tcp://"))
            await server.start()
            service.ready()
            sys.stdout.write(f"serves tcp://127.0.0.1:{port}\n")
            sys.stdout.flush()
            await service.wait()
        await server.stop(arguments.drain_timeout)

    asyncio.run(serve())


def _grpc_server(service: handoff.aio.Service) -> Any:
    import grpc.aio  # type: ignore[import-untyped]  # grpcio has no types

    async def who(request: bytes, context: object) -> bytes:
        return b"%d %s" % (service.generation, request)

    server = grpc.aio.server(options=[("grpc.max_connection_age_ms", 1000)])
    method = grpc.unary_unary_rpc_method_handler(who)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", {"Who": method}),))
    return server


SERVERS = {
    "aiohttp": aiohttp_web,
    "grpc": grpc_relayed,
    "grpc-own-listener": grpc_own_listener,
    "hypercorn": hypercorn_starlette,
    "uvicorn": uvicorn_starlette,
    "uvicorn-django": uvicorn_django,
    "waitress": waitress_django,
    "wsgiref": wsgiref_plain,
}


def main() -> None:
    """Serve until replaced or stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--listen", default="tcp://127.0.0.1:0")
    parser.add_argument("--grace", type=float, default=1.0)
    parser.add_argument("--drain-timeout", type=float, default=20.0)
    parser.add_argument("--http", default="auto", help="uvicorn's option")
    parser.add_argument("--ws", default="auto", help="uvicorn's option")
    parser.add_argument("--broken", action="store_true", help="the application does not start")
    parser.add_argument("--exit-at-cutover", action="store_true", help="uvicorn is asked to exit in probation")
    arguments = parser.parse_args()
    serves = logging.getLogger("handoff.integrations")
    serves.addHandler(logging.StreamHandler(sys.stdout))
    serves.setLevel(logging.INFO)
    serves.propagate = False
    logging.basicConfig(level=logging.WARNING)
    SERVERS[arguments.server](arguments, grace=arguments.grace, drain_timeout=arguments.drain_timeout)


if __name__ == "__main__":
    main()
