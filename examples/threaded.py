"""A threaded http.server that is upgraded without a lost request.

    python examples/threaded.py                    # in one terminal
    curl http://127.0.0.1:8080/echo/hello          # in another: again and again
    handoff upgrade threaded

`GET /echo/TEXT` answers TEXT; `GET /slow/TEXT/LINES/SECONDS` streams lines, one every SECONDS.
"""

from __future__ import annotations

import argparse
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import handoff


class Handler(BaseHTTPRequestHandler):
    """Answers; what belongs to handoff is in the first two methods."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    service: handoff.Service
    connection: handoff.Connection

    def handle_one_request(self) -> None:
        """Wait for a request: while draining, an idle connection is closed after the grace time."""
        if self.connection.wait_for_request(self.rfile):
            super().handle_one_request()
        else:
            self.close_connection = True

    def end_headers(self) -> None:
        """Say goodbye while draining: the client sends its next request on a new connection."""
        if self.service.draining:
            self.send_header("Connection", "close")
        super().end_headers()

    def do_GET(self) -> None:
        """Answer."""
        match self.path.strip("/").split("/"):
            case ["echo", text]:
                self._begin(length=len(text) + 1)
                self.wfile.write(f"{text}\n".encode())
            case ["slow", text, lines, seconds]:
                self._begin()
                pause = threading.Event()
                for number in range(int(lines)):
                    pause.wait(float(seconds))
                    line = f"{text} {number}\n".encode()
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.write(b"0\r\n\r\n")
            case _:
                self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's signature
        """Write no line for each request."""

    def _begin(self, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("X-Generation", str(self.service.generation))
        self.send_header("X-Pid", str(os.getpid()))
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()


def main() -> None:
    """Serve until replaced or stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--name", default="threaded")
    parser.add_argument("--listen", default="tcp://127.0.0.1:8080")
    parser.add_argument("--probation", type=float, default=5.0)
    arguments = parser.parse_args()

    with handoff.Service(arguments.name, probation=arguments.probation) as service:
        listener = service.listen(arguments.listen)
        Handler.service = service
        server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
        service.ready()
        print(f"generation {service.generation} serves {listener.address}", flush=True)
        for connection, peer in listener:  # ends when another generation is in charge
            server.process_request(connection, peer)
        server.socket.close()


if __name__ == "__main__":
    main()
