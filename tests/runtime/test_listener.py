"""A listener's gate: who waits in accept is woken by every change, and by none that is not there."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from handoff.core.address import parse
from handoff.linux import sockets
from handoff.runtime.connections import Connections
from handoff.runtime.listener import Gate, Listener

PATIENCE = 10.0


class Served:
    """A listener, threads that accept on it, and clients."""

    def __init__(self) -> None:
        self.connections = Connections()
        self.listener = Listener(sockets.open_listener(parse("tcp://127.0.0.1:0")), self.connections)
        self.greeted: queue.SimpleQueue[int] = queue.SimpleQueue()  # numbers of the threads that have accepted
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # numbers of those whose iteration has ended
        self._threads: list[threading.Thread] = []
        self._clients = contextlib.ExitStack()

    def serve(self, threads: int = 1) -> None:
        """Accept in that many threads."""
        for number in range(threads):
            thread = threading.Thread(target=self._serve, args=(number,))
            thread.start()
            self._threads.append(thread)

    def _serve(self, number: int) -> None:
        for connection, _ in self.listener:
            with connection:
                connection.sendall(b"hello")
            self.greeted.put(number)
        self.ended.put(number)

    def connect(self) -> socket.socket:
        """Connect a client, which may have to wait to be served."""
        return self._clients.enter_context(
            socket.create_connection(("127.0.0.1", self.listener.port), timeout=PATIENCE)
        )

    def close(self) -> None:
        """Close everything."""
        self.listener.close()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a thread still waits"
        self._clients.close()
        self.connections.close()


@pytest.fixture
def served() -> Iterator[Served]:
    """A listener whose gate is shut."""
    made = Served()
    yield made
    made.close()


def nothing_came(client: socket.socket) -> bool:
    """Whether a client has been told nothing for a moment."""
    client.settimeout(0.03)
    try:
        return client.recv(10) is None
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE)


def test_names(served: Served) -> None:
    """A listener tells its address, its port and its state."""
    port = served.listener._socket.getsockname()[1]

    assert (served.listener.address, served.listener.port, served.listener.path) == (
        f"tcp://127.0.0.1:{port}",
        port,
        "",
    )
    assert repr(served.listener) == f"<handoff.Listener tcp://127.0.0.1:{port} shut>"


def test_shut(served: Served) -> None:
    """While the gate is shut clients wait in the queue."""
    served.serve()

    assert nothing_came(served.connect())


def test_open(served: Served) -> None:
    """When the gate opens, who waited in the queue is served."""
    served.serve()
    client = served.connect()

    served.listener.turn(Gate.OPEN)

    assert client.recv(10) == b"hello"


def test_pause(served: Served) -> None:
    """A pause is not seen by who iterates: clients wait, and are served when the gate opens again."""
    served.serve(3)
    served.listener.turn(Gate.OPEN)
    assert served.connect().recv(10) == b"hello"

    served.listener.turn(Gate.SHUT)
    client = served.connect()
    waited = nothing_came(client)
    served.listener.turn(Gate.OPEN)

    assert (waited, client.recv(10)) == (True, b"hello")


@pytest.mark.parametrize("before", [Gate.SHUT, Gate.OPEN])
def test_end(served: Served, before: Gate) -> None:
    """When the listener ends every thread's iteration ends, whatever it waited for."""
    served.serve(5)
    served.listener.turn(before)

    served.listener.turn(Gate.ENDED)

    assert sorted(served.ended.get(timeout=PATIENCE) for _ in range(5)) == [0, 1, 2, 3, 4]


def test_end_is_for_good(served: Served) -> None:
    """An ended listener never opens again."""
    served.listener.turn(Gate.ENDED)

    served.listener.turn(Gate.OPEN)

    assert served.listener.gate is Gate.ENDED
    assert served.listener.accept() is None


def test_no_wake_up_is_lost(served: Served) -> None:
    """However often the gate turns, an open one always serves: no thread sleeps through a change."""
    served.serve(4)

    for _ in range(200):
        client = served.connect()
        served.listener.turn(Gate.OPEN)
        assert client.recv(10) == b"hello"
        served.listener.turn(Gate.SHUT)


def test_no_end_is_lost() -> None:
    """However an end falls among the clients, every thread ends."""
    for _ in range(50):
        served = Served()
        served.serve(3)
        served.listener.turn(Gate.OPEN)
        served.connect()

        served.listener.turn(Gate.ENDED)

        assert sorted(served.ended.get(timeout=PATIENCE) for _ in range(3)) == [0, 1, 2]
        served.close()


def test_accept(served: Served) -> None:
    """Accepting once gives a connection and its peer's address."""
    served.listener.turn(Gate.OPEN)
    client = served.connect()

    accepted = served.listener.accept()

    assert accepted
    connection, peer = accepted
    with connection:
        assert peer == client.getsockname()
        assert served.connections.count() == 1


def test_accept_now(served: Served) -> None:
    """Accepting without waiting gives nothing while nobody is there, or while the gate is shut."""
    none_there = served.listener.accept_now()
    client = served.connect()
    shut = served.listener.accept_now()
    served.listener.turn(Gate.OPEN)

    accepted = served.listener.accept_now()

    assert (none_there, shut) == (None, None)
    assert accepted
    with accepted[0]:
        assert accepted[1] == client.getsockname()


def test_accepted_in_non_blocking_mode_by_nobody(served: Served) -> None:
    """A connection blocks like any new socket, though its listener never does."""
    served.listener.turn(Gate.OPEN)
    served.connect()

    accepted = served.listener.accept()

    assert accepted
    with accepted[0] as connection:
        assert connection.gettimeout() is None
        assert os.get_blocking(connection.fileno())


def test_iterations_that_end_early(served: Served) -> None:
    """Leaving an iteration leaves no watcher and no descriptor behind."""
    served.listener.turn(Gate.OPEN)
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(20):
        served.connect()
        for connection, _ in served.listener:
            connection.close()
            break

    assert served.listener.changes._calls == []
    assert len(os.listdir("/proc/self/fd")) == before + 20  # the clients


def test_close_keeps_the_queue(served: Served) -> None:
    """Who is queued when this generation closes its listener is served by another one that holds the socket."""
    twin = socket.socket(fileno=os.dup(served.listener.fileno()))
    client = served.connect()

    served.listener.close()

    with twin:
        accepted, _ = twin.accept()
        with accepted:
            accepted.sendall(b"hello")
    assert client.recv(10) == b"hello"
    assert served.listener.fileno() == -1


def test_hold(served: Served) -> None:
    """A listener that somebody holds ends at once, and keeps its descriptor until the release."""
    served.listener.hold()
    served.listener.hold()

    served.listener.close()

    held = served.listener.fileno()
    served.listener.release()
    still_held = served.listener.fileno()
    served.listener.release()
    assert (served.listener.gate, held >= 0, still_held, served.listener.fileno()) == (Gate.ENDED, True, held, -1)


def test_release_of_one_that_serves(served: Served) -> None:
    """Letting go of a listener that has not ended closes nothing."""
    served.listener.hold()

    served.listener.release()

    assert served.listener.fileno() >= 0


def test_close_twice(served: Served) -> None:
    """Closing twice is harmless."""
    served.listener.close()
    served.listener.close()

    assert served.listener.fileno() == -1


EXHAUSTED = """
import os, resource, sys, threading
from handoff.core.address import parse
from handoff.linux import sockets
from handoff.runtime.connections import Connections
from handoff.runtime.listener import Gate, Listener

def greet(connection):
    opened.append(connection)
    connection.sendall(b"hello")

def serve():
    if sys.argv[1] == "iterate":
        for connection, _ in listener:
            greet(connection)
    else:
        while accepted := listener.accept():
            greet(accepted[0])

opened = []
connections = Connections()
listener = Listener(sockets.open_listener(parse("tcp://127.0.0.1:0")), connections)
free = os.dup(0)
os.close(free)
limit = free + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
listener.turn(Gate.OPEN)
thread = threading.Thread(target=serve, daemon=True)
thread.start()
print(listener.port, flush=True)
while sys.stdin.readline():
    opened.pop(0).close()
listener.turn(Gate.ENDED)
thread.join(10)
print("waits" if thread.is_alive() else "ended")
"""


@pytest.mark.parametrize("way", ["iterate", "accept"])
@pytest.mark.parametrize("free", [2, 3, 4])  # who accepts takes one to wait
def test_descriptors_used_up(way: str, free: int) -> None:
    """Without descriptors left clients wait, and each close of a connection lets the next one be served."""
    with contextlib.ExitStack() as clients:
        server = clients.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", EXHAUSTED, way, str(free)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        assert server.stdin
        assert server.stdout
        assert server.stderr
        port = int(server.stdout.readline())
        waiting = [
            clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)) for _ in range(10)
        ]
        # The kernel hands connections out in their order: the first is served, the last is not.
        first_one = waiting[0].recv(5)
        last_one_waits = nothing_came(waiting[-1])

        greeted = []
        for client in waiting:
            greeted.append(first_one if client is waiting[0] else client.recv(5))
            server.stdin.write("close\n")
            server.stdin.flush()

        _, errors = server.communicate(timeout=PATIENCE)
        assert (first_one, last_one_waits) == (b"hello", True), errors
        assert greeted == [b"hello"] * 10, errors
        assert "out of descriptors" in errors
