"""What each server tells its clients when its generation drains; and that it tells nothing before commit."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.programs import PATIENCE, Programs, get, wait_for_end

SERVER = Path(__file__).with_name("server.py")
PROBATION = 1.5  # seconds, in which a test has to ask one request
UVICORN_H11 = ("uvicorn", "--http", "h11", "--ws", "wsproto")
UVICORN_HTTPTOOLS = ("uvicorn", "--http", "httptools", "--ws", "websockets-sansio")
ASYNCIO = [("aiohttp",), ("hypercorn",), UVICORN_H11, UVICORN_HTTPTOOLS]
EACH_KEPT = pytest.mark.parametrize("options", [*ASYNCIO, ("waitress",)], ids=" ".join)
EACH_ASYNCIO = pytest.mark.parametrize("options", ASYNCIO, ids=" ".join)
pytestmark = pytest.mark.timeout(60)


class Upgrade:
    """`handoff upgrade`, in probation when it is entered; `commit` and `exit` wait for these steps."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "handoff", "upgrade", "web", "--json", "--wait", "exit", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Upgrade:
        self._read_to("cutover")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def commit(self) -> None:
        """Wait until the new generation is in charge, and the old one begins to drain."""
        self._read_to("commit")

    def exit(self) -> dict[str, object]:
        """Wait until the old generation has ended; returns the record."""
        record: dict[str, object] = json.loads(self.process.communicate(timeout=PATIENCE)[0])
        return record

    def _read_to(self, step: str) -> None:
        assert self.process.stderr
        while step not in (line := self.process.stderr.readline()):
            assert line, f"the upgrade ended before {step}"


@contextlib.contextmanager
def kept(port: int) -> Iterator[http.client.HTTPConnection]:
    """A connection on which generation 1 has answered."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        assert ask(client) == (1, None)
        yield client
    finally:
        client.close()


def ask(client: http.client.HTTPConnection, path: str = "/echo/hello", body: str = "hello\n") -> tuple[int, str | None]:
    """(generation, what `Connection` says) of one answer, which is right and whole."""
    client.request("GET", path)
    answer = client.getresponse()
    assert (answer.status, answer.read().decode()) == (200, body)
    return int(answer.headers["X-Generation"]), answer.headers.get("Connection")


def closed(client: http.client.HTTPConnection) -> bool:
    """Whether the server has closed it."""
    return client.sock is None or bool(select.select([client.sock], [], [], 0)[0])


@EACH_KEPT
def test_connection_close(programs: Programs, options: tuple[str, ...]) -> None:
    """A kept connection's answer in probation says nothing, and its first one after commit says goodbye."""
    port = programs.serve(SERVER, *options, "--grace", "10")

    with kept(port) as client, Upgrade("--probation", str(PROBATION)) as upgrade:
        in_probation = ask(client)
        upgrade.commit()
        after_commit = ask(client)
        while after_commit == (1, None):  # commit is told just before draining begins
            after_commit = ask(client)
        record = upgrade.exit()

    assert in_probation == (1, None)
    assert after_commit == (1, "close")
    assert record["closed"] == 0


@EACH_KEPT
def test_idle_connections_have_the_grace_time(programs: Programs, options: tuple[str, ...]) -> None:
    """An idle connection is closed after the grace time; one with a request on it when that is answered."""
    port = programs.serve(SERVER, *options, "--grace", "1")
    lines = "".join(f"x {number}\n" for number in range(30))

    with kept(port) as idle, kept(port) as busy, Upgrade("--probation", "0.1") as upgrade:
        busy.request("GET", "/slow/x/30/0.1")
        upgrade.commit()
        open_after_commit = not closed(idle)
        end = idle.sock.recv(1)
        answer = busy.getresponse().read().decode()
        record = upgrade.exit()

    assert open_after_commit
    assert end == b""
    assert answer == lines
    assert (record["open"], record["closed"]) == (2, 0)


@EACH_KEPT
def test_drain_has_a_deadline(programs: Programs, options: tuple[str, ...]) -> None:
    """An answer that outlasts the drain is cut and counted, and the process ends."""
    port = programs.serve(SERVER, *options, "--grace", "0.2", "--drain-timeout", "1")
    pid = programs.status("web")["pid"]

    with kept(port) as client, Upgrade("--probation", "0") as upgrade:
        client.request("GET", "/slow/x/300/0.1")
        record = upgrade.exit()

    assert record["closed"] == 1
    assert wait_for_end(pid)


@EACH_KEPT
def test_stop(programs: Programs, options: tuple[str, ...]) -> None:
    """TERM finishes a request that is on its way, and ends the process with status 0."""
    port = programs.serve(SERVER, *options)
    process = programs.started[0]

    with kept(port) as client:
        client.request("GET", "/slow/x/5/0.1")
        assert client.sock.recv(1, socket.MSG_PEEK)  # the answer has begun
        os.kill(process.pid, signal.SIGTERM)
        answer = client.getresponse().read().decode()

    assert answer == "".join(f"x {number}\n" for number in range(5))
    assert process.wait(PATIENCE) == 0


@EACH_ASYNCIO
def test_application_ends_last(programs: Programs, options: tuple[str, ...]) -> None:
    """The application is shut down once, when no connection is left, and not in probation."""
    port = programs.serve(SERVER, *options, "--grace", "10")
    pid = programs.status("web")["pid"]

    with kept(port) as client, Upgrade("--probation", "0.3") as upgrade:
        upgrade.commit()
        ask(client, "/slow/x/3/0.1", "x 0\nx 1\nx 2\n")
        upgrade.exit()

    assert wait_for_end(pid)
    assert programs.errors.read_text().count("ended: generation 1, 0 open\n") == 1


@EACH_ASYNCIO
def test_application_does_not_start(programs: Programs, options: tuple[str, ...]) -> None:
    """A new version whose application does not start is rolled back, with what it said as its last words."""
    port = programs.serve(SERVER, *options)
    new = [sys.executable, str(SERVER), *options, "--broken", "--listen", f"tcp://127.0.0.1:{port}"]

    done = programs.handoff("upgrade", "web", "--json", "--", *new)

    record = json.loads(done.stdout)
    assert (done.returncode, record["result"]) == (1, "rolled-back")
    assert "no database" in record["reason"] + record["last_words"]
    assert get(port)[2] == 1


@contextlib.contextmanager
def websocket(port: int, generation: int) -> Iterator[ClientConnection]:
    """A WebSocket on which that generation has answered."""
    with connect(f"ws://127.0.0.1:{port}/ws", open_timeout=PATIENCE, compression=None) as client:
        assert says(client, "hello") == f"{generation} hello"
        yield client


def says(client: ClientConnection, text: str) -> str | bytes:
    """What it echoes."""
    client.send(text)
    return client.recv(timeout=PATIENCE)


def close_code(client: ClientConnection) -> int | None:
    """The code with which the server closes it."""
    with pytest.raises(ConnectionClosed) as caught:
        client.recv(timeout=PATIENCE)
    return caught.value.rcvd.code if caught.value.rcvd else None


@EACH_ASYNCIO
def test_websocket(programs: Programs, options: tuple[str, ...]) -> None:
    """A WebSocket is closed with 1012 (service restart) after commit, and works until then."""
    port = programs.serve(SERVER, *options, "--grace", "10")

    with websocket(port, 1) as client, Upgrade("--probation", str(PROBATION)) as upgrade:
        in_probation = says(client, "still here")
        upgrade.commit()
        code = close_code(client)
        record = upgrade.exit()

    assert in_probation == "1 still here"
    assert code == 1012
    assert record["closed"] == 0


@EACH_ASYNCIO
def test_websocket_outlives_a_rollback(programs: Programs, options: tuple[str, ...]) -> None:
    """After a rollback the old generation's WebSockets work on; those of the new one are closed with 1012."""
    port = programs.serve(SERVER, *options, "--grace", "10")

    with websocket(port, 1) as old, Upgrade("--probation", "60"), websocket(port, 2) as new:
        assert programs.handoff("rollback", "web").returncode == 0
        code = close_code(new)
        after_rollback = says(old, "as if nothing had happened")

    assert code == 1012
    assert after_rollback == "1 as if nothing had happened"
    assert get(port)[2] == 1


def test_uvicorn_was_asked_to_exit_in_probation(programs: Programs) -> None:
    """The old generation takes back although its uvicorn was asked to exit meanwhile."""
    port = programs.serve(SERVER, "uvicorn", "--exit-at-cutover")

    with kept(port) as client:
        assert programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60").returncode == 0
        assert programs.handoff("rollback", "web").returncode == 0

        assert ask(client) == (1, None)
        assert get(port)[2] == 1
    assert programs.status("web")["state"] == "serving"


def test_waitress_at_a_unix_socket(programs: Programs, tmp_path: Path) -> None:
    """Waitress is upgraded at a Unix socket too."""
    path = tmp_path / "web.sock"
    process = programs.start(SERVER, "waitress", "--listen", f"unix://{path}")
    assert process.stdout and process.stdout.readline()

    programs.upgrade("web", "--probation", "0.1", "--wait", "exit")

    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.sendall(b"GET /echo/hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = client.makefile().read()
    assert "X-Generation: 2\n" in answer
    assert answer.endswith("\n\nhello\n")
