"""The connections that a generation has open: counted, and told when it is time to end."""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import threading
import time
import weakref
from typing import Final

from handoff.runtime.watchers import Watchers

_LONGEST: Final = 2_000_000  # seconds in one poll(2), which counts milliseconds in an int


class Connection(socket.socket):
    """An accepted connection: a socket like any other, counted until it is closed."""

    _tracker: Connections | None = None

    def wait_for_request(self, reader: io.BufferedIOBase | None = None) -> bool:
        """Wait until the peer has sent something, or closed; blocks the calling thread.

        For the time between two requests of a kept connection. Returns False when the generation drains and the peer
        has sent nothing for the grace time: then nobody waits for an answer, and the connection may be closed.
        `reader` is the buffer that the application reads through, if any: what lies there already counts as sent.
        """
        if isinstance(reader, io.BufferedReader) and self._buffered(reader):
            return True
        poll = select.poll()
        poll.register(self, select.POLLIN)
        tracker = self._tracker
        if tracker is None or tracker.draining < 0:
            poll.poll()
            return True
        if tracker.idle_until is None:
            poll.register(tracker.draining, select.POLLIN)
            if any(descriptor != tracker.draining for descriptor, _ in poll.poll()):
                return True
            poll.unregister(tracker.draining)
        left = (tracker.idle_until or 0.0) - time.monotonic()
        return bool(poll.poll(min(max(0.0, left), _LONGEST) * 1000))

    def detach(self) -> int:
        """Give up the descriptor, as socket.detach does; it is still counted until whoever has it now closes it."""
        if self._tracker:
            self._tracker.detached(self)
        return super().detach()

    def _real_close(self, *arguments: object) -> None:
        # What socket.close() comes to once no file made by makefile() is left; ssl.SSLSocket overrides it too.
        super()._real_close(*arguments)  # type: ignore[misc]  # typeshed does not list it
        if self._tracker:
            self._tracker.closed(self)

    def _buffered(self, reader: io.BufferedReader) -> bool:
        timeout = self.gettimeout()
        self.settimeout(0)  # of the Python object: else peek() would wait when the buffer is empty
        try:
            return bool(reader.peek(1))
        except ConnectionError:  # reset: the application reads the end of file
            return True
        finally:
            self.settimeout(timeout)


class Connections:
    """The open connections of one generation. Any thread may call anything here.

    Owns an eventfd, `draining`, that is readable from the drain's start on.
    """

    def __init__(self) -> None:
        self._draining: int | None = None  # -1 once it is closed
        self.idle_until: float | None = None  # time.monotonic() until which idle ones are kept; None: not draining
        self.fewer = Watchers()  # told when one was closed
        self._open: dict[int, weakref.ref[Connection]] = {}
        self._detached: dict[tuple[int, int], int] = {}  # (device, inode) -> descriptor, of somebody else by now
        self._lock = threading.RLock()  # a finaliser may run at any moment, within another call too

    @property
    def draining(self) -> int:
        """The eventfd, made when it is first asked for; -1 after `close`."""
        with self._lock:
            if self._draining is None:
                self._draining = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return self._draining

    def add(self, accepted: socket.socket) -> Connection:
        """Make a connection of an accepted socket, which is taken."""
        connection = Connection(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        connection._tracker = self
        key = id(connection)
        with self._lock:
            self._open[key] = weakref.ref(connection, lambda _: self._gone(key))
        return connection

    def count(self) -> int:
        """How many are open now."""
        with self._lock:
            if self._detached:
                self._detached = {key: number for key, number in self._detached.items() if _inode(number) == key}
            return len(self._open) + len(self._detached)

    def closed(self, connection: Connection) -> None:
        """Take note that a connection was closed."""
        self._gone(id(connection))

    def detached(self, connection: Connection) -> None:
        """Take note that a connection's descriptor now belongs to another object (TLS, an event loop)."""
        with self._lock:
            if key := _inode(connection.fileno()):
                self._detached[key] = connection.fileno()
            self._open.pop(id(connection), None)

    def begin_drain(self, idle_until: float) -> None:
        """Wake everybody who waits for a request."""
        self.idle_until = idle_until
        os.eventfd_write(self.draining, 1)

    def end_all(self) -> int:
        """Shut down every open connection, so that whoever reads or writes there ends; returns how many."""
        with self._lock:
            count = self.count()
            for reference in list(self._open.values()):
                if connection := reference():
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
            for descriptor in self._detached.values():
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as twin:
                    twin.shutdown(socket.SHUT_RDWR)
        return count

    def close(self) -> None:
        """Close the eventfd. Harmless twice."""
        with self._lock:
            if self._draining is not None and self._draining >= 0:
                os.close(self._draining)
            self._draining = -1

    def _gone(self, key: int) -> None:
        with self._lock:
            if self._open.pop(key, None) is None:
                return
        self.fewer.tell()


def _inode(descriptor: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino
