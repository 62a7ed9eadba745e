"""For a server that can't be given a socket, grpc.aio say: its connections are accepted here, and their bytes copied.

::

    server = grpc.aio.server(options=[("grpc.max_connection_age_ms", 10_000)])
    with private_path() as path:
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        async with handoff.aio.Service("rpc") as service:
            await relay(service, "tcp://127.0.0.1:50051", path)
            service.ready()
            await service.wait()
        await server.stop(None)

The server listens at a Unix socket of its generation's own, so generations don't share anything but what handoff hands
over. It costs a copy of every byte, and the server sees the relay as its peer.

The goodbye is gRPC's GOAWAY to connections that reach their age, which has to be less than the drain's time; nobody
calls `server.stop` before the last connection has ended, because that cancels calls which arrive at that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Final

import handoff.aio
from handoff.runtime.listener import Listener

_READ: Final = 65536  # bytes


@contextlib.contextmanager
def private_path() -> Iterator[str]:
    """A path for a Unix socket in a new directory (0700) that is removed in the end, with the socket."""
    with tempfile.TemporaryDirectory(prefix="handoff-") as directory:
        yield os.path.join(directory, "socket")


async def relay(service: handoff.aio.Service, address: str, path: str) -> Listener:
    """Accept at `address`, see `handoff.Service.listen`, and connect each connection with the Unix socket at `path`."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(path)
        except OSError:  # the server has stopped; a reset says so to the client
            writer.transport.abort()
            return
        try:
            await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))
        finally:
            server_writer.close()
            writer.close()

    return await service.start_server(connected, address)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy to the end of file, and tell that too."""
    try:
        while data := await reader.read(_READ):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()
