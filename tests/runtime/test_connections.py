"""The open connections of a generation: counted whatever becomes of them, and told when it is time to end."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import select
import socket
import threading
import time
import warnings
from collections.abc import Iterator

import pytest

from handoff.runtime.connections import Connection, Connections

PATIENCE = 10.0


class Opened:
    """Connections of one generation, and the clients at their other ends."""

    def __init__(self) -> None:
        self.connections = Connections()
        self._stack = contextlib.ExitStack()

    def connect(self) -> tuple[Connection, socket.socket]:
        """A connection as it was accepted, and its client."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
            accepted, _ = listener.accept()
        self._stack.enter_context(client)
        connection = self.connections.add(accepted)
        return connection, client

    def close(self) -> None:
        """Close the clients and the rest."""
        self._stack.close()
        self.connections.close()


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Connections, and the clients at their other ends."""
    made = Opened()
    yield made
    made.close()


class Waiting(threading.Thread):
    """A thread that waits for a connection's next request."""

    def __init__(self, connection: Connection, reader: io.BufferedIOBase | None = None) -> None:
        super().__init__(daemon=True)
        self._connection = connection
        self._reader = reader
        self.answer: bool | None = None
        self.start()

    def run(self) -> None:
        """Wait."""
        self.answer = self._connection.wait_for_request(self._reader)

    def done(self, seconds: float = PATIENCE) -> bool:
        """Whether it has its answer within that time."""
        self.join(seconds)
        return not self.is_alive()


# Counting


def test_count(opened: Opened) -> None:
    """A connection counts from its acceptance until it is closed."""
    first, _ = opened.connect()
    second, _ = opened.connect()
    counts = [opened.connections.count()]

    first.close()
    counts.append(opened.connections.count())
    second.close()
    counts.append(opened.connections.count())

    assert counts == [2, 1, 0]


def test_it_is_a_socket(opened: Opened) -> None:
    """A connection is a socket like the one that was accepted, not inherited by other programs."""
    connection, client = opened.connect()
    with connection:
        connection.sendall(b"hello")

        assert isinstance(connection, socket.socket)
        assert (connection.family, connection.type) == (client.family, client.type)
        assert connection.getpeername() == client.getsockname()
        assert not connection.get_inheritable()
        assert client.recv(10) == b"hello"


def test_close_twice(opened: Opened) -> None:
    """Closing a connection twice counts once."""
    first, _ = opened.connect()
    second, _ = opened.connect()

    first.close()
    first.close()

    with second:
        assert opened.connections.count() == 1


def test_count_with_an_open_file(opened: Opened) -> None:
    """A connection that was closed while a file made of it is open counts until that is closed too."""
    connection, client = opened.connect()
    file = connection.makefile("rb")
    connection.close()
    before = opened.connections.count()
    client.sendall(b"still read")
    client.shutdown(socket.SHUT_WR)
    content = file.read()

    file.close()

    assert (before, content, opened.connections.count()) == (1, b"still read", 0)


def test_count_after_garbage_collection(opened: Opened) -> None:
    """A connection that nobody closed, and nobody has any more, does not count."""
    connection, client = opened.connect()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")

        del connection
        gc.collect()

    assert opened.connections.count() == 0
    assert client.recv(1) == b""


def test_count_after_garbage_collection_in_a_cycle(opened: Opened) -> None:
    """A connection in a cycle of objects is counted until the collector has found it."""
    connection, _ = opened.connect()
    cycle: list[object] = [connection]
    cycle.append(cycle)
    gc.disable()
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            del connection, cycle
            before = opened.connections.count()

            gc.collect()
    finally:
        gc.enable()

    assert (before, opened.connections.count()) == (1, 0)


def test_objects_number_given_anew(opened: Opened) -> None:
    """Connections that come and go, at the same place in memory, are counted right."""
    kept = [opened.connect()[0] for _ in range(3)]
    for _ in range(50):
        opened.connect()[0].close()

    assert opened.connections.count() == 3
    for connection in kept:
        connection.close()
    assert opened.connections.count() == 0


def test_count_after_detach(opened: Opened) -> None:
    """A connection whose descriptor went to another object, as with TLS, counts until that one closes it."""
    connection, _ = opened.connect()
    other = socket.socket(fileno=connection.fileno())
    connection.detach()
    connection.close()
    before = opened.connections.count()

    other.close()

    assert (before, opened.connections.count()) == (1, 0)


def test_detached_number_given_anew(opened: Opened) -> None:
    """A detached descriptor that was closed, and whose number is somebody else's by now, does not count."""
    connection, _ = opened.connect()
    number = connection.detach()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, number)  # closes the connection

    count = opened.connections.count()

    os.close(number)
    os.close(null)
    assert count == 0


def test_detach_of_a_closed_one(opened: Opened) -> None:
    """A closed connection has nothing to detach, and does not count again."""
    connection, _ = opened.connect()
    connection.close()

    assert connection.detach() == -1
    assert opened.connections.count() == 0


def test_watchers_are_told(opened: Opened) -> None:
    """Whoever waits for fewer connections is told of a close and of a collected one, with the new count."""
    counts = []
    first, _ = opened.connect()
    second, _ = opened.connect()
    opened.connections.fewer.add(lambda: counts.append(opened.connections.count()))

    first.close()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        del second
        gc.collect()

    assert counts == [1, 0]


def test_counting_in_threads(opened: Opened) -> None:
    """Connections that many threads open and close are counted right, while others ask for the count."""
    over = threading.Event()
    counts: list[int] = []

    def come_and_go() -> None:
        for _ in range(200):
            ours, theirs = socket.socketpair()
            with theirs:
                opened.connections.add(ours).close()

    def ask() -> None:
        while not over.is_set():
            counts.append(opened.connections.count())

    asking = threading.Thread(target=ask)
    asking.start()
    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    asking.join()

    assert set(counts) <= set(range(7))
    assert opened.connections.count() == 0


# Waiting for a request


def test_request_that_is_there(opened: Opened) -> None:
    """Who waits goes on when the client has sent something; it is still there to be read."""
    connection, client = opened.connect()
    with connection:
        client.sendall(b"GET")

        assert connection.wait_for_request()
        assert connection.recv(10) == b"GET"


def test_request_that_comes(opened: Opened) -> None:
    """Who waits is woken by what the client sends."""
    connection, client = opened.connect()
    with connection:
        waiting = Waiting(connection)
        assert not waiting.done(0.02)

        client.sendall(b"GET")

        assert waiting.done()
        assert waiting.answer is True


def test_request_in_the_buffer(opened: Opened) -> None:
    """A pipelined request that was read into the buffer already counts as sent, also while draining."""
    connection, client = opened.connect()
    with connection, connection.makefile("rb") as reader:
        client.sendall(b"first\nsecond\n")
        assert reader.readline() == b"first\n"
        opened.connections.begin_drain(0.0)

        assert connection.wait_for_request(reader)
        assert reader.readline() == b"second\n"


def test_waiting_leaves_the_timeout_alone(opened: Opened) -> None:
    """Looking into an empty buffer neither waits nor changes the connection's timeout."""
    connection, client = opened.connect()
    connection.settimeout(7.0)
    with connection, connection.makefile("rb") as reader:
        waiting = Waiting(connection, reader)
        assert not waiting.done(0.02)

        client.sendall(b"GET\n")

        assert waiting.done()
        assert (waiting.answer, connection.gettimeout(), reader.readline()) == (True, 7.0, b"GET\n")


def test_waiting_with_an_unbuffered_reader(opened: Opened) -> None:
    """A reader without a buffer has nothing to look into."""
    connection, client = opened.connect()
    with connection, connection.makefile("rwb") as reader:
        client.sendall(b"GET\n")

        assert connection.wait_for_request(reader)


@pytest.mark.parametrize("buffered", [False, True])
def test_end_of_file(opened: Opened, buffered: bool) -> None:
    """A client that has closed is told like a request: the application reads the end of file itself."""
    connection, client = opened.connect()
    with connection, connection.makefile("rb") as reader:
        client.close()

        assert connection.wait_for_request(reader if buffered else None)
        assert reader.read() == b""


@pytest.mark.parametrize("buffered", [False, True])
def test_reset(opened: Opened, buffered: bool) -> None:
    """A connection that the client has reset is told like a request, and not raised here."""
    connection, client = opened.connect()
    with connection, connection.makefile("rb") as reader:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        assert select.select([connection], [], [], PATIENCE)[0]

        assert connection.wait_for_request(reader if buffered else None)


def test_draining_without_grace(opened: Opened) -> None:
    """While draining, a connection on which nothing has been sent may be closed at once."""
    connection, _ = opened.connect()
    with connection:
        opened.connections.begin_drain(0.0)

        assert not connection.wait_for_request()


def test_draining_wakes_who_waits(opened: Opened) -> None:
    """The drain's start wakes every thread that waits for a request."""
    connections = [opened.connect()[0] for _ in range(5)]
    waiting = [Waiting(connection) for connection in connections]
    assert not any(thread.done(0.01) for thread in waiting)

    opened.connections.begin_drain(0.0)

    assert all(thread.done() for thread in waiting)
    assert [thread.answer for thread in waiting] == [False] * 5
    for connection in connections:
        connection.close()


def test_request_within_the_grace_time(opened: Opened) -> None:
    """A request that comes within the grace time is still served."""
    connection, client = opened.connect()
    with connection:
        waiting = Waiting(connection)
        opened.connections.begin_drain(time.monotonic() + PATIENCE)
        assert not waiting.done(0.02)

        client.sendall(b"GET")

        assert waiting.done()
        assert waiting.answer is True


def test_grace_time_passes(opened: Opened) -> None:
    """Who waits is kept for the grace time, and no longer."""
    connection, _ = opened.connect()
    with connection:
        until = time.monotonic() + 0.05
        opened.connections.begin_drain(until)

        answer = connection.wait_for_request()

        assert not answer
        assert until <= time.monotonic() < until + PATIENCE


def test_request_when_the_grace_time_is_over(opened: Opened) -> None:
    """A request that was sent before anybody looked is served, though the grace time is over."""
    connection, client = opened.connect()
    with connection:
        client.sendall(b"GET")
        opened.connections.begin_drain(0.0)

        assert connection.wait_for_request()


def test_long_grace_time(opened: Opened) -> None:
    """A grace time beyond what poll(2) can count is no error."""
    connection, client = opened.connect()
    with connection:
        opened.connections.begin_drain(time.monotonic() + 1e9)
        client.sendall(b"GET")

        assert connection.wait_for_request()


def test_waiting_after_the_close(opened: Opened) -> None:
    """Once the generation has closed everything, waiting is for the client alone."""
    connection, client = opened.connect()
    with connection:
        opened.connections.close()
        client.sendall(b"GET")

        assert connection.wait_for_request()


# Ending


def test_end_all(opened: Opened) -> None:
    """Every open connection is cut: who reads there reads the end of file, on both sides."""
    connection, client = opened.connect()
    with connection:
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append(connection.recv(10)))
        reader.start()

        ended = opened.connections.end_all()

        reader.join(PATIENCE)
        assert (ended, read, client.recv(10)) == (1, [b""], b"")


def test_end_all_with_a_detached_one(opened: Opened) -> None:
    """A connection whose descriptor another object has is cut too."""
    connection, client = opened.connect()
    with socket.socket(fileno=connection.detach()) as other:
        ended = opened.connections.end_all()

        assert (ended, other.recv(10), client.recv(10)) == (1, b"", b"")


def test_end_all_spares_strangers(opened: Opened) -> None:
    """A descriptor that has got the number of a detached one is not touched."""
    connection, _ = opened.connect()
    number = connection.detach()
    ours, theirs = socket.socketpair()
    os.dup2(ours.fileno(), number)  # closes the connection

    ended = opened.connections.end_all()

    with ours, theirs:
        theirs.sendall(b"still there")
        received = ours.recv(20)
    os.close(number)
    assert (ended, received) == (0, b"still there")


def test_end_all_after_the_peer_has_gone(opened: Opened) -> None:
    """A connection that the client has closed already is no error."""
    connection, client = opened.connect()
    with connection:
        client.close()
        connection.recv(1)

        assert opened.connections.end_all() == 1
