"""The other end of a generation's control socket: asks, and waits for what it is told. Blocks the calling thread."""

from __future__ import annotations

import os
import select
import time
from typing import Any, Final

from handoff.core.errors import BadDirectory, NoAnswer, NotRunning, Refused
from handoff.core.messages import Kind, Message, decode, encode
from handoff.linux import descriptors, sockets
from handoff.runtime.directory import RuntimeDirectory, path_of

PATIENCE: Final = 5.0  # seconds for an answer that takes no work


class Ended(Exception):
    """The generation has closed the connection: it has ended, or does not want to speak."""


class Client:
    """A connection to the generation in charge of a service, or to `generation`; owned until `close`."""

    def __init__(self, service: str, runtime_dir: str | None = None, *, generation: int | None = None) -> None:
        """Connect. Raises NotRunning, NoAnswer and BadDirectory."""
        self.service: Final = service
        self._path = path_of(service, runtime_dir)
        try:
            directory = RuntimeDirectory(service, runtime_dir)
        except BadDirectory as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise NotRunning(service, self._path) from None
            raise
        try:
            self._socket = directory.connect(generation, timeout=PATIENCE)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NotRunning(service, self._path) from None
        except TimeoutError:
            raise NoAnswer(service, None, PATIENCE) from None
        except OSError as error:
            raise BadDirectory(self._path, error.strerror or str(error)) from None
        finally:
            directory.close()
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._pid, _ = sockets.peer_credentials(self._socket)
        self._pidfd = sockets.peer_pidfd(self._socket)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what was asked for goes on."""
        self._socket.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def send(self, kind: Kind, **fields: Any) -> None:
        """Ask. Raises BadMessage when the fields don't fit into a packet, Ended when nobody is there any more."""
        packet = encode(kind, **fields)
        try:
            descriptors.send(self._socket, packet)
        except BlockingIOError:
            raise NoAnswer(self.service, self._pid, 0) from None
        except OSError:
            raise Ended from None

    def receive(self, seconds: float) -> Message | None:
        """The next message, or None if none comes in time. Raises Ended, BadMessage and, for `error`, Refused."""
        if not self._poll.poll(max(0.0, seconds) * 1000):
            return None
        try:
            packet, received = descriptors.receive(self._socket)
        except OSError:
            raise Ended from None
        descriptors.close(received)
        if not packet:
            raise Ended
        message = decode(packet)
        if message.kind is Kind.ERROR:
            raise Refused(self.service, message["reason"], message["code"])
        return message

    def wait_for_end(self, seconds: float) -> bool:
        """Wait until the process at the other end has ended; False when it still lives then, or can't be watched."""
        if self._pidfd is None:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def state(self, kind: Kind = Kind.STATUS, seconds: float = PATIENCE) -> dict[str, Any]:
        """What `status` tells; with Kind.WAIT, once the service serves.

        Raises NoAnswer, Refused and, when the generation ends just now, NotRunning.
        """
        until = time.monotonic() + seconds
        try:
            self.send(kind)
            while message := self.receive(until - time.monotonic()):
                if message.kind is Kind.STATE:
                    state: dict[str, Any] = message["state"]
                    return state
        except Ended:
            raise NotRunning(self.service, self._path) from None
        raise NoAnswer(self.service, self._pid, seconds)


def successors(service: str, runtime_dir: str | None, after: int) -> list[int]:
    """The generations after one, newest first, that have a control socket. Raises BadDirectory."""
    directory = RuntimeDirectory(service, runtime_dir)
    try:
        return [number for number in reversed(directory.generations()) if number > after]
    finally:
        directory.close()
