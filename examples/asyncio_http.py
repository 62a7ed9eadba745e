"""An asyncio HTTP server with slow streaming answers that is upgraded without a lost request.

    python examples/asyncio_http.py                # in one terminal
    curl http://127.0.0.1:8080/echo/hello          # in another: again and again
    handoff upgrade asyncio

`GET /echo/TEXT` answers TEXT; `GET /slow/TEXT/LINES/SECONDS` streams lines, one every SECONDS.
"""

from __future__ import annotations

import argparse
import asyncio
import os

import h11

import handoff.aio


class Server:
    """Answers the requests of each connection, one after another; h11 speaks HTTP."""

    def __init__(self, service: handoff.aio.Service) -> None:
        self.service = service

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        http = h11.Connection(h11.SERVER)
        try:
            while request := await self._next_request(http, reader):
                await self._answer(http, writer, request.target.decode().strip("/").split("/"))
                if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                    break
                http.start_next_cycle()
        except (h11.RemoteProtocolError, ConnectionError):
            pass  # a client that speaks something else, or that is gone
        finally:
            writer.close()

    async def _next_request(self, http: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
        """The next request, read to its end; None when the connection is to be closed."""
        request: h11.Request | None = None
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                data = b""
                if request or http.trailing_data[0]:  # half a request is here: wait for the other half
                    data = await reader.read(65536)
                else:
                    with self.service.idle():  # while draining, an idle connection is closed after the grace time
                        data = await reader.read(65536)
                http.receive_data(data)
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.EndOfMessage):
                return request
            elif isinstance(event, h11.ConnectionClosed):
                return None

    async def _answer(self, http: h11.Connection, writer: asyncio.StreamWriter, path: list[str]) -> None:
        headers = [("X-Generation", str(self.service.generation)), ("X-Pid", str(os.getpid()))]
        if self.service.draining:  # say goodbye: the client sends its next request on a new connection
            headers.append(("Connection", "close"))
        match path:
            case ["echo", text]:
                body = f"{text}\n".encode()
                headers.append(("Content-Length", str(len(body))))
                parts = [
                    http.send(h11.Response(status_code=200, headers=headers)),
                    http.send(h11.Data(data=body)),
                    http.send(h11.EndOfMessage()),
                ]
                writer.write(b"".join(part for part in parts if part))
            case ["slow", text, lines, seconds]:
                writer.write(http.send(h11.Response(status_code=200, headers=headers)) or b"")
                for number in range(int(lines)):
                    await asyncio.sleep(float(seconds))
                    writer.write(http.send(h11.Data(data=f"{text} {number}\n".encode())) or b"")
                    await writer.drain()
                writer.write(http.send(h11.EndOfMessage()) or b"")
            case _:
                headers.append(("Content-Length", "0"))
                writer.write(http.send(h11.Response(status_code=404, headers=headers)) or b"")
                writer.write(http.send(h11.EndOfMessage()) or b"")
        await writer.drain()


async def main() -> None:
    """Serve until replaced or stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--name", default="asyncio")
    parser.add_argument("--listen", default="tcp://127.0.0.1:8080")
    parser.add_argument("--probation", type=float, default=5.0)
    arguments = parser.parse_args()

    async with handoff.aio.Service(arguments.name, probation=arguments.probation) as service:
        listener = await service.start_server(Server(service).handle, arguments.listen)
        service.ready()
        print(f"generation {service.generation} serves {listener.address}", flush=True)
        await service.wait()  # until another generation is in charge


if __name__ == "__main__":
    asyncio.run(main())
