"""A listener of a service: accepts while its generation is to accept, waits while it is paused, ends with it."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import select
import threading
from collections.abc import Iterator
from typing import Any, Final

from handoff.core.address import Address
from handoff.core.plan import Entry
from handoff.linux import sockets
from handoff.runtime.connections import Connection, Connections
from handoff.runtime.watchers import Watchers

_log = logging.getLogger(__name__)
EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ABORTED: Final = (errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH)
RELIEF: Final = 1.0  # seconds until accept() is tried again without descriptors; a close comes first, mostly


class Gate(enum.Enum):
    """Whether a listener accepts."""

    SHUT = "shut"  # not yet, or paused
    OPEN = "open"
    ENDED = "ended"  # never again


class Listener:
    """A listening socket, shared with the generations before and after; owned and closed by the Service.

    Iterating gives connections, in any number of threads, until the generation is replaced or stopped; a pause
    (probation) is not seen.
    """

    def __init__(self, opened: sockets.Opened, connections: Connections, *, options: Address | None = None) -> None:
        """Take an opened socket; `options` are those that a kept one has yet to get, once it is this generation's."""
        self.entry: Final[Entry] = opened.entry
        self._options = options
        self._socket = opened.socket
        self._connections = connections
        self._gate = Gate.SHUT
        self._lock = threading.Lock()  # between accept(2) and close(2): the number may be given anew in between
        self.changes = Watchers()  # of the gate
        self._holders = 0

    def __repr__(self) -> str:
        return f"<handoff.Listener {self.address} {self._gate.value}>"

    @property
    def address(self) -> str:
        """The address as bound: with the real port where 0 was asked for."""
        return self.entry.address

    @property
    def port(self) -> int:
        """The TCP port as bound. Raises ValueError for a Unix socket."""
        return int(self.address.rpartition(":")[2])

    @property
    def path(self) -> str:
        """The path of a Unix socket; "" for TCP."""
        return self.address.removeprefix("unix://") if self.address.startswith("unix://") else ""

    @property
    def gate(self) -> Gate:
        """Whether it accepts."""
        return self._gate

    def fileno(self) -> int:
        """The descriptor, borrowed; -1 once it is closed."""
        return self._socket.fileno()

    def accept(self) -> tuple[Connection, Any] | None:
        """Wait for a connection; returns it with its peer's address, or None when there will be no more.

        Blocks the calling thread. The connection is the caller's to close.
        """
        return next(iter(self), None)

    def __iter__(self) -> Iterator[tuple[Connection, Any]]:
        with contextlib.ExitStack() as stack:
            # Only who has to wait pays for these; after making one look again, or a change would be missed.
            woken: _Woken | None = None
            relief: _Relief | None = None
            while self._gate is not Gate.ENDED:
                try:
                    accepted = self.accept_now()
                    if not accepted and woken is None:
                        woken = stack.enter_context(_Woken(self.changes))
                        continue
                except OSError as error:
                    if error.errno not in EXHAUSTED:
                        raise
                    if relief is None:
                        relief = stack.enter_context(_Relief(self.changes, self._connections.fewer))
                        continue
                    _log.warning("%s: out of descriptors; clients wait until a connection is closed", self.address)
                    relief.wait()
                    continue
                if accepted:
                    yield accepted
                elif woken:
                    woken.wait(self._socket.fileno() if self._gate is Gate.OPEN else None)

    def accept_now(self) -> tuple[Connection, Any] | None:
        """Accept what is there; None where nothing is, or where this generation is not to accept. Does not block.

        Raises OSError when the process or the system is out of descriptors or memory.
        """
        with self._lock:
            if self._gate is not Gate.OPEN:
                return None
            try:
                accepted, peer = self._socket.accept()
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno in _ABORTED:  # accept(2): errors of the connection, not of the listener
                    return None
                raise
        return self._connections.add(accepted), peer

    def turn(self, gate: Gate) -> None:
        """Open, shut or end it. Ended is for good."""
        if self._gate in (gate, Gate.ENDED):
            return
        self._gate = gate
        self.changes.tell()

    def apply_options(self) -> None:
        """Give a kept listener what has changed of its options and can be changed while it listens."""
        if self._options and self.fileno() >= 0:
            try:
                sockets.apply_options(self._socket, self._options, self.entry.inode)
            except OSError as error:
                _log.warning("%s: its options could not be changed: %s", self.address, error.strerror)

    def hold(self) -> None:
        """Keep the descriptor open, though the listener ends, until `release`: an epoll set has to be told first."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """Take back a `hold`."""
        with self._lock:
            self._holders -= 1
            if not self._holders and self._gate is Gate.ENDED:
                self._socket.close()

    def close(self) -> None:
        """End it and close the descriptor: what is queued stays with whoever else holds the socket."""
        self.turn(Gate.ENDED)
        with self._lock:
            if not self._holders:
                self._socket.close()


class _Woken:
    """An eventfd of the calling thread, written when a listener's gate changes."""

    def __init__(self, changes: Watchers) -> None:
        self._changes = changes
        self._descriptor = -1

    def __enter__(self) -> _Woken:
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._changes.add(self._wake)
        return self

    def __exit__(self, *_: object) -> None:
        self._changes.remove(self._wake)
        os.close(self._descriptor)

    def wait(self, listener: int | None) -> None:
        """Wait for a connection at `listener` (None: not for that) or a change of the gate."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if listener is not None and listener >= 0:
            poll.register(listener, select.POLLIN)
        if any(descriptor == self._descriptor for descriptor, _ in poll.poll()):
            os.eventfd_read(self._descriptor)

    def _wake(self) -> None:
        os.eventfd_write(self._descriptor, 1)


class _Relief:
    """Tells the calling thread that a connection was closed or the gate has changed; takes no descriptor."""

    def __init__(self, *sources: Watchers) -> None:
        self._sources = sources
        self._told = threading.Lock()  # bare, not an Event: a finaliser may tell while this very thread waits
        self._told.acquire()

    def __enter__(self) -> _Relief:
        for source in self._sources:
            source.add(self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        for source in self._sources:
            source.remove(self._tell)

    def wait(self) -> None:
        """Wait until told, or until RELIEF is over: other descriptors are closed too."""
        self._told.acquire(timeout=RELIEF)

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # told already
            self._told.release()
