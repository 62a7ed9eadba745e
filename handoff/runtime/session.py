"""One connection of the protocol: packets in both directions, the peer's identity, whether it lives.

Every exchange goes through here: a new generation's call, the session of an upgrade, a command and its answers.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from handoff.core.errors import BadDescriptors, BadMessage
from handoff.core.messages import Kind, Message, decode, encode
from handoff.linux import descriptors, processes, sockets
from handoff.runtime.loop import READ, WRITE, Loop, Timer

Received = TypeVar("Received")
_LONGEST_REASON: Final = 1000  # characters; JSON in ASCII makes up to 12 bytes of one
MAX_QUEUED: Final = 64  # packets for a peer that doesn't read; one more and it is given up


class Session:
    """A connected socket in a loop's thread. Owns the socket and the peer's pidfd; never blocks.

    `on_message(message, descriptors)` gets the descriptors as its own to close. `on_error` gets the sentence of what
    the peer did wrong. `on_closed` follows end of file or a broken connection, `on_lost` the peer's death; where the
    death follows an end of file within `verdict` seconds, only `on_lost` is called.
    """

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        *,
        on_message: Callable[[Message, list[int]], None],
        on_error: Callable[[str], None],
        on_closed: Callable[[], None],
        on_lost: Callable[[], None] | None = None,
        verdict: float | None = None,
    ) -> None:
        connection.setblocking(False)
        self._loop = loop
        self._socket = connection
        self._queue: collections.deque[tuple[bytes, Sequence[int]]] = collections.deque()
        self._verdict: Timer | None = None
        self._lost = False
        self._given_up = False
        self.pidfd: int | None = None
        self.pid, self.uid = sockets.peer_credentials(connection)
        self.hand_over(on_message=on_message, on_error=on_error, on_closed=on_closed, on_lost=on_lost, verdict=verdict)
        loop.watch(connection.fileno(), READ, self._readable)

    def hand_over(
        self,
        *,
        on_message: Callable[[Message, list[int]], None],
        on_error: Callable[[str], None],
        on_closed: Callable[[], None],
        on_lost: Callable[[], None] | None = None,
        verdict: float | None = None,
    ) -> None:
        """Give the session to somebody else, who is called from now on."""
        self._on_message = on_message
        self._on_error = on_error
        self._on_closed = on_closed
        self._on_lost = on_lost
        self._patience = verdict
        if on_lost and self.pidfd is None and (pidfd := sockets.peer_pidfd(self._socket)) is not None:
            self.pidfd = pidfd
            self._loop.watch(pidfd, READ, self._peer_is_dead)

    @property
    def closed(self) -> bool:
        """Whether this side has closed it."""
        return self._socket.fileno() < 0

    def send(self, kind: Kind, descriptors: Sequence[int] = (), **fields: Any) -> None:
        """Send a message, or queue it until the peer reads; the descriptors stay the caller's, open until it is sent.

        A broken connection is not an error here: `on_closed` or `on_lost` tells of it. A reason that is too long, which
        may quote what the peer sent, is cut; instead of an answer that is too long an error is sent. Raises BadMessage
        for any other message above the size of a packet.
        """
        if self.closed:
            return
        if self._given_up:
            return
        packet = _encode(kind, fields)
        self._queue.append((packet, descriptors))
        if len(self._queue) > MAX_QUEUED:
            self._given_up = True  # before the call: whoever refuses a peer tells it why, which comes here again
            self._queue.clear()
            self._on_error(f"{MAX_QUEUED} messages wait to be read")
            return
        self._flush()

    def close(self) -> None:
        """Close the connection and the pidfd; no call follows. What is queued is lost. Harmless twice."""
        if self._verdict:
            self._verdict.cancel()
        if not self.closed:
            self._loop.forget(self._socket.fileno())
            # Closed with something unread, the peer would read a reset before what it was told last.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)
                while self._socket.recv(1):
                    pass
            self._socket.close()
        if self.pidfd is not None:
            self._loop.forget(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = None

    def abandon(self) -> None:
        """In a forked child: close what was inherited without touching the parent's poll set."""
        self._socket.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def exit_status(self) -> int | None:
        """How the peer ended, where it is dead and the kernel tells."""
        return None if self.pidfd is None else processes.exit_status(self.pidfd, self.pid)

    def _flush(self) -> None:
        try:
            while self._queue:
                descriptors.send(self._socket, *self._queue[0])
                self._queue.popleft()
        except BlockingIOError:
            self._loop.watch(self._socket.fileno(), READ | WRITE, self._readable_or_writable)
            return
        except OSError:  # gone: the reading side sees it too
            self._queue.clear()
        self._loop.watch(self._socket.fileno(), READ, self._readable)

    def _readable_or_writable(self) -> None:
        self._flush()
        if not self.closed:
            self._readable()

    def _readable(self) -> None:
        try:
            packet, received = self._once_more(lambda: descriptors.receive(self._socket))
        except BlockingIOError:
            return
        except OSError:
            packet, received = b"", []
        except (BadMessage, BadDescriptors) as error:
            self._on_error(str(error))
            return
        if not packet:
            descriptors.close(received)
            self._end_of_file()
            return
        try:
            message = decode(packet)
        except BadMessage as error:
            descriptors.close(received)
            self._on_error(str(error))
            return
        self._on_message(message, received)

    def _end_of_file(self) -> None:
        self._loop.forget(self._socket.fileno())
        if self.pidfd is None or self._patience is None:
            self._on_closed()
        elif not self._lost:
            # A process that dies closes its connections before its pidfd tells: wait for that, within a bound.
            self._verdict = self._loop.after(self._patience, self._on_closed)

    def _peer_is_dead(self) -> None:
        if self._verdict:
            self._verdict.cancel()
        assert self.pidfd is not None
        self._loop.forget(self.pidfd)
        self._lost = True
        # What it said before it died was said: `stopping`, for one, decides how its death is taken.
        with contextlib.suppress(OSError):
            while not self.closed and self._has_packet():
                self._readable()
        if self._on_lost and self.pidfd is not None:
            self._on_lost()

    def _has_packet(self) -> bool:
        try:
            return bool(self._once_more(lambda: self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)))
        except BlockingIOError:
            return False

    @staticmethod
    def _once_more(receive: Callable[[], Received]) -> Received:
        # A peer that dies with something unread resets the connection: the kernel tells that first, and once; what
        # the peer had sent is still there afterwards.
        try:
            return receive()
        except ConnectionResetError:
            return receive()


def _encode(kind: Kind, fields: dict[str, Any]) -> bytes:
    try:
        return encode(kind, **fields)
    except BadMessage as error:
        if isinstance(reason := fields.get("reason"), str):
            return encode(kind, **{**fields, "reason": f"{reason[:_LONGEST_REASON]} ..."})
        if kind in (Kind.STATE, Kind.RESULT):
            return encode(Kind.ERROR, code="too-long", reason=str(error))
        raise
