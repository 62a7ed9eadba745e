"""Services that a test writes as a few lines of its own, and what they tell.

Each begins with `THREADS` or `ASYNCIO`, which serve as `tests/version.py` does: a connection gets one line,
`GENERATION PID`, and is closed; one that sends `hold` stays open until it sends more. What they `say` comes to the
test, from every generation: they all have the first one's standard output.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

from tests.commands import read_soon
from tests.programs import PATIENCE, Programs

THREADS = """
import json, logging, os, signal, socket, ssl, sys, threading
import handoff

logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def answer(connection, service):
    with connection:
        try:
            while connection.recv(100) == b"hold":
                connection.sendall(b"held")
            connection.sendall(f"{service.generation} {os.getpid()}\\n".encode())
        except OSError:
            pass

def accept(service, listener, answer=answer):
    for connection, _ in listener:
        threading.Thread(target=answer, args=(connection, service), daemon=True).start()

def serve(service, *addresses, answer=answer):
    listeners = [service.listen(address) for address in addresses]
    service.on("drain", lambda record: say("drains", service.generation))
    service.ready()
    say("serves", service.generation, *(listener.address for listener in listeners))
    for listener in listeners[1:]:
        threading.Thread(target=accept, args=(service, listener, answer), daemon=True).start()
    accept(service, listeners[0], answer)
"""

ASYNCIO = """
import asyncio, json, logging, os, signal, socket, ssl, sys
import handoff, handoff.aio

logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def answering(service):
    async def answer(reader, writer):
        try:
            while await reader.read(100) == b"hold":
                writer.write(b"held")
            writer.write(f"{service.generation} {os.getpid()}\\n".encode())
            await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
    return answer

async def serve(service, *addresses, answer=None, **options):
    listeners = [await service.start_server(answer or answering(service), address, **options) for address in addresses]
    service.on("drain", lambda record: say("drains", service.generation))
    service.ready()
    say("serves", service.generation, *(listener.address for listener in listeners))
    await service.wait()
"""


class Script:
    """A running service: its lines, those of its later generations too."""

    def __init__(self, programs: Programs, head: str, text: str, *arguments: str, **environment: str) -> None:
        """Write it to a file and start it."""
        self.programs = programs
        self.path = programs.script(head + text, f"program-{len(programs.started)}.py")
        self.process = programs.start(self.path, *arguments, **environment)
        assert self.process.stdout
        self._descriptor = self.process.stdout.fileno()
        self._unread = ""

    def command(self, *arguments: str) -> list[str]:
        """What starts it, or another version of it, in an upgrade."""
        return [sys.executable, str(self.path), *arguments]

    def line(self) -> list[str]:
        """The words of the next line."""
        while "\n" not in self._unread:
            piece = read_soon(self._descriptor, self.programs.shown())
            assert piece, f"it has ended, with status {self.process.wait(PATIENCE)}{self.programs.shown()}"
            self._unread += piece
        line, _, self._unread = self._unread.partition("\n")
        return line.split()

    def wait_for(self, *words: str) -> list[str]:
        """The words that follow these in the next line that begins with them; lines before that are dropped."""
        while (line := self.line())[: len(words)] != list(words):
            pass
        return line[len(words) :]

    def serves(self, generation: int = 1) -> list[str]:
        """Wait until a generation says that it serves; its addresses."""
        return self.wait_for("serves", str(generation))

    def rest(self) -> list[list[str]]:
        """All lines that are left, once every generation has ended."""
        while piece := read_soon(self._descriptor, self.programs.shown()):
            self._unread += piece
        return [line.split() for line in self._unread.splitlines()]


def connect(address: str) -> socket.socket:
    """A connection to an address of a listener; the caller's to close."""
    if path := address.removeprefix("unix://") if address.startswith("unix://") else "":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(PATIENCE)
            connection.connect(path)
        except BaseException:
            connection.close()
            raise
        return connection
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE)


def hold(address: str) -> socket.socket:
    """A connection that the generation which now accepts keeps open; `finish` ends it."""
    connection = connect(address)
    connection.sendall(b"hold")
    assert connection.recv(10) == b"held"
    return connection


def finish(connection: socket.socket) -> tuple[int, int]:
    """Send something, read the answer, close; (generation, pid)."""
    with connection, connection.makefile() as reader:
        connection.sendall(b"?")
        generation, pid = reader.readline().split()
        return int(generation), int(pid)


def ask(address: str) -> int:
    """The generation that answers a new connection."""
    return finish(connect(address))[0]


class Clients:
    """A thread that asks again and again, as a context manager; `failures` and `generations` tell what it saw."""

    def __init__(self, address: str) -> None:
        self.failures: list[str] = []
        self.generations: list[int] = []
        self._address = address
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Clients:
        self._thread.start()
        self.wait_for_more()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait_for_more()
        self._over.set()
        self._thread.join()

    def wait_for_more(self, count: int = 20) -> None:
        """Wait until so many more have been answered or failed."""
        with self._changed:
            until = len(self.generations) + len(self.failures) + count
            assert self._changed.wait_for(lambda: len(self.generations) + len(self.failures) >= until, PATIENCE)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                generation = ask(self._address)
            except (OSError, ValueError) as error:
                self.failures.append(repr(error))
            else:
                self.generations.append(generation)
            with self._changed:
                self._changed.notify_all()


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def exit_status(pid: int) -> int:
    """How an orphan has ended, which is a child of this process by then (see `conftest`)."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate of localhost, signed by itself, and its key."""
    crt, key = directory / "localhost.crt", directory / "localhost.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1"),
            *("-keyout", str(key), "-out", str(crt)),
        ],
        check=True,
        capture_output=True,
    )
    return crt, key
