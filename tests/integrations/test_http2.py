"""HTTP/2 with hypercorn: GOAWAY when the generation drains, and no stream is broken off."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, Event, ResponseReceived, StreamEnded
from hyperframe.frame import DataFrame, Frame, GoAwayFrame

from tests.integrations.test_goodbye import PROBATION, SERVER, Upgrade
from tests.programs import PATIENCE, Programs

HIGHEST_STREAM = 2**31 - 1
pytestmark = pytest.mark.timeout(60)


class Client:
    """An HTTP/2 connection with prior knowledge; `http` is h2's, which refuses everything after GOAWAY."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.http = H2Connection(H2Configuration(client_side=True))
        self.http.initiate_connection()
        self.socket.sendall(self.http.data_to_send())

    def ask(self, path: str) -> int:
        """Send a request; returns its stream."""
        stream: int = self.http.get_next_available_stream_id()
        headers = {":method": "GET", ":scheme": "http", ":authority": "x", ":path": path}
        self.http.send_headers(stream, list(headers.items()), end_stream=True)
        self.socket.sendall(self.http.data_to_send())
        return stream

    def events(self) -> Iterator[Event]:
        """What arrives, until the server closes."""
        while data := self.socket.recv(65536):
            yield from self.http.receive_data(data)
            if self.http.state_machine.state.name != "CLOSED":
                self.socket.sendall(self.http.data_to_send())

    def answer(self, path: str) -> tuple[str, str]:
        """(generation, body) of one request; nothing else may arrive."""
        stream = self.ask(path)
        generation, body = "", ""
        for event in self.events():
            assert not isinstance(event, ConnectionTerminated)
            if isinstance(event, ResponseReceived):
                generation = dict(event.headers)[b"x-generation"].decode()
            elif isinstance(event, DataReceived):
                body += event.data.decode()
            elif isinstance(event, StreamEnded) and event.stream_id == stream:
                break
        return generation, body

    def frames(self) -> Iterator[Frame]:
        """The frames that arrive, until the server closes; h2 does not see them."""
        buffer = b""
        while data := self.socket.recv(65536):
            buffer += data
            while len(buffer) >= 9:  # RFC 9113, 4.1
                frame, length = Frame.parse_frame_header(memoryview(buffer[:9]))
                if len(buffer) < 9 + length:
                    break
                frame.parse_body(memoryview(buffer[9 : 9 + length]))
                buffer = buffer[9 + length :]
                yield frame


@contextlib.contextmanager
def connected(port: int) -> Iterator[Client]:
    """A connection on which generation 1 has answered."""
    client = Client(port)
    with client.socket:
        assert client.answer("/echo/hello") == ("1", "hello\n")
        yield client


def test_goaway_after_commit(programs: Programs) -> None:
    """An idle connection is told with GOAWAY after commit, not before, and closed after the grace time."""
    port = programs.serve(SERVER, "hypercorn", "--grace", "1")

    with connected(port) as client, Upgrade("--probation", str(PROBATION)) as upgrade:
        in_probation = client.answer("/echo/again")
        upgrade.commit()
        told = list(client.events())
        record = upgrade.exit()

    assert in_probation == ("1", "again\n")
    assert [event.last_stream_id for event in told if isinstance(event, ConnectionTerminated)] == [HIGHEST_STREAM]
    assert record["closed"] == 0


def test_goaway_waits_for_the_open_stream(programs: Programs) -> None:
    """A client that breaks off at GOAWAY, as h2 does, gets its answer whole first."""
    port = programs.serve(SERVER, "hypercorn", "--grace", "10")

    with connected(port) as client, Upgrade("--probation", str(PROBATION)) as upgrade:
        stream = client.ask("/slow/x/30/0.1")
        upgrade.commit()
        told = (event for event in client.events() if isinstance(event, (StreamEnded, ConnectionTerminated)))
        first, second = next(told), next(told)
        client.socket.close()
        record = upgrade.exit()

    assert isinstance(first, StreamEnded) and first.stream_id == stream
    assert isinstance(second, ConnectionTerminated)
    assert record["closed"] == 0


def test_busy_connection_is_told_after_the_grace_time(programs: Programs) -> None:
    """A connection that is never idle is told when the grace time is over, and its stream goes on to its end."""
    port = programs.serve(SERVER, "hypercorn", "--grace", "0.5")

    with connected(port) as client, Upgrade("--probation", "0.1") as upgrade:
        stream = client.ask("/slow/x/30/0.1")
        upgrade.commit()
        frames = list(client.frames())
        record = upgrade.exit()

    goaway = next(frame for frame in frames if isinstance(frame, GoAwayFrame))
    later = frames[frames.index(goaway) :]
    after = [frame for frame in later if isinstance(frame, DataFrame) and frame.stream_id == stream]
    assert goaway.last_stream_id == HIGHEST_STREAM
    assert len(after) > 10
    assert "END_STREAM" in after[-1].flags
    assert record["closed"] == 0


def test_rollback(programs: Programs) -> None:
    """A connection to the old generation works on after a rollback, and hears nothing."""
    port = programs.serve(SERVER, "hypercorn", "--grace", "1")

    with connected(port) as client, Upgrade("--probation", "60"):
        assert programs.handoff("rollback", "web").returncode == 0

        assert client.answer("/echo/again") == ("1", "again\n")
        assert not select.select([client.socket], [], [], 0)[0]
