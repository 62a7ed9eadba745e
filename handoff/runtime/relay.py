"""The new program's standard error while it has yet to prove itself: passed on, and its last words kept."""

from __future__ import annotations

import collections
import contextlib
import os
import select
from typing import Final

from handoff.runtime.loop import READ, WRITE, Loop, Timer

LAST_WORDS: Final = 4096  # bytes kept: as JSON at most six times that, which fits into a packet with the rest
_PIECE: Final = select.PIPE_BUF  # a pipe that poll(2) calls writable takes that much without blocking
_MOST_PIECES: Final = 256  # a pipe's greatest size without privileges, 1 MiB (pipe(7)): more is written meanwhile
_RETRY: Final = 0.05  # seconds, for a terminal that poll(2) calls writable and that takes nothing


class Relay:
    """Reads a pipe in a loop's thread and passes on what comes to a borrowed descriptor.

    Takes the reading end. While the other side of `target` takes nothing, nothing is read either: no thread of this
    process ever blocks, and no line is lost. Ends by itself when no writer is left.
    """

    def __init__(self, loop: Loop, pipe: int, target: int) -> None:
        self._loop = loop
        self._pipe = pipe
        self._target, self._owned = _own_description(target)
        self._rest = b""  # read, and not yet taken by the target
        self._retry: Timer | None = None
        self._kept: collections.deque[bytes] = collections.deque()
        self._size = 0
        loop.watch(pipe, READ, self._readable)

    @property
    def last_words(self) -> str:
        """The end of what was written, with what still lies in the pipe."""
        self._read_rest()
        return b"".join(self._kept)[-LAST_WORDS:].decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Pass on what lies in the pipe, as far as that goes without blocking, and close it. Harmless twice."""
        if self._pipe < 0:
            return
        self._read_rest()
        if self._retry:
            self._retry.cancel()
        self._loop.forget(self._target)
        self._loop.forget(self._pipe)
        os.close(self._pipe)
        self._pipe = -1
        if self._owned:
            os.close(self._target)

    def _read_rest(self) -> None:
        for _ in range(_MOST_PIECES):
            if self._pipe < 0 or not (self._rest or _ready(self._pipe, READ)):
                return
            if not (_ready(self._target, WRITE) and self._pass_on()):
                return

    def _readable(self) -> None:
        if _ready(self._target, WRITE) and not self._pass_on():
            self.close()
        elif self._rest or not _ready(self._target, WRITE):
            self._loop.forget(self._pipe)
            self._loop.watch(self._target, WRITE, self._writable)

    def _writable(self) -> None:
        before = len(self._rest)
        if before:
            self._pass_on()
        if not self._rest:
            self._loop.forget(self._target)
            self._loop.watch(self._pipe, READ, self._readable)
        elif len(self._rest) == before:
            # A line's end takes two places of a terminal, and poll(2) tells of one.
            self._loop.forget(self._target)
            self._retry = self._loop.after(_RETRY, lambda: self._loop.watch(self._target, WRITE, self._writable))

    def _pass_on(self) -> bool:
        """Move one piece, or what is left of one; False at end of file."""
        if not self._rest:
            piece = os.read(self._pipe, _PIECE)
            if not piece:
                return False
            self._kept.append(piece)
            self._size += len(piece)
            while self._size - len(self._kept[0]) >= LAST_WORDS:
                self._size -= len(self._kept.popleft())
            self._rest = piece
        try:
            written = os.write(self._target, self._rest)
        except BlockingIOError:
            written = 0
        except OSError:  # nobody reads our standard error: no reason to fail an upgrade
            written = len(self._rest)
        self._rest = self._rest[written:]
        return True


def _own_description(target: int) -> tuple[int, bool]:
    """(descriptor, whether it is ours) to write to a target without ever blocking.

    A write to a terminal that poll(2) calls writable may block, and O_NONBLOCK on the target itself would be seen by
    every process that shares it: a terminal is opened anew. Another user's, as under su(1), can't be.
    """
    with contextlib.suppress(OSError):
        if os.isatty(target):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{target}", flags), True
    return target, False


def _ready(descriptor: int, events: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, events)
    return bool(poll.poll(0))
