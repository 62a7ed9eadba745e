"""The asyncio example gone wrong: never gets ready, or crashes some time after it took over."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

import asyncio_http

import handoff.aio


def crash(service: handoff.aio.Service) -> None:
    """Die without a word to anybody, but tell how many connections that costs."""
    sys.stderr.write(f"crashing with {service.connections} connections open\n")
    sys.stderr.flush()
    os._exit(3)


async def main() -> None:
    """Serve badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--crash-after", type=float, help="seconds after it began to accept; else it is never ready")
    arguments = parser.parse_args()

    async with handoff.aio.Service(arguments.name) as service:
        await service.start_server(asyncio_http.Server(service).handle, arguments.listen)
        if arguments.crash_after is None:
            await asyncio.Event().wait()
        loop = asyncio.get_running_loop()
        service.on("cutover", lambda _: loop.call_later(arguments.crash_after, crash, service))
        service.ready()
        await service.wait()


if __name__ == "__main__":
    asyncio.run(main())
